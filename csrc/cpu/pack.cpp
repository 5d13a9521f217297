// Packing checkpoint rows into panels, and back. Runs once a load; the slow twin is paceline/quant/blocks.py.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "formats.hpp"

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

void load_row(Source type, const void* source, int64_t row, int64_t cols, float* out) {
  if (type == Source::f32) {
    std::memcpy(out, static_cast<const float*>(source) + row * cols, size_t(cols) * 4);
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(source) + row * cols;
  for (int64_t i = 0; i < cols; ++i) out[i] = type == Source::bf16 ? bf16_to_float(p[i]) : half_to_float(p[i]);
}

// GGUF's Q8_0: scale = max |x| / 127, q = round(x / scale).
void quantise_q8(const float* x, uint16_t& scale, uint8_t* q) {
  float top = 0;
  for (int i = 0; i < kGroup; ++i) top = std::max(top, std::fabs(x[i]));
  const float d = top / 127.0f, inverse = d != 0 ? 1.0f / d : 0.0f;
  scale = float_to_half(d);
  for (int i = 0; i < kGroup; ++i) q[i] = uint8_t(int(std::round(x[i] * inverse)) + 128);
}

// GGUF's Q4_0: the value of largest magnitude becomes -8 times the scale, q = floor(x / scale + 8.5), at most 15.
void quantise_q4(const float* x, uint16_t& scale, uint8_t* q) {
  float top = 0, extreme = 0;
  for (int i = 0; i < kGroup; ++i)
    if (std::fabs(x[i]) > top) top = std::fabs(x[i]), extreme = x[i];
  const float d = extreme / -8.0f, inverse = d != 0 ? 1.0f / d : 0.0f;
  scale = float_to_half(d);
  for (int i = 0; i < kGroup; ++i) q[i] = uint8_t(std::min(15, int(x[i] * inverse + 8.5f)));
}

// Write one row (zero-padded to padded_cols) into lane `lane` of its panel.
void pack_row(Format format, uint8_t* panel, int64_t padded_cols, int lane, const float* x) {
  if (format == Format::f32) {
    float* p = reinterpret_cast<float*>(panel);
    for (int64_t k = 0; k < padded_cols; ++k) p[k * kPanel + lane] = x[k];
    return;
  }
  if (format == Format::bf16) {
    uint16_t* p = reinterpret_cast<uint16_t*>(panel);
    for (int64_t k = 0; k < padded_cols; ++k) p[(k / 2 * kPanel + lane) * 2 + k % 2] = float_to_bf16(x[k]);
    return;
  }
  uint8_t q[kGroup];
  for (int64_t g = 0; g < padded_cols / kGroup; ++g) {
    uint8_t* block = panel + g / 2 * block_bytes(format);
    uint16_t& scale = reinterpret_cast<uint16_t*>(block)[g % 2 * kPanel + lane];
    uint8_t* data = block + kScaleBytes + g % 2 * (block_bytes(format) - kScaleBytes) / 2 + lane * 4;
    if (format == Format::q8) {
      quantise_q8(x + g * kGroup, scale, q);
      for (int i = 0; i < kGroup; i += 4) std::memcpy(data + i / 4 * kPanel * 4, q + i, 4);
    } else {
      quantise_q4(x + g * kGroup, scale, q);
      for (int i = 0; i < kGroup; i += 8)
        for (int j = 0; j < 4; ++j) data[i / 8 * kPanel * 4 + j] = uint8_t(q[i + j] | q[i + 4 + j] << 4);
    }
  }
}

}  // namespace

void pack_rows(const MatrixView& shape, uint8_t* data, Source type, const void* source, int64_t first, int64_t count) {
  std::vector<float> x(size_t(shape.padded_cols), 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    load_row(type, source, i, shape.cols, x.data());
    const int64_t row = first + i;
    pack_row(shape.format, data + row / kPanel * shape.stride, shape.padded_cols, int(row % kPanel), x.data());
  }
}

void unpack_row(const MatrixView& m, int64_t row, float* out) {
  const uint8_t* panel = m.panel(row / kPanel);
  const int64_t lane = row % kPanel;
  for (int64_t k = 0; k < m.cols; ++k) {
    const uint8_t* block = panel + k / kBlock * block_bytes(m.format);  // of a quantised format
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(block);
    const uint8_t* data = block + kScaleBytes;
    const int64_t group = k / kGroup % 2 * kPanel + lane, i = k % kBlock;
    switch (m.format) {
      case Format::f32: out[k] = reinterpret_cast<const float*>(panel)[k * kPanel + lane]; break;
      case Format::bf16:
        out[k] = bf16_to_float(reinterpret_cast<const uint16_t*>(panel)[(k / 2 * kPanel + lane) * 2 + k % 2]);
        break;
      case Format::q8:
        out[k] = half_to_float(scales[group]) * float(int(data[(i / 4 * kPanel + lane) * 4 + i % 4]) - 128);
        break;
      case Format::q4: {
        const uint8_t pair = data[(i / 8 * kPanel + lane) * 4 + i % 4];
        out[k] = half_to_float(scales[group]) * float(int(i % 8 < 4 ? pair & 15 : pair >> 4) - 8);
        break;
      }
    }
  }
}

}  // namespace paceline
