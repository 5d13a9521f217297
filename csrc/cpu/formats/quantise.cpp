// Rounding to the nearest number of a grid that the extreme values of a group span.
#include "formats/quantise.hpp"

#include <algorithm>
#include <cmath>

namespace paceline {
namespace {

constexpr int kGroup = 32;

// The whole number in x, 0 for NaN, infinities and all that is far beyond a byte: damaged weights.
int whole(float x) { return std::fabs(x) < 1024 ? int(x) : 0; }

float inverse(float scale) { return scale != 0 ? 1.0f / scale : 0.0f; }

float extreme(const float* x, int n) {  // the value of largest magnitude
  float top = 0, found = 0;
  for (int i = 0; i < n; ++i)
    if (std::fabs(x[i]) > top) top = std::fabs(x[i]), found = x[i];
  return found;
}

// Numbers 0 .. 2 offset - 1 of a grid on which the extreme value is -offset scales; returns the scale.
float quantise_symmetric(const float* x, int n, int offset, uint8_t* q) {
  const float scale = extreme(x, n) / float(-offset), factor = inverse(scale);
  for (int i = 0; i < n; ++i)
    q[i] = uint8_t(std::clamp(whole(x[i] * factor + (float(offset) + 0.5f)), 0, 2 * offset - 1));
  return scale;
}

// Numbers 0 .. most of a grid from the smallest value to the largest.
void quantise_range(const float* x, int n, float low, float scale, int most, uint8_t* q) {
  const float factor = inverse(scale);
  for (int i = 0; i < n; ++i) q[i] = uint8_t(std::clamp(whole((x[i] - low) * factor + 0.5f), 0, most));
}

// The nearest of the values times a scale.
void quantise_table(const float* x, int n, float scale, uint8_t* q) {
  const float factor = inverse(scale);
  for (int i = 0; i < n; ++i) {
    const float wanted = x[i] * factor;
    int best = 0;
    for (int j = 1; j < 16; ++j)
      if (std::fabs(wanted - float(kIq4Values[j])) < std::fabs(wanted - float(kIq4Values[best]))) best = j;
    q[i] = uint8_t(best);
  }
}

// Q8_0: the largest magnitude is 127 scales, halves are rounded away from zero.
void quantise_bytes(const float* x, BlockFields& f) {
  const float scale = std::fabs(extreme(x, kGroup)) / 127.0f, factor = inverse(scale);
  for (int i = 0; i < kGroup; ++i) f.q[i] = uint8_t(std::clamp(whole(std::round(x[i] * factor)), -127, 127) + 128);
  f.d = float_to_half(scale);
}

// Q4_1, Q5_1.
void quantise_with_minimum(const float* x, int most, BlockFields& f) {
  const auto [low, high] = std::minmax_element(x, x + kGroup);
  const float scale = (*high - *low) / float(most);
  quantise_range(x, kGroup, *low, scale, most, f.q);
  f.d = float_to_half(scale), f.m = float_to_half(*low);
}

// Q4_K, Q5_K: scales and minima of groups are numbers 0 .. 63 of d and m.
void quantise_with_minima(const float* x, int most, BlockFields& f) {
  float scale[8], minimum[8];
  for (int g = 0; g < 8; ++g) {
    const auto [low, high] = std::minmax_element(x + g * kGroup, x + (g + 1) * kGroup);
    minimum[g] = -std::min(*low, 0.0f);
    scale[g] = (std::max(*high, 0.0f) + minimum[g]) / float(most);
  }
  const float d = *std::max_element(scale, scale + 8) / 63.0f, m = *std::max_element(minimum, minimum + 8) / 63.0f;
  f.d = float_to_half(d), f.m = float_to_half(m);
  for (int g = 0; g < 8; ++g) {
    f.scale[g] = int8_t(std::clamp(whole(scale[g] * inverse(d) + 0.5f), 0, 63));
    f.min[g] = int8_t(std::clamp(whole(minimum[g] * inverse(m) + 0.5f), 0, 63));
    const float low = -half_to_float(f.m) * float(f.min[g]);
    quantise_range(x + g * kGroup, kGroup, low, half_to_float(f.d) * float(f.scale[g]), most, f.q + g * kGroup);
  }
}

// Q6_K (parts of 16) and IQ4_XS (of 32): scales of parts are signed numbers of d, at most `most`.
void quantise_parts(Element type, const float* x, int most, BlockFields& f) {
  const int part = traits(type).part, parts = kMostElements / part, offset = type == Element::q6_k ? 32 : 127;
  float scale[16];
  for (int p = 0; p < parts; ++p) scale[p] = extreme(x + p * part, part) / float(-offset);
  const float d = extreme(scale, parts) / float(-most);
  f.d = float_to_half(d);
  for (int p = 0; p < parts; ++p) {
    const float* from = x + p * part;
    f.scale[p] = int8_t(std::clamp(whole(std::round(scale[p] * inverse(d))), -most, most - 1));
    const float s = half_to_float(f.d) * float(f.scale[p]);
    if (type == Element::q6_k) quantise_range(from, part, -32 * s, s, 63, f.q + p * part);
    else quantise_table(from, part, s, f.q + p * part);
  }
}

void quantise_block(Element type, const float* x, BlockFields& f) {
  switch (type) {
    case Element::q8_0: return quantise_bytes(x, f);
    case Element::q4_0: f.d = float_to_half(quantise_symmetric(x, kGroup, 8, f.q)); return;
    case Element::q5_0: f.d = float_to_half(quantise_symmetric(x, kGroup, 16, f.q)); return;
    case Element::q4_1: return quantise_with_minimum(x, 15, f);
    case Element::q5_1: return quantise_with_minimum(x, 31, f);
    case Element::q4_k: return quantise_with_minima(x, 15, f);
    case Element::q5_k: return quantise_with_minima(x, 31, f);
    case Element::q6_k: return quantise_parts(type, x, 128, f);
    case Element::iq4_xs: return quantise_parts(type, x, 32, f);
    case Element::iq4_nl:
      f.d = float_to_half(extreme(x, kGroup) / -127.0f);
      return quantise_table(x, kGroup, half_to_float(f.d), f.q);
    default: return;
  }
}

}  // namespace

void quantise(Element type, const float* x, int64_t cols, uint8_t* blocks) {
  const ElementTraits& t = traits(type);
  BlockFields fields;
  for (int64_t k = 0; k < cols; k += t.columns, blocks += t.bytes) {
    quantise_block(type, x + k, fields);
    t.write(fields, blocks);
  }
}

}  // namespace paceline
