// Blocks of quantised numbers as files hold them, and the two 16-bit floats.
#include "formats/elements.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace paceline {

float bf16_to_float(uint16_t b) {
  const uint32_t bits = uint32_t(b) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

uint16_t float_to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 0x40);  // quiet NaN
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);                 // to nearest, ties to even
}

float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
  if (exponent == 0) {
    const float f = float(mantissa) * 0x1p-24f;
    return sign ? -f : f;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

uint16_t float_to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
  if (bits < 0x38800000) {                       // subnormal: an exact multiple of 2^-24 after rounding
    float positive;
    std::memcpy(&positive, &bits, 4);
    return sign | uint16_t(std::nearbyint(std::ldexp(positive, 24)));
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return sign | uint16_t((bits - 0x38000000) >> 13);
}

namespace {

uint16_t get16(const uint8_t* p) { return uint16_t(p[0] | p[1] << 8); }

void put16(uint8_t* p, uint16_t x) { p[0] = uint8_t(x), p[1] = uint8_t(x >> 8); }

// The low halves of n bytes are the numbers q[0 .. n], the high halves q[n .. 2 n].
void read_nibbles(const uint8_t* p, int n, uint8_t* q) {
  for (int i = 0; i < n; ++i) q[i] = p[i] & 15, q[n + i] = p[i] >> 4;
}

void write_nibbles(const uint8_t* q, int n, uint8_t* p) {
  for (int i = 0; i < n; ++i) p[i] = uint8_t((q[i] & 15) | q[n + i] << 4);
}

// Two bits each of 128 numbers, in 32 bytes.
void read_pairs(const uint8_t* p, int shift, uint8_t* q) {
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 32; ++i) q[32 * j + i] |= uint8_t((p[i] >> 2 * j & 3) << shift);
}

void write_pairs(const uint8_t* q, int shift, uint8_t* p) {
  std::fill_n(p, 32, uint8_t(0));
  for (int j = 0; j < 4; ++j)
    for (int i = 0; i < 32; ++i) p[i] |= uint8_t((q[32 * j + i] >> shift & 3) << 2 * j);
}

// The fifth bits of 32 numbers, a bit each.
void read_fifth(const uint8_t* p, uint8_t* q) {
  for (int i = 0; i < 32; ++i) q[i] |= uint8_t((p[i / 8] >> i % 8 & 1) << 4);
}

void write_fifth(const uint8_t* q, uint8_t* p) {
  std::fill_n(p, 4, uint8_t(0));
  for (int i = 0; i < 32; ++i) p[i / 8] |= uint8_t((q[i] >> 4 & 1) << i % 8);
}

// Eight scales and eight minima of six bits in twelve bytes.
void read_six_bits(const uint8_t* p, BlockFields& f) {
  for (int i = 0; i < 4; ++i) {
    f.scale[i] = int8_t(p[i] & 63), f.min[i] = int8_t(p[i + 4] & 63);
    f.scale[i + 4] = int8_t((p[i + 8] & 15) | p[i] >> 6 << 4);
    f.min[i + 4] = int8_t(p[i + 8] >> 4 | p[i + 4] >> 6 << 4);
  }
}

void write_six_bits(const BlockFields& f, uint8_t* p) {
  for (int i = 0; i < 4; ++i) {
    p[i] = uint8_t(f.scale[i] | f.scale[i + 4] >> 4 << 6);
    p[i + 4] = uint8_t(f.min[i] | f.min[i + 4] >> 4 << 6);
    p[i + 8] = uint8_t((f.scale[i + 4] & 15) | (f.min[i + 4] & 15) << 4);
  }
}

}  // namespace

