// Weight formats and the packed layout that all matrix kernels share. No SIMD here.
//
// A matrix W [rows, cols] is cut into panels of 16 output rows, so that one 64-byte load holds the same k of 16 rows.
// Rows are padded with zeros to a multiple of 16, cols to one of 32 (a quantisation group), or of 64 in q8 and q4.
// Panels follow each other, and each is one stream of aligned 64-byte loads:
//
//   f32   [k][16] float
//   bf16  [k / 2][16][2] bfloat16
//   q8    blocks of 64 columns: scales [2 groups][16] fp16, then [16 fours of k][16][4] uint8 = q + 128   (GGUF's Q8_0)
//   q4    blocks of 64 columns: scales [2 groups][16] fp16, then [8 eights of k][16][4] uint8: low nibble k + 0..3,
//         high nibble k + 4..7, each q + 8                                                                (GGUF's Q4_0)
//
// Scales stand inside the stream, not in front of the panel: a second stream cost a third of the bandwidth.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace paceline {

enum class Format : int { f32, bf16, q8, q4 };
enum class Source : int { f32, bf16, f16 };  // element types found in checkpoints

constexpr int kPanel = 16;  // output rows a panel
constexpr int kGroup = 32;  // columns that share a scale; also the outputs of one unit of work
constexpr int kBlock = 64;  // columns of a quantised block: two groups
constexpr int kTile = 8;    // batch rows that a kernel holds in registers

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline Format format_from(const std::string& name) {
  if (name == "f32") return Format::f32;
  if (name == "bf16") return Format::bf16;
  if (name == "q8") return Format::q8;
  if (name == "q4") return Format::q4;
  throw std::invalid_argument("unknown weight format " + name + " (f32, bf16, q8 or q4)");
}

inline const char* format_name(Format f) {
  constexpr const char* names[] = {"f32", "bf16", "q8", "q4"};
  return names[int(f)];
}

inline bool quantised(Format f) { return f == Format::q8 || f == Format::q4; }

// Columns held by the four bytes of one activation lane: one float, two bfloat16 or four int8.
inline int lane_columns(Format f) { return f == Format::f32 ? 1 : f == Format::bf16 ? 2 : 4; }

inline int64_t pad_cols(Format f, int64_t cols) { return round_up(cols, quantised(f) ? kBlock : kGroup); }

// Bytes of a quantised block, its scales included.
constexpr int64_t kScaleBytes = kBlock / kGroup * kPanel * 2;
inline int64_t block_bytes(Format f) { return kScaleBytes + kBlock * kPanel / (f == Format::q4 ? 2 : 1); }

inline int64_t panel_bytes(Format f, int64_t padded_cols) {
  if (quantised(f)) return padded_cols / kBlock * block_bytes(f);
  return padded_cols * kPanel * (f == Format::f32 ? 4 : 2);
}

// A packed matrix as kernels see it.
struct MatrixView {
  Format format = Format::f32;
  int64_t rows = 0, cols = 0, padded_cols = 0, stride = 0;  // stride: bytes a panel
  const uint8_t* data = nullptr;

  const uint8_t* panel(int64_t i) const { return data + i * stride; }
  int64_t panels() const { return (rows + kPanel - 1) / kPanel; }
  int64_t units() const { return (rows + kGroup - 1) / kGroup; }
};

// Rows of activations, prepared for the format of the matrix they meet.
//
// Rows are taken in tiles of `lanes` (1, 2, 4 or 8); a tile is [padded cols / lane_columns][lanes] four-byte lanes, so
// that a kernel broadcasts one lane of one row at a time from neighbouring addresses. Quantised rows carry, for each
// group of 32 columns, a scale and `-offset * sum(q)`: the start value that cancels the offset of unsigned weights.
struct ActView {
  Format format = Format::f32;
  int lanes = 1;
  int64_t padded_cols = 0;
  uint8_t* data = nullptr;
  float* scale = nullptr;   // [tile][group][lanes]
  int32_t* start = nullptr; // [tile][group][lanes]

  int64_t tile_bytes() const { return padded_cols / lane_columns(format) * lanes * 4; }
  int64_t tile_groups() const { return padded_cols / kGroup * lanes; }
  ActView tile(int64_t i) const {
    ActView t = *this;
    t.data += i * tile_bytes();
    if (scale) t.scale += i * tile_groups(), t.start += i * tile_groups();
    return t;
  }
};

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

// Pack `count` rows of a [.., cols] source, starting at matrix row `first` (a multiple of 16), into `data`.
void pack_rows(const MatrixView& shape, uint8_t* data, Source type, const void* source, int64_t first, int64_t count);

// Undo the packing of one row: out [cols].
void unpack_row(const MatrixView& matrix, int64_t row, float* out);

}  // namespace paceline
