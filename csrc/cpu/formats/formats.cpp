// Packing checkpoint rows into panels, and back. Runs once per load; the NumPy reference is tests/fixtures/reference_formats.py.
#include "formats/formats.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

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
    const float f = std::ldexp(float(mantissa), -24);
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

uint64_t next_random(uint64_t& state) {  // xorshift64
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}

float next_uniform(uint64_t& state, float spread) {
  return (float(next_random(state) >> 40) / float(1 << 23) - 1.0f) * spread;
}

// Plain formats: four bytes of a row side by side, one float or two bfloat16.
template <class T, T (*Narrow)(float), float (*Widen)(T)>
struct Plain {
  static constexpr int kCols = 32, kPair = 4 / sizeof(T);

  static int at(int k, int lane) { return (k / kPair * kPanel + lane) * kPair + k % kPair; }
  static void pack(const float* x, int lane, uint8_t* block) {
    for (int k = 0; k < kCols; ++k) reinterpret_cast<T*>(block)[at(k, lane)] = Narrow(x[k]);
  }
  static void unpack(const uint8_t* block, int lane, float* out) {
    for (int k = 0; k < kCols; ++k) out[k] = Widen(reinterpret_cast<const T*>(block)[at(k, lane)]);
  }
  static void randomise(uint8_t* block, float spread, uint64_t& state) {
    for (int i = 0; i < kCols * kPanel; ++i) reinterpret_cast<T*>(block)[i] = Narrow(next_uniform(state, spread));
  }
};

float same(float x) { return x; }

// Unsigned numbers of a group of columns, four of a row side by side: one a byte, or two (k and k + 4).
struct Bytes {
  static constexpr int kBits = 8;
  static void store(const uint8_t* q, int lane, uint8_t* group) {
    for (int k = 0; k < kGroup; k += 4) std::memcpy(group + (k / 4 * kPanel + lane) * 4, q + k, 4);
  }
  static void load(const uint8_t* group, int lane, uint8_t* q) {
    for (int k = 0; k < kGroup; k += 4) std::memcpy(q + k, group + (k / 4 * kPanel + lane) * 4, 4);
  }
};

struct Nibbles {
  static constexpr int kBits = 4;
  static void store(const uint8_t* q, int lane, uint8_t* group) {
    for (int k = 0; k < kGroup; k += 8)
      for (int j = 0; j < 4; ++j) group[(k / 8 * kPanel + lane) * 4 + j] = uint8_t(q[k + j] | q[k + 4 + j] << 4);
  }
  static void load(const uint8_t* group, int lane, uint8_t* q) {
    for (int k = 0; k < kGroup; k += 8)
      for (int j = 0; j < 4; ++j) {
        const uint8_t pair = group[(k / 8 * kPanel + lane) * 4 + j];
        q[k + j] = pair & 15, q[k + 4 + j] = pair >> 4;
      }
  }
};

// Two groups with fp16 scales; `Quantise` turns a group into a scale and unsigned numbers q + offset.
template <class Layout, Format F, float (*Quantise)(const float* x, uint8_t* q)>
struct Quantised {
  static constexpr int kGroupBytes = kGroup * kPanel * Layout::kBits / 8;
  static_assert(traits(F).block_cols == 2 * kGroup && traits(F).block_bytes == quantised_block_bytes(Layout::kBits));

  static void pack(const float* x, int lane, uint8_t* block) {
    for (int g = 0; g < 2; ++g) {
      uint8_t q[kGroup];
      reinterpret_cast<uint16_t*>(block)[g * kPanel + lane] = float_to_half(Quantise(x + g * kGroup, q));
      Layout::store(q, lane, block + kScaleBytes + g * kGroupBytes);
    }
  }
  static void unpack(const uint8_t* block, int lane, float* out) {
    for (int g = 0; g < 2; ++g) {
      uint8_t q[kGroup];
      const float scale = half_to_float(reinterpret_cast<const uint16_t*>(block)[g * kPanel + lane]);
      Layout::load(block + kScaleBytes + g * kGroupBytes, lane, q);
      for (int k = 0; k < kGroup; ++k) out[g * kGroup + k] = scale * float(int(q[k]) - traits(F).act.offset);
    }
  }
  static void randomise(uint8_t* block, float spread, uint64_t& state) {
    for (int64_t i = 0; i < traits(F).block_bytes; i += 8) {
      const uint64_t bits = next_random(state);
      std::memcpy(block + i, &bits, 8);
    }
    const uint16_t scale = float_to_half(spread / float(traits(F).act.offset / 2));
    for (int64_t i = 0; i < kScaleBytes; i += 2) std::memcpy(block + i, &scale, 2);
  }
};