namespace blocks {

void read_q4_0(const uint8_t* p, BlockFields& f) {
  f.d = get16(p);
  read_nibbles(p + 2, 16, f.q);
}
void write_q4_0(const BlockFields& f, uint8_t* p) {
  put16(p, f.d);
  write_nibbles(f.q, 16, p + 2);
}

void read_q4_1(const uint8_t* p, BlockFields& f) {
  f.d = get16(p), f.m = get16(p + 2);
  read_nibbles(p + 4, 16, f.q);
}
void write_q4_1(const BlockFields& f, uint8_t* p) {
  put16(p, f.d), put16(p + 2, f.m);
  write_nibbles(f.q, 16, p + 4);
}

void read_q5_0(const uint8_t* p, BlockFields& f) {
  f.d = get16(p);
  read_nibbles(p + 6, 16, f.q);
  read_fifth(p + 2, f.q);
}
void write_q5_0(const BlockFields& f, uint8_t* p) {
  put16(p, f.d);
  write_fifth(f.q, p + 2);
  write_nibbles(f.q, 16, p + 6);
}

void read_q5_1(const uint8_t* p, BlockFields& f) {
  f.d = get16(p), f.m = get16(p + 2);
  read_nibbles(p + 8, 16, f.q);
  read_fifth(p + 4, f.q);
}
void write_q5_1(const BlockFields& f, uint8_t* p) {
  put16(p, f.d), put16(p + 2, f.m);
  write_fifth(f.q, p + 4);
  write_nibbles(f.q, 16, p + 8);
}

void read_q8_0(const uint8_t* p, BlockFields& f) {
  f.d = get16(p);
  for (int i = 0; i < 32; ++i) f.q[i] = p[2 + i] ^ 128;
}
void write_q8_0(const BlockFields& f, uint8_t* p) {
  put16(p, f.d);
  for (int i = 0; i < 32; ++i) p[2 + i] = f.q[i] ^ 128;
}

void read_q2_k(const uint8_t* p, BlockFields& f) {
  f.d = get16(p + 80), f.m = get16(p + 82);
  for (int i = 0; i < 16; ++i) f.scale[i] = int8_t(p[i] & 15), f.min[i] = int8_t(p[i] >> 4);
  std::fill_n(f.q, 256, uint8_t(0));
  for (int h = 0; h < 2; ++h) read_pairs(p + 16 + 32 * h, 0, f.q + 128 * h);
}

void read_q3_k(const uint8_t* p, BlockFields& f) {
  f.d = get16(p + 108);
  for (int i = 0; i < 16; ++i) {
    const int low = i < 8 ? p[96 + i] & 15 : p[88 + i] >> 4, high = p[104 + i % 4] >> 2 * (i / 4) & 3;
    f.scale[i] = int8_t((low | high << 4) - 32);
  }
  for (int i = 0; i < 256; ++i) f.q[i] = uint8_t((p[i % 32] >> i / 32 & 1) << 2);
  for (int h = 0; h < 2; ++h) read_pairs(p + 32 + 32 * h, 0, f.q + 128 * h);
}

void read_q4_k(const uint8_t* p, BlockFields& f) {
  f.d = get16(p), f.m = get16(p + 2);
  read_six_bits(p + 4, f);
  for (int i = 0; i < 4; ++i) read_nibbles(p + 16 + 32 * i, 32, f.q + 64 * i);
}
void write_q4_k(const BlockFields& f, uint8_t* p) {
  put16(p, f.d), put16(p + 2, f.m);
  write_six_bits(f, p + 4);
  for (int i = 0; i < 4; ++i) write_nibbles(f.q + 64 * i, 32, p + 16 + 32 * i);
}

void read_q5_k(const uint8_t* p, BlockFields& f) {
  f.d = get16(p), f.m = get16(p + 2);
  read_six_bits(p + 4, f);
  for (int i = 0; i < 4; ++i) read_nibbles(p + 48 + 32 * i, 32, f.q + 64 * i);
  for (int i = 0; i < 256; ++i) f.q[i] |= uint8_t((p[16 + i % 32] >> i / 32 & 1) << 4);
}
void write_q5_k(const BlockFields& f, uint8_t* p) {
  put16(p, f.d), put16(p + 2, f.m);
  write_six_bits(f, p + 4);
  std::fill_n(p + 16, 32, uint8_t(0));
  for (int i = 0; i < 256; ++i) p[16 + i % 32] |= uint8_t((f.q[i] >> 4 & 1) << i / 32);
  for (int i = 0; i < 4; ++i) write_nibbles(f.q + 64 * i, 32, p + 48 + 32 * i);
}

void read_q6_k(const uint8_t* p, BlockFields& f) {
  f.d = get16(p + 208);
  std::memcpy(f.scale, p + 192, 16);
  for (int h = 0; h < 2; ++h) {
    read_nibbles(p + 64 * h, 64, f.q + 128 * h);
    read_pairs(p + 128 + 32 * h, 4, f.q + 128 * h);
  }
}
void write_q6_k(const BlockFields& f, uint8_t* p) {
  for (int h = 0; h < 2; ++h) {
    write_nibbles(f.q + 128 * h, 64, p + 64 * h);
    write_pairs(f.q + 128 * h, 4, p + 128 + 32 * h);
  }
  std::memcpy(p + 192, f.scale, 16);
  put16(p + 208, f.d);
}

void read_iq4_xs(const uint8_t* p, BlockFields& f) {
  f.d = get16(p);
  const int high = get16(p + 2);
  for (int i = 0; i < 8; ++i) {
    f.scale[i] = int8_t(((p[4 + i / 2] >> 4 * (i % 2) & 15) | (high >> 2 * i & 3) << 4) - 32);
    read_nibbles(p + 8 + 16 * i, 16, f.q + 32 * i);
  }
}
void write_iq4_xs(const BlockFields& f, uint8_t* p) {
  int high = 0;
  std::fill_n(p + 4, 4, uint8_t(0));
  for (int i = 0; i < 8; ++i) {
    const int s = f.scale[i] + 32;
    p[4 + i / 2] |= uint8_t((s & 15) << 4 * (i % 2));
    high |= (s >> 4 & 3) << 2 * i;
    write_nibbles(f.q + 32 * i, 16, p + 8 + 16 * i);
  }
  put16(p, f.d), put16(p + 2, uint16_t(high));
}

void read_mxfp4(const uint8_t* p, BlockFields& f) {
  f.d = uint16_t(p[0] < 2 ? 0x20 << p[0] : (p[0] - 1) << 7);  // 2^(p[0] - 128), as the table has twice the values
  read_nibbles(p + 1, 16, f.q);
}

}  // namespace blocks

