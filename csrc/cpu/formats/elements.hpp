// Element types of checkpoint tensors: plain numbers, and GGUF's blocks of quantised ones.
//
// A block is read into its fields: the numbers, and the scales and minima that turn them into values. Packed matrices
// hold the same fields in another order (formats.hpp), so that repacking moves bits and rounds nothing. Values are those
// of gguf-py's `quants.dequantize`, bit for bit. No SIMD here.
#pragma once

#include <cstdint>
#include <iterator>
#include <string>

namespace paceline {

enum class Element : int {
  f32,
  f16,
  bf16,
  q4_0,
  q4_1,
  q5_0,
  q5_1,
  q8_0,
  q2_k,
  q3_k,
  q4_k,
  q5_k,
  q6_k,
  iq4_nl,
  iq4_xs,
  mxfp4
};

constexpr int kMostElements = 256;  // of a block

// What a block holds. Unused fields are not set.
struct BlockFields {
  uint16_t d, m;              // fp16 bits of the block's scale and minimum; MXFP4: bfloat16 bits of a power of two
  int8_t scale[16], min[16];  // factors of d and m, each for a part of the block
  alignas(4) uint8_t q[kMostElements];
};

inline constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
inline constexpr int8_t kMxfp4Values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// Which values numbers stand for. Not a pointer that may be null: with -fsanitize=undefined those are no constants.
enum class Lookup : int { none, iq4, mxfp4 };
constexpr const int8_t* values_of(Lookup t) { return t == Lookup::iq4 ? kIq4Values : kMxfp4Values; }

// The values of a block are scale * q' + minimum, where
//   q'       is q - offset, or values_of(lookup)[q]
//   scale    is d, or d * scale[part]
//   minimum  is absent, m, or -(m * min[part])
struct ElementTraits {
  const char* name;
  int64_t columns, bytes;  // of a block
  int offset = 0;
  int part = 0;  // columns that share a factor of d and m; 0: none has
  bool has_min = false;
  Lookup lookup = Lookup::none;
  void (*read)(const uint8_t* block, BlockFields& fields) = nullptr;   // null for plain numbers
  void (*write)(const BlockFields& fields, uint8_t* block) = nullptr;  // null for those that nothing is written in

  constexpr bool plain() const { return columns == 1; }
};

// Reading and writing, by type.
namespace blocks {
#define PACELINE_BLOCK(type)                      \
  void read_##type(const uint8_t*, BlockFields&); \
  void write_##type(const BlockFields&, uint8_t*);
PACELINE_BLOCK(q4_0)
PACELINE_BLOCK(q4_1)
PACELINE_BLOCK(q5_0)
PACELINE_BLOCK(q5_1)
PACELINE_BLOCK(q8_0)
PACELINE_BLOCK(q4_k)
PACELINE_BLOCK(q5_k)
PACELINE_BLOCK(q6_k)
PACELINE_BLOCK(iq4_xs)
#undef PACELINE_BLOCK
void read_q2_k(const uint8_t*, BlockFields&);
void read_q3_k(const uint8_t*, BlockFields&);
void read_mxfp4(const uint8_t*, BlockFields&);
}  // namespace blocks

// In the order of Element.
inline constexpr ElementTraits kElements[] = {
    {"F32", 1, 4},
    {"F16", 1, 2},
    {"BF16", 1, 2},
    {"Q4_0", 32, 18, 8, 0, false, Lookup::none, blocks::read_q4_0, blocks::write_q4_0},
    {"Q4_1", 32, 20, 0, 0, true, Lookup::none, blocks::read_q4_1, blocks::write_q4_1},
    {"Q5_0", 32, 22, 16, 0, false, Lookup::none, blocks::read_q5_0, blocks::write_q5_0},
    {"Q5_1", 32, 24, 0, 0, true, Lookup::none, blocks::read_q5_1, blocks::write_q5_1},
    {"Q8_0", 32, 34, 128, 0, false, Lookup::none, blocks::read_q8_0, blocks::write_q8_0},
    {"Q2_K", 256, 84, 0, 16, true, Lookup::none, blocks::read_q2_k},
    {"Q3_K", 256, 110, 4, 16, false, Lookup::none, blocks::read_q3_k},
    {"Q4_K", 256, 144, 0, 32, true, Lookup::none, blocks::read_q4_k, blocks::write_q4_k},
    {"Q5_K", 256, 176, 0, 32, true, Lookup::none, blocks::read_q5_k, blocks::write_q5_k},
    {"Q6_K", 256, 210, 32, 16, false, Lookup::none, blocks::read_q6_k, blocks::write_q6_k},
    {"IQ4_NL", 32, 18, 0, 0, false, Lookup::iq4, blocks::read_q4_0, blocks::write_q4_0},
    {"IQ4_XS", 256, 136, 0, 32, false, Lookup::iq4, blocks::read_iq4_xs, blocks::write_iq4_xs},
    {"MXFP4", 32, 17, 0, 0, false, Lookup::mxfp4, blocks::read_mxfp4},
};

constexpr const ElementTraits& traits(Element e) { return kElements[int(e)]; }

Element element_from(const std::string& name);  // throws std::invalid_argument

// Bytes of a row of that many columns. Throws std::invalid_argument unless they are whole blocks.
int64_t row_bytes(Element type, int64_t cols);

// The values of a block's fields: out [columns of a block].
void block_values(Element type, const BlockFields& fields, float* out);

// Columns first .. first + n of a row that lies at any address.
void decode(Element type, const uint8_t* row, int64_t first, int64_t n, float* out);

float half_to_float(uint16_t h);
uint16_t float_to_half(float f);
float bf16_to_float(uint16_t b);
uint16_t float_to_bf16(float f);

}  // namespace paceline
