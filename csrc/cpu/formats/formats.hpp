// Weight formats, the packed layout that all matrix kernels share, and the activations each format takes. No SIMD here.
//
// A matrix W [rows, cols] is cut into panels of 16 output rows, so that one 64-byte load holds the same columns of 16
// rows. Rows are padded with zeros to a multiple of 16, columns to whole blocks. Panels follow each other, and each is
// one stream of blocks and of aligned 64-byte loads:
//
//   f32   32 columns: [k][16] float
//   bf16  32 columns: [k / 2][16][2] bfloat16
//   q8_0  64 columns: scales [2 groups][16] fp16, then [16 fours of k][16][4] uint8 = q + 128
//   q4_0  64 columns: scales [2 groups][16] fp16, then [8 eights of k][16][4] uint8: low nibble k + 0..3,
//         high nibble k + 4..7, each q + 8
//
// Scales are part of the stream: a second stream in front of the panel cost a third of the bandwidth.
//
// To add a format: its name here, its row in kFormats and its codec in formats.cpp, its operands in kernels/operands.hpp.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string>

namespace paceline {

enum class Format : int { f32, bf16, q8_0, q4_0 };
enum class Element : int { f32, bf16, f16 };  // element types of checkpoint tensors

constexpr int kPanel = 16;  // output rows of a panel
constexpr int kUnit = 32;   // outputs that one thread computes at a time: two panels
constexpr int kGroup = 32;  // columns that share a scale
constexpr int kTile = 8;    // batch rows that a kernel holds in registers

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What activations are converted to for a matrix.
struct ActFormat {
  enum class Kind : int { f32, bf16, int8 };  // int8: with a scale for each row and group of columns

  Kind kind = Kind::f32;
  int32_t offset = 0;  // int8: what was added to the weights to make them unsigned, which start values cancel

  bool operator==(const ActFormat&) const = default;
  constexpr int bytes() const { return kind == Kind::f32 ? 4 : kind == Kind::bf16 ? 2 : 1; }  // of one column
  constexpr int lane_columns() const { return 4 / bytes(); }  // columns in the four bytes of one activation lane
};

// How the columns of one block are stored for one of a panel's rows (`lane`).
struct BlockCodec {
  void (*pack)(const float* x, int lane, uint8_t* block);            // x [block_cols]
  void (*unpack)(const uint8_t* block, int lane, float* out);        // out [block_cols]
  void (*randomise)(uint8_t* block, float spread, uint64_t& state);  // all rows: about `spread` in size
};

extern const BlockCodec f32_codec, bf16_codec, q8_0_codec, q4_0_codec;

struct FormatTraits {
  const char* name;
  int64_t block_cols;
  int64_t block_bytes;  // of a panel's sixteen rows
  ActFormat act;        // the activations it takes
  const BlockCodec* codec;
};

// Bytes of a block of two groups of quantised columns, and of the scales it begins with.
constexpr int64_t kScaleBytes = 2 * kPanel * 2;
constexpr int64_t quantised_block_bytes(int bits) { return kScaleBytes + 2 * kGroup * kPanel * bits / 8; }

// In the order of Format.
inline constexpr FormatTraits kFormats[] = {
    {"f32", 32, 32 * kPanel * 4, {ActFormat::Kind::f32}, &f32_codec},
    {"bf16", 32, 32 * kPanel * 2, {ActFormat::Kind::bf16}, &bf16_codec},
    {"q8_0", 2 * kGroup, quantised_block_bytes(8), {ActFormat::Kind::int8, 128}, &q8_0_codec},
    {"q4_0", 2 * kGroup, quantised_block_bytes(4), {ActFormat::Kind::int8, 8}, &q4_0_codec},
};
constexpr int kFormatCount = int(std::size(kFormats));

constexpr const FormatTraits& traits(Format f) { return kFormats[int(f)]; }

// Columns to which any format pads at most: every smaller padding divides it.
constexpr int64_t kMaxBlock = [] {
  int64_t most = 0;
  for (const FormatTraits& f : kFormats) most = std::max(most, f.block_cols);
  return most;
}();

Format format_from(const std::string& name);  // throws std::invalid_argument

// A packed matrix as kernels see it.
struct MatrixView {
  Format format = Format::f32;
  int64_t rows = 0, cols = 0, padded_cols = 0, stride = 0;  // stride: bytes of a panel
  const uint8_t* data = nullptr;

  MatrixView() = default;
  MatrixView(Format format, int64_t rows, int64_t cols)
      : format(format), rows(rows), cols(cols), padded_cols(round_up(cols, traits(format).block_cols)),
        stride(padded_cols / traits(format).block_cols * traits(format).block_bytes) {}

  const uint8_t* panel(int64_t i) const { return data + i * stride; }
  int64_t panels() const { return (rows + kPanel - 1) / kPanel; }
  int64_t padded_rows() const { return panels() * kPanel; }
  int64_t units() const { return (rows + kUnit - 1) / kUnit; }
  int64_t bytes() const { return panels() * stride; }
};

// Rows of activations, packed in the format that a matrix takes.
//
// Rows are taken in tiles of `lanes` (1, 2, 4 or 8); a tile is [padded cols / lane_columns][lanes] four-byte lanes, so
// that a kernel broadcasts one lane of one row at a time from neighbouring addresses. Rows of int8 carry, for each
// group of columns, a scale and `-offset * sum(q)`: the start value that cancels the offset of the weights.
struct ActView {
  ActFormat format;
  int lanes = 1;
  int64_t padded_cols = 0;
  uint8_t* data = nullptr;
  float* scale = nullptr;    // [tile][group][lanes]
  int32_t* start = nullptr;  // [tile][group][lanes]

  int64_t groups() const { return padded_cols / kGroup; }
  int64_t tile_bytes() const { return padded_cols * format.bytes() * lanes; }
  int64_t tile_groups() const { return groups() * lanes; }
  ActView tile(int64_t i) const {
    ActView t = *this;
    t.data += i * tile_bytes();
    if (scale) t.scale += i * tile_groups(), t.start += i * tile_groups();
    return t;
  }
  bool fits(const MatrixView& w) const { return format == traits(w.format).act && padded_cols == w.padded_cols; }
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

float half_to_float(uint16_t h);
uint16_t float_to_half(float f);
float bf16_to_float(uint16_t b);
uint16_t float_to_bf16(float f);

// Pack rows [count, cols] of a checkpoint tensor into `data`, as matrix rows `first`, first + 1, ...
void pack_rows(const MatrixView& shape, uint8_t* data, Element type, const void* source, int64_t first, int64_t count);

// Undo the packing of one row: out [cols].
void unpack_row(const MatrixView& matrix, int64_t row, float* out);

// Fill a matrix with plausible values without meaning, the same for the same seed.
void randomise(const MatrixView& shape, uint8_t* data, uint64_t seed);

}  // namespace paceline
