// Operations on one row: norms, rotary embedding, residuals, soft cap, arg max.
// Included by kernels.cpp.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels/vec.hpp"

namespace PACELINE_NAMESPACE {

void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
  f32x16 squares = splat(0.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const f32x16 v = load<f32x16>(x + i);
    squares = fma(v, v, squares);
  }
  const f32x16 inverse = splat(1.0f / std::sqrt(sum(squares) / float(n) + eps));
  for (int64_t i = 0; i < n; i += 16) {
    f32x16 v = load<f32x16>(x + i) * inverse;
    if (weight) v = v * load<f32x16>(weight + i);
    store(out + i, v);
  }
}

void add_scaled(float* x, const float* y, int64_t n, float scale) {
  for (int64_t i = 0; i < n; i += 16) store(x + i, (load<f32x16>(x + i) + load<f32x16>(y + i)) * splat(scale));
}

void axpy(float* y, const float* x, int64_t n, float a) {
  for (int64_t i = 0; i < n; i += 16) store(y + i, fma(load<f32x16>(x + i), splat(a), load<f32x16>(y + i)));
}

void rope(float* x, int64_t n, const float* cos, const float* sin, int64_t pairs) {
  float* y = x + n / 2;
  for (int64_t i = 0; i < pairs; ++i) {
    const float a = x[i], b = y[i];
    x[i] = a * cos[i] - b * sin[i];
    y[i] = b * cos[i] + a * sin[i];
  }
}

void softcap(float* x, int64_t n, float cap) {
  for (int64_t i = 0; i < n; i += 16) store(x + i, splat(cap) * tanh(load<f32x16>(x + i) / splat(cap)));
}

// The 16 values at x + i, those from n on replaced by a very small number.
inline f32x16 load_tail(const float* x, int64_t i, int64_t n) {
  if (i + 16 <= n) return load<f32x16>(x + i);
  float t[16];
  for (int64_t j = 0; j < 16; ++j) t[j] = i + j < n ? x[i + j] : -3e38f;
  return load<f32x16>(t);
}

int64_t arg_max(const float* x, int64_t n, float* probability) {
  constexpr int64_t kStretch = 1024;
  float best = -3e38f;
  int64_t stretch = 0;  // where the first of the largest is
  for (int64_t begin = 0; begin < n; begin += kStretch) {
    f32x16 top = splat(-3e38f);
    for (int64_t i = begin; i < std::min(begin + kStretch, n); i += 16) top = max(load_tail(x, i, n), top);
    const float largest = max_lane(top);
    if (largest > best) best = largest, stretch = begin;
  }
  if (probability) {
    f32x16 total = splat(0.0f);
    for (int64_t i = 0; i < n; i += 16) total = total + exp(load_tail(x, i, n) - splat(best));
    *probability = 1.0f / sum(total);
  }
  for (int64_t i = stretch; i < std::min(stretch + kStretch, n); ++i)
    if (x[i] == best) return i;
  return 0;
}

uint32_t checksum(const uint8_t* data, int64_t n) {
  u32x16 hash[8];  // eight chains hide the multiplication's latency
  for (auto& h : hash) h = fill<u32x16>(0x811c9dc5u);
  for (int64_t i = 0; i < n; i += 512)
    for (int j = 0; j < 8; ++j) {
      prefetch(data + i + 64 * j + 4096);
      hash[j] = (hash[j] + load<u32x16>(data + i + 64 * j)) * 0x9e3779b1u;
    }
  uint32_t total = uint32_t(n);
  for (const auto& h : hash) {
    uint32_t lanes[16];
    store(lanes, h);
    for (uint32_t lane : lanes) total = (total ^ lane) * 0x01000193u;
  }
  return total;
}

}  // namespace PACELINE_NAMESPACE