Element element_from(const std::string& name) {
  std::string known;
  for (const ElementTraits& e : kElements) {
    if (name == e.name) return Element(&e - kElements);
    known += (known.empty() ? "" : ", ") + std::string(e.name);
  }
  throw std::invalid_argument("unknown type of tensor elements " + name + " (known: " + known + ")");
}

int64_t row_bytes(Element type, int64_t cols) {
  const ElementTraits& t = traits(type);
  if (cols % t.columns)
    throw std::invalid_argument("rows of " + std::to_string(cols) + " columns are no whole " + t.name + " blocks of " +
                                std::to_string(t.columns));
  return cols / t.columns * t.bytes;
}

// Products in the order of the reference, each rounded: d * scale, then * q, then the minimum.
void block_values(Element type, const BlockFields& f, float* out) {
  const ElementTraits& t = traits(type);
  const float d = type == Element::mxfp4 ? bf16_to_float(f.d) : half_to_float(f.d);
  const float m = t.has_min ? half_to_float(f.m) : 0.0f;
  const int columns = int(t.columns), part = t.part ? t.part : columns;
  const bool table = t.lookup != Lookup::none;
  for (int i = 0, k = 0; k < columns; ++i) {
    const float scale = t.part ? d * float(f.scale[i]) : d;
    const float minimum = t.part ? -(m * float(f.min[i])) : m;
    for (const int end = k + part; k < end; ++k) {
      const float x = scale * float(table ? values_of(t.lookup)[f.q[k]] : f.q[k] - t.offset);
      out[k] = t.has_min ? x + minimum : x;
    }
  }
}

void decode(Element type, const uint8_t* row, int64_t first, int64_t n, float* out) {
  const ElementTraits& t = traits(type);
  if (type == Element::f32) {
    std::memcpy(out, row + first * 4, size_t(n) * 4);
  } else if (t.plain()) {
    for (int64_t i = 0; i < n; ++i) {
      const uint16_t bits = get16(row + (first + i) * 2);
      out[i] = type == Element::bf16 ? bf16_to_float(bits) : half_to_float(bits);
    }
  } else {
    BlockFields fields;
    float values[kMostElements];
    for (int64_t done = 0; done < n;) {
      const int64_t at = first + done, inside = at % t.columns, count = std::min(t.columns - inside, n - done);
      t.read(row + at / t.columns * t.bytes, fields);
      block_values(type, fields, values);
      std::copy_n(values + inside, count, out + done);
      done += count;
    }
  }
}

}  // namespace paceline
