// Attention of one batch row over the cache, for up to four query heads that share a K/V head.
//
// Scores are computed for blocks of sixteen keys at absolute positions, values are summed in ascending positions: the
// order depends on the row's position alone. Included by kernels.cpp.
#pragma once

#include "formats/cache_view.hpp"
#include "kernels/vec.hpp"

namespace PACELINE_NAMESPACE {

using paceline::CacheView;

template <class T>
inline void append_as(const CacheView& cache, int64_t head, int64_t position, const float* key, const float* value) {
  const int64_t at = position % cache.ring, dim = cache.head_dim;
  T* keys = reinterpret_cast<T*>(cache.key_head(head)) + at / 16 * 16 * dim + at % 16;
  T* values = reinterpret_cast<T*>(cache.value_head(head)) + at * dim;
  for (int64_t d = 0; d < dim; d += 16) {
    T rounded[16];
    narrow(rounded, load<f32x16>(key + d));
    for (int i = 0; i < 16; ++i) keys[(d + i) * 16] = rounded[i];
    narrow(values + d, load<f32x16>(value + d));
  }
}

void append(const CacheView& cache, int64_t head, int64_t position, const float* key, const float* value) {
  if (cache.bf16) append_as<uint16_t>(cache, head, position, key, value);
  else append_as<float>(cache, head, position, key, value);
}

// scores [heads][blocks * 16]: query . key for all keys of the blocks that hold first..last; the others at -3e38.
template <class T, int Heads>
inline void score(const CacheView& cache, int64_t head, const float* q, int64_t first, int64_t last, float* scores) {
  const int64_t dim = cache.head_dim, width = (last / 16 - first / 16 + 1) * 16;
  const T* keys = reinterpret_cast<const T*>(cache.key_head(head));
  for (int64_t block = first / 16; block <= last / 16; ++block) {
    const T* k = keys + block * 16 % cache.ring * dim;
    f32x16 even[Heads], odd[Heads];
    for (int h = 0; h < Heads; ++h) even[h] = odd[h] = splat(0.0f);
    for (int64_t d = 0; d < dim; d += 2, k += 32) {
      const f32x16 k0 = widen(k), k1 = widen(k + 16);
      for (int h = 0; h < Heads; ++h) {
        even[h] = fma(k0, splat(q[h * dim + d]), even[h]);
        odd[h] = fma(k1, splat(q[h * dim + d + 1]), odd[h]);
      }
    }
    for (int h = 0; h < Heads; ++h) store(scores + h * width + (block - first / 16) * 16, even[h] + odd[h]);
  }
  for (int h = 0; h < Heads; ++h) {
    for (int64_t i = 0; i < first % 16; ++i) scores[h * width + i] = -3e38f;
    for (int64_t i = width - 15 + last % 16; i < width; ++i) scores[h * width + i] = -3e38f;
  }
}

// Turn scores into weights that sum to one; excluded keys get exactly zero.
inline void softmax(float* scores, int64_t width) {
  f32x16 top = splat(-3e38f), total = splat(0.0f);
  for (int64_t i = 0; i < width; i += 16) top = max(load<f32x16>(scores + i), top);
  const f32x16 best = splat(max_lane(top));
  for (int64_t i = 0; i < width; i += 16) {
    const f32x16 x = load<f32x16>(scores + i) - best, e = exp(x);
    const f32x16 w = where_greater(x, splat(-80.0f), e, splat(0.0f));
    total = total + w;
    store(scores + i, w);
  }
  const f32x16 inverse = splat(1.0f / sum(total));
  for (int64_t i = 0; i < width; i += 16) store(scores + i, load<f32x16>(scores + i) * inverse);
}

// out [Heads][dim], columns d .. d + 16 Columns: the weighted sum of value rows first..last.
template <class T, int Heads, int Columns>
inline void mix(const CacheView& cache, const T* values, const float* weights, int64_t width, int64_t first,
                int64_t last, int64_t d, float* out) {
  f32x16 acc[Heads][Columns];
  for (int h = 0; h < Heads; ++h)
    for (int c = 0; c < Columns; ++c) acc[h][c] = splat(0.0f);
  for (int64_t position = first; position <= last;) {
    const int64_t at = position % cache.ring;
    const int64_t run = cache.ring - at < last - position + 1 ? cache.ring - at : last - position + 1;
    const T* v = values + at * cache.head_dim + d;
    const float* w = weights + position - first / 16 * 16;
    for (int64_t i = 0; i < run; ++i, v += cache.head_dim)
      for (int c = 0; c < Columns; ++c) {
        const f32x16 value = widen(v + 16 * c);
        for (int h = 0; h < Heads; ++h) acc[h][c] = fma(value, splat(w[h * width + i]), acc[h][c]);
      }
    position += run;
  }
  for (int h = 0; h < Heads; ++h)
    for (int c = 0; c < Columns; ++c) store(out + h * cache.head_dim + d + 16 * c, acc[h][c]);
}

template <class T, int Heads>
inline void attend_heads(const CacheView& cache, int64_t head, const float* q, int64_t first, int64_t last,
                         float* scores, float* out) {
  const int64_t width = (last / 16 - first / 16 + 1) * 16;
  score<T, Heads>(cache, head, q, first, last, scores);
  for (int h = 0; h < Heads; ++h) softmax(scores + h * width, width);
  const T* values = reinterpret_cast<const T*>(cache.value_head(head));
  int64_t d = 0;
  for (; d + 64 <= cache.head_dim; d += 64) mix<T, Heads, 4>(cache, values, scores, width, first, last, d, out);
  for (; d < cache.head_dim; d += 16) mix<T, Heads, 1>(cache, values, scores, width, first, last, d, out);
}

template <class T>
inline void attend_as(const CacheView& cache, int64_t head, const float* q, int heads, int64_t first, int64_t last,
                      float* scratch, float* out) {
  switch (heads) {
    case 1: return attend_heads<T, 1>(cache, head, q, first, last, scratch, out);
    case 2: return attend_heads<T, 2>(cache, head, q, first, last, scratch, out);
    case 3: return attend_heads<T, 3>(cache, head, q, first, last, scratch, out);
    case 4: return attend_heads<T, 4>(cache, head, q, first, last, scratch, out);
  }
}

void attend(const CacheView& cache, int64_t head, const float* q, int heads, int64_t first, int64_t last,
            float* scratch, float* out) {
  if (cache.bf16) attend_as<uint16_t>(cache, head, q, heads, first, last, scratch, out);
  else attend_as<float>(cache, head, q, heads, first, last, scratch, out);
}

}  // namespace PACELINE_NAMESPACE