// The whole number in x, 0 for NaN, infinities and all that is far beyond a byte: damaged weights.
int whole(float x) { return std::fabs(x) < 1024 ? int(x) : 0; }

// GGUF's Q8_0: scale = max |x| / 127, q = round(x / scale).
float quantise_q8_0(const float* x, uint8_t* q) {
  float top = 0;
  for (int i = 0; i < kGroup; ++i) top = std::max(top, std::fabs(x[i]));
  const float scale = top / 127.0f, inverse = scale != 0 ? 1.0f / scale : 0.0f;
  for (int i = 0; i < kGroup; ++i) q[i] = uint8_t(whole(std::round(x[i] * inverse)) + 128);
  return scale;
}

// GGUF's Q4_0: the value of largest magnitude becomes -8 times the scale, q = floor(x / scale + 8.5), at most 15.
float quantise_q4_0(const float* x, uint8_t* q) {
  float top = 0, extreme = 0;
  for (int i = 0; i < kGroup; ++i)
    if (std::fabs(x[i]) > top) top = std::fabs(x[i]), extreme = x[i];
  const float scale = extreme / -8.0f, inverse = scale != 0 ? 1.0f / scale : 0.0f;
  for (int i = 0; i < kGroup; ++i) q[i] = uint8_t(std::min(15, whole(x[i] * inverse + 8.5f)));
  return scale;
}

template <class C>
constexpr BlockCodec codec = {C::pack, C::unpack, C::randomise};

void load_row(Element type, const void* source, int64_t row, int64_t cols, float* out) {
  const uint8_t* p = static_cast<const uint8_t*>(source) + row * cols * (type == Element::f32 ? 4 : 2);
  if (type == Element::f32) {
    std::memcpy(out, p, size_t(cols) * 4);
    return;
  }
  for (int64_t i = 0; i < cols; ++i) {
    uint16_t bits;  // rows of a file may lie at odd addresses
    std::memcpy(&bits, p + 2 * i, 2);
    out[i] = type == Element::bf16 ? bf16_to_float(bits) : half_to_float(bits);
  }
}

}  // namespace

const BlockCodec f32_codec = codec<Plain<float, same, same>>;
const BlockCodec bf16_codec = codec<Plain<uint16_t, float_to_bf16, bf16_to_float>>;
const BlockCodec q8_0_codec = codec<Quantised<Bytes, Format::q8_0, quantise_q8_0>>;
const BlockCodec q4_0_codec = codec<Quantised<Nibbles, Format::q4_0, quantise_q4_0>>;

Format format_from(const std::string& name) {
  std::string known;
  for (int i = 0; i < kFormatCount; ++i) {
    if (name == kFormats[i].name) return Format(i);
    known += (i ? ", " : "") + std::string(kFormats[i].name);
  }
  throw std::invalid_argument("unknown weight format " + name + " (known: " + known + ")");
}

void throw_misfit(const MatrixView& w, const ActView& act) {
  throw std::invalid_argument("activations of " + std::to_string(act.padded_cols) +
                              " columns, packed for another weight format or width than those of a " +
                              traits(w.format).name + " matrix of " + std::to_string(w.padded_cols));
}

void pack_rows(const MatrixView& shape, uint8_t* data, Element type, const void* source, int64_t first, int64_t count) {
  const FormatTraits& format = traits(shape.format);
  std::vector<float> x(size_t(shape.padded_cols), 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    load_row(type, source, i, shape.cols, x.data());
    const int64_t row = first + i;
    uint8_t* block = data + row / kPanel * shape.stride;
    for (int64_t k = 0; k < shape.padded_cols; k += format.block_cols, block += format.block_bytes)
      format.codec->pack(&x[size_t(k)], int(row % kPanel), block);
  }
}

void unpack_row(const MatrixView& m, int64_t row, float* out) {
  const FormatTraits& format = traits(m.format);
  const uint8_t* block = m.panel(row / kPanel);
  float values[kMaxBlock];
  for (int64_t k = 0; k < m.cols; k += format.block_cols, block += format.block_bytes) {
    format.codec->unpack(block, int(row % kPanel), values);
    std::copy_n(values, std::min(format.block_cols, m.cols - k), out + k);
  }
}

void randomise(const MatrixView& shape, uint8_t* data, uint64_t seed) {
  const FormatTraits& format = traits(shape.format);
  uint64_t state = seed * 0x9e3779b97f4a7c15u + 1;
  for (uint8_t* block = data; block < data + shape.bytes(); block += format.block_bytes)
    format.codec->randomise(block, 1.0f / std::sqrt(float(shape.cols)), state);
}

}  // namespace paceline
