// Weight formats, the packed layout that all matrix kernels share, and the activations each format takes. No SIMD here.
//
// A matrix W [rows, cols] is cut into panels of 16 output rows, so that one 64-byte load holds the same columns of 16
// rows. Rows are padded with zeros to a multiple of 16, columns to whole blocks. Panels follow each other, and each is
// one stream of blocks and of aligned 64-byte loads. Plain formats have blocks of 32 columns:
//
//   f32   [k][16] float
//   f16   [k][16] fp16
//   bf16  [k / 2][16][2] bfloat16
//
// The others hold the bits of blocks of the element type they are named after. Their blocks have 64 columns: a header
// with scales, then two groups of 32 columns. A group is eight operands [16][4], operand i with the numbers of columns
// 4 i .. 4 i + 3 of the sixteen rows as unsigned bytes, packed by the bits of a number:
//
//   8  [8 operands][16][4]
//   2  [2 halves of the group][16][4]: bits 2 i and 2 i + 1 are operand i of the half's four
//   3  [16][4]: bit i is the third bit of operand i; then the low two bits, as above
//   4  [4][16][4]: operand 2 i in the low halves, 2 i + 1 in the high ones
//   5  [16][4]: bit i is the fifth bit of operand i; then the low four bits, as above
//   6  for both halves of the group, of four operands each: [16][4]: bits 2 i and 2 i + 1 are the highest bits of
//      operand i; then the low four bits
//
// Headers are named in `Header`. Formats of 256-column blocks have one of 64 bytes in front of every 256 columns too; the
// last of these super-blocks may have fewer columns. Scales are part of the stream: a second stream in front of the panel
// cost a third of the bandwidth.
//
// To add a format: its name and its row here; if its header or its numbers are of a new kind, their layout in formats.cpp,
// and kernels/operands.hpp. To add an element type: elements.hpp.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string>

#include "formats/elements.hpp"

namespace paceline {

enum class Format : int {
  f32,
  f16,
  bf16,
  q8_0,
  q4_0,
  q4_1,
  q5_0,
  q5_1,
  q2_k,
  q3_k,
  q4_k,
  q5_k,
  q6_k,
  iq4_nl,
  iq4_xs,
  mxfp4
};

constexpr int kPanel = 16;   // output rows of a panel
constexpr int kUnit = 32;    // outputs that one thread computes at a time: two panels
constexpr int kGroup = 32;   // columns that share a scale of activations
constexpr int kSuper = 256;  // columns of a super-block
constexpr int kTile = 8;     // batch rows that a kernel holds in registers

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What activations are converted to for a matrix. int8: with scales and sums for each row and group of columns.
enum class ActFormat : int { f32, bf16, int8 };

constexpr int act_bytes(ActFormat f) { return f == ActFormat::f32 ? 4 : f == ActFormat::bf16 ? 2 : 1; }  // of a column
constexpr int lane_columns(ActFormat f) { return 4 / act_bytes(f); }  // in the four bytes of one activation lane

// What stands in front of a block of two groups, and of a super-block.
enum class Header : int {
  none,
  scale,          // d fp16 [2 groups][16]
  power,          // d bfloat16 [2][16]
  scale_minimum,  // d, then m fp16 [2][16]
  group_scales,   // d fp16 [16], int8 [2][16]
  half_scales,    // int8 [4 halves of groups][16]; super-block: d fp16 [16], 32 bytes of padding
  half_minima,    // scales, then minima int8 [4][16]; super-block: d, then m fp16 [16]
  scales_minima,  // scales, then minima int8 [2][16]; super-block: d, then m fp16 [16]
};

constexpr int64_t kHeaderBytes[] = {0, 64, 64, 128, 64, 64, 128, 64};

struct FormatTraits {
  const char* name;
  Element element;  // what it holds the bits of
  int bits;         // of a number
  Header header = Header::none;

  constexpr bool plain() const { return header == Header::none; }
  constexpr int64_t block_cols() const { return plain() ? 32 : 2 * kGroup; }
  constexpr int64_t group_bytes() const { return kGroup * kPanel * bits / 8; }
  constexpr int64_t header_bytes() const { return kHeaderBytes[int(header)]; }
  constexpr int64_t block_bytes() const { return header_bytes() + block_cols() / kGroup * group_bytes(); }
  constexpr int64_t super_bytes() const {  // of its header; 0: there are no super-blocks
    return header >= Header::half_scales ? 64 : 0;
  }
  // Of a panel that many columns wide, a multiple of block_cols.
  constexpr int64_t panel_bytes(int64_t cols) const {
    return cols / block_cols() * block_bytes() + (cols + kSuper - 1) / kSuper * super_bytes();
  }
  constexpr ActFormat act() const {
    return element == Element::bf16 ? ActFormat::bf16 : plain() ? ActFormat::f32 : ActFormat::int8;
  }
};

// In the order of Format.
inline constexpr FormatTraits kFormats[] = {
    {"f32", Element::f32, 32},
    {"f16", Element::f16, 16},
    {"bf16", Element::bf16, 16},
    {"q8_0", Element::q8_0, 8, Header::scale},
    {"q4_0", Element::q4_0, 4, Header::scale},
    {"q4_1", Element::q4_1, 4, Header::scale_minimum},
    {"q5_0", Element::q5_0, 5, Header::scale},
    {"q5_1", Element::q5_1, 5, Header::scale_minimum},
    {"q2_k", Element::q2_k, 2, Header::half_minima},
    {"q3_k", Element::q3_k, 3, Header::half_scales},
    {"q4_k", Element::q4_k, 4, Header::scales_minima},
    {"q5_k", Element::q5_k, 5, Header::scales_minima},
    {"q6_k", Element::q6_k, 6, Header::half_scales},
    {"iq4_nl", Element::iq4_nl, 4, Header::scale},
    {"iq4_xs", Element::iq4_xs, 4, Header::group_scales},
    {"mxfp4", Element::mxfp4, 4, Header::power},
};
constexpr int kFormatCount = int(std::size(kFormats));

constexpr const FormatTraits& traits(Format f) { return kFormats[int(f)]; }

// Columns to which any format pads at most: every smaller padding divides it.
constexpr int64_t kMaxBlock = 2 * kGroup;

Format format_from(const std::string& name);  // throws std::invalid_argument

// A packed matrix as kernels see it.
struct MatrixView {
  Format format = Format::f32;
  int64_t rows = 0, cols = 0, padded_cols = 0, stride = 0;  // stride: bytes of a panel
  const uint8_t* data = nullptr;

  MatrixView() = default;
  MatrixView(Format format, int64_t rows, int64_t cols)
      : format(format), rows(rows), cols(cols), padded_cols(round_up(cols, traits(format).block_cols())),
        stride(traits(format).panel_bytes(padded_cols)) {}

  const uint8_t* panel(int64_t i) const { return data + i * stride; }
  int64_t panels() const { return (rows + kPanel - 1) / kPanel; }
  int64_t padded_rows() const { return panels() * kPanel; }
  int64_t units() const { return (rows + kUnit - 1) / kUnit; }
  int64_t bytes() const { return panels() * stride; }
};

// What rows of int8 carry for each group of columns, in words of four bytes. A kernel reads two or three of them: those of
// a kind lie together, and the others do not pass through the nearest cache. `sum` is the sum of the group's numbers. Start
// values of sums of products cancel what makes the weights' numbers unsigned; instruction sets that add products in 16 bits
// have them as pairs: of the first two of each four columns, and of the others.
enum GroupWord : int {
  kStart8,      // int32: -8 sum
  kScale,       // float
  kScaledSum,   // float: scale * sum, which minima of weights are multiplied with
  kScaledHalf,  // float: scale * the sum of the first half
  kStart16,     // int32: -16 sum
  kStart128,    // int32: -128 sum
  kStart32,     // int32: -32 times the sum of the first half, then of the second
  kGroupWords = kStart32 + 2
};

// Rows of activations, packed in the format that a matrix takes.
//
// Rows are taken in tiles of `lanes` (1, 2, 4 or 8); a tile is [padded cols / lane_columns][lanes] four-byte lanes, so
// that a kernel broadcasts one lane of one row at a time from neighbouring addresses.
struct ActView {
  ActFormat format = ActFormat::f32;
  int lanes = 1;
  int64_t padded_cols = 0;
  uint8_t* data = nullptr;
  uint32_t* words = nullptr;  // int8: [tile][word][group][lanes]

  int64_t groups() const { return padded_cols / kGroup; }
  int64_t tile_bytes() const { return padded_cols * act_bytes(format) * lanes; }
  int64_t tile_words() const { return groups() * kGroupWords * lanes; }
  ActView tile(int64_t i) const {
    ActView t = *this;
    t.data += i * tile_bytes();
    if (words) t.words += i * tile_words();
    return t;
  }
  // A word of a group and lane of the first tile.
  uint32_t& word(int64_t group, int word, int64_t lane) const {
    return words[(word * groups() + group) * lanes + lane];
  }
  bool fits(const MatrixView& w) const { return format == traits(w.format).act() && padded_cols == w.padded_cols; }
};

[[noreturn]] void throw_misfit(const MatrixView& w, const ActView& act);

// Throws std::invalid_argument unless these activations are packed for this matrix.
inline void check_fits(const MatrixView& w, const ActView& act) {
  if (!act.fits(w)) throw_misfit(w, act);
}

// Lanes of a tile for that many rows: the next power of two, at most kTile.
inline int lanes_for(int64_t rows) {
  int lanes = 1;
  while (lanes < rows && lanes < kTile) lanes *= 2;
  return lanes;
}

// Pack rows [count, cols] of a checkpoint tensor into `data`, as matrix rows `first`, first + 1, ... Blocks of the
// format's own element type keep their bits; others are quantised from their values, where `importance` [cols] (or null)
// says how much an error in each column matters. Throws std::invalid_argument if the rows are no whole blocks of their
// type, or if the format is one that nothing is quantised to.
void pack_rows(const MatrixView& shape, uint8_t* data, Element type, const void* source, int64_t first, int64_t count,
               const float* importance = nullptr);

// Undo the packing of one row: out [cols].
void unpack_row(const MatrixView& matrix, int64_t row, float* out);

// Fill a matrix with plausible values without meaning, the same for the same seed.
void randomise(const MatrixView& shape, uint8_t* data, uint64_t seed);

}  // namespace paceline
