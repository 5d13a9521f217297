// Attention of a tile of queries over the cache: rows of one slot, and the query heads that share a K/V head.
//
// Each block of keys and values is read and widened once for all queries of a tile, which meet it kQueries at a time: the
// sums of so many stay in registers.
// A row's own sums have one order, whatever the tile: a score has a chain of fused multiply-adds over the even columns and
// one over the odd ones; the softmax goes over the row's own blocks of sixteen positions; values have one chain in
// ascending positions. Positions that a row does not see take no part, not even as zeros. Included by kernels.cpp.
#pragma once

#include <algorithm>
#include <cmath>

#include "formats/cache_view.hpp"
#include "kernels/operands.hpp"
#include "kernels/vec.hpp"

namespace PACELINE_NAMESPACE {

using paceline::CacheFormat;
using paceline::CacheView;
using paceline::kBlockRows;
using paceline::kCacheGroup;
using paceline::kGroupBytes;
using paceline::kScaleBytes;
using paceline::kStretchRows;
using paceline::kTileQueries;
using paceline::QueryTile;

// Queries, and blocks of keys or panels of values, whose sums of sixteen lanes fit into registers.
constexpr int kQueries = kLanes == 16 ? 8 : 6, kAtOnce = kLanes == 16 ? 2 : 1;

inline int64_t groups_of(int64_t queries) { return ceil_div(queries, kQueries); }

// f<count>(first) for first .. first + count of [begin, end), kAtOnce or one at once.
template <class F>
PACELINE_INLINE inline void each_few(int64_t begin, int64_t end, F f) {
  for (; begin + kAtOnce <= end; begin += kAtOnce) f.template operator()<kAtOnce>(begin);
  for (; begin < end; ++begin) f.template operator()<1>(begin);
}

// f<count>(first) for queries first .. first + count of [0, n), in groups of equal size.
template <class F>
PACELINE_INLINE inline void each_group(int64_t n, F f) {
  const int64_t groups = groups_of(n);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = n * g / groups;
    with_count<kQueries>(int(n * (g + 1) / groups - first), [&]<int N>() { f.template operator()<N>(first); });
  }
}

// sums[p][j] += a[j][i] * row i of rows[p], for i = 0, Step, 2 Step ... below n.
template <int Step, int P, int N>
PACELINE_INLINE inline void accumulate(f32x16 (&sums)[P][N], const float* const (&a)[N], const float* const (&rows)[P],
                                       int64_t n, Ahead& ahead) {
  for (int64_t i = 0; i < n; i += Step) {
    ahead.fetch();
    f32x16 row[P];
    unrolled<P>([&]<int p>() PACELINE_INLINE { row[p] = load<f32x16>(rows[p] + i * 16); });
    unrolled<N>([&]<int J>() PACELINE_INLINE {
      const f32x16 factor = splat(a[J][i]);
      unrolled<P>([&]<int p>() PACELINE_INLINE { sums[p][J] = fma(row[p], factor, sums[p][J]); });
    });
  }
}

// -- the cache's formats ------------------------------------------------------------------------------------------------

template <class T>
inline void append_plain(uint8_t* key_block, uint8_t* value_block, int64_t dim, int64_t lane, const float* key,
                         const float* value) {
  T *keys = reinterpret_cast<T*>(key_block), *values = reinterpret_cast<T*>(value_block);
  for (int64_t d = 0; d < dim; d += 16) {
    T rounded[16];
    narrow(rounded, load<f32x16>(key + d));
    for (int i = 0; i < 16; ++i) keys[(d + i) * 16 + lane] = rounded[i];
    narrow(values + d * 16 + lane * 16, load<f32x16>(value + d));
  }
}

inline float scale_value(const uint8_t* scales, int64_t lane) {
  uint16_t half;
  std::memcpy(&half, scales + 2 * lane, 2);
  const uint32_t word = uint32_t(half) << 16;
  float scale;
  std::memcpy(&scale, &word, 4);
  return scale;
}

// Numbers of up to 32 columns, by a scale that is the first bfloat16 not below the largest magnitude / 127. Returns it.
inline uint16_t quantise_group(const float* x, int64_t n, int8_t* numbers) {
  float top = 0;
  for (int64_t i = 0; i < n; ++i) top = std::max(top, std::fabs(x[i]));  // a NaN is passed over
  top = std::min(top, 3e38f) / 127;
  uint32_t word;
  std::memcpy(&word, &top, 4);
  word = (word + 0xffff) & 0xffff0000;
  float scale;
  std::memcpy(&scale, &word, 4);
  const f32x16 inverse = splat(scale > 1e-30f ? 1 / scale : 0.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const f32x16 v = max(load<f32x16>(x + i) * inverse, splat(-127.0f));  // a NaN becomes -127
    store_bytes(numbers + i, convert<i32x16>(round_even(where_greater(v, splat(127.0f), splat(127.0f), v))));
  }
  return uint16_t(word >> 16);
}

inline void append_q8(uint8_t* keys, uint8_t* values, int64_t dim, int64_t lane, const float* key, const float* value) {
  for (int64_t d = 0; d < dim; d += kCacheGroup, keys += kGroupBytes, values += kGroupBytes) {
    const int64_t n = std::min(kCacheGroup, dim - d);
    int8_t numbers[kCacheGroup];
    uint16_t scale = quantise_group(key + d, n, numbers);
    std::memcpy(keys + 2 * lane, &scale, 2);
    for (int64_t i = 0; i < n; ++i) keys[kScaleBytes + i * 16 + lane] = uint8_t(numbers[i]);
    scale = quantise_group(value + d, n, numbers);
    std::memcpy(values + 2 * lane, &scale, 2);
    for (int64_t i = 0; i < n; i += 16) std::memcpy(values + kScaleBytes + i * 16 + lane * 16, numbers + i, 16);
  }
}

void append(const CacheView& cache, int64_t head, int64_t position, const float* key, const float* value) {
  uint8_t *keys = cache.key_block(head, position), *values = cache.value_block(head, position);
  const int64_t lane = position % kBlockRows;
  switch (cache.format) {
    case CacheFormat::f32: return append_plain<float>(keys, values, cache.head_dim, lane, key, value);
    case CacheFormat::bf16: return append_plain<uint16_t>(keys, values, cache.head_dim, lane, key, value);
    case CacheFormat::q8: return append_q8(keys, values, cache.head_dim, lane, key, value);
  }
}

inline f32x16 widen_numbers(const uint8_t* p) {
  return convert<f32x16>(widen_bytes(reinterpret_cast<const int8_t*>(p)));
}

// Columns [begin, end) of a block's keys as floats [column - begin][16], in `out` unless they are floats; begin is the first
// of a group. A q8 number times its scale is exact.
inline const float* widen_keys(const CacheView& cache, const uint8_t* block, int64_t begin, int64_t end, float* out) {
  if (cache.format == CacheFormat::f32) return reinterpret_cast<const float*>(block) + begin * 16;
  if (cache.format == CacheFormat::bf16) {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(block) + begin * 16;
    for (int64_t i = 0; i < (end - begin) * 16; i += 16) store(out + i, widen(halves + i));
    return out;
  }
  block += begin / kCacheGroup * kGroupBytes;
  for (int64_t d = begin; d < end; d += kCacheGroup, block += kGroupBytes) {
    const f32x16 scales = widen(reinterpret_cast<const uint16_t*>(block));
    float* const to = out + (d - begin) * 16;
    const int64_t n = std::min(kCacheGroup, end - d);
    for (int64_t i = 0; i < n; ++i) store(to + i * 16, widen_numbers(block + kScaleBytes + i * 16) * scales);
  }
  return out;
}

// Panels [begin, end) of a block's values as floats [panel - begin][16][16], likewise.
inline const float* widen_values(const CacheView& cache, const uint8_t* block, int64_t begin, int64_t end, float* out) {
  if (cache.format == CacheFormat::f32) return reinterpret_cast<const float*>(block) + begin * 256;
  if (cache.format == CacheFormat::bf16) {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(block) + begin * 256;
    for (int64_t i = 0; i < (end - begin) * 256; i += 16) store(out + i, widen(halves + i));
    return out;
  }
  for (int64_t panel = begin; panel < end; ++panel) {
    const uint8_t* scales = block + panel / 2 * kGroupBytes;
    const uint8_t* numbers = scales + kScaleBytes + panel % 2 * 256;
    float* to = out + (panel - begin) * 256;
    for (int64_t i = 0; i < 16; ++i)
      store(to + i * 16, widen_numbers(numbers + i * 16) * splat(scale_value(scales, i)));
  }
  return out;
}

// -- scores -------------------------------------------------------------------------------------------------------------

constexpr int64_t kScoreColumns = 128;  // of a block's keys, which stay in the first cache while all queries meet them

// sums [blocks][kTileQueries][2][16], of even and of odd columns: goes on with the chains over columns [low, high), the
// first of `keys`.
template <int P, int N>
inline void score_columns(const float* const* queries, const float* const (&keys)[P], int64_t low, int64_t high,
                          float* sums, Ahead& ahead) {
  for (int64_t parity = 0; parity < 2; ++parity) {
    f32x16 sum[P][N];
    const float *at[N], *rows[P];
    const auto place = [=](int p, int j) PACELINE_INLINE { return sums + ((p * kTileQueries + j) * 2 + parity) * 16; };
    unrolled<N>([&]<int J>() PACELINE_INLINE { at[J] = queries[J] + low + parity; });
    unrolled<P>([&]<int p>() PACELINE_INLINE {
      rows[p] = keys[p] + parity * 16;
      unrolled<N>([&]<int J>() PACELINE_INLINE { sum[p][J] = load<f32x16>(place(p, J)); });
    });
    accumulate<2>(sum, at, rows, high - low, ahead);
    unrolled<P>([&]<int p>()
                    PACELINE_INLINE { unrolled<N>([&]<int J>() PACELINE_INLINE { store(place(p, J), sum[p][J]); }); });
  }
}

void score(const CacheView& cache, int64_t head, const QueryTile& tile, int64_t begin, int64_t end, float* scratch) {
  const int64_t n = tile.queries(), dim = cache.head_dim;
  const float* queries[kTileQueries];
  alignas(64) float sums[kAtOnce * kTileQueries * 32];
  for (int64_t j = 0; j < n; ++j) queries[j] = tile.query(j, dim);
  const auto keys_of = [&](int64_t block) { return cache.key_block(head, tile.begin + block * kBlockRows); };
  each_few(begin, end, [&]<int P>(int64_t block) {
    Ahead ahead{keys_of(std::min(block + P, end - 1)),
                ceil_div(P * CacheView::block_bytes(cache.format, dim), dim * groups_of(n))};
    for (int p = 0; p < P; ++p) std::fill_n(sums + p * kTileQueries * 32, n * 32, 0.0f);
    for (int64_t d = 0; d < dim; d += kScoreColumns) {
      const int64_t stop = std::min(d + kScoreColumns, dim);
      const float* keys[P];
      for (int p = 0; p < P; ++p)
        keys[p] = widen_keys(cache, keys_of(block + p), d, stop, scratch + p * (stop - d) * 16);
      each_group(n, [&]<int N>(int64_t j) { score_columns<P, N>(queries + j, keys, d, stop, sums + j * 32, ahead); });
    }
    for (int p = 0; p < P; ++p)
      for (int64_t j = 0; j < n; ++j) {
        const float* sum = sums + (p * kTileQueries + j) * 32;
        store(tile.scores + j * tile.width() + (block + p) * kBlockRows, load<f32x16>(sum) + load<f32x16>(sum + 16));
      }
  });
}

// -- softmax ------------------------------------------------------------------------------------------------------------

// Scores of whole blocks become weights that sum to one; at -3e38 exactly zero.
inline void softmax_row(float* scores, int64_t width) {
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

void softmax(const QueryTile& tile, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) {
    const auto [first, last] = tile.spans[j / tile.heads];
    const int64_t low = first / kBlockRows * kBlockRows, high = (last / kBlockRows + 1) * kBlockRows;
    float* scores = tile.scores + j * tile.width() - tile.begin;
    for (int64_t p = low; p < first; ++p) scores[p] = -3e38f;
    for (int64_t p = last + 1; p < high; ++p) scores[p] = -3e38f;
    softmax_row(scores + low, high - low);
  }
}

// -- values -------------------------------------------------------------------------------------------------------------

// Panels of the values of up to kStretchRows positions, from a multiple of 16 on.
struct ValueStretch {
  const CacheView& cache;
  const float* blocks[kStretchRows / kBlockRows];  // panel `begin` of each block
  int64_t first, stop, begin, end;                 // positions; panels
  const uint8_t* next[kStretchRows / kBlockRows];  // blocks of the next stretch
};

// out[j] += weights[j] times the values of positions low .. high - 1 of the stretch, for queries j and P panels. Fetches
// from offset `ahead` on of the next blocks, `step` bytes a position.
template <int P, int N>
inline void mix_panels(const ValueStretch& values, int64_t panel, int64_t low, int64_t high,
                       const float* const* weights, float* const* out, int64_t ahead, int64_t step) {
  f32x16 sums[P][N];
  unrolled<P>([&]<int p>() PACELINE_INLINE {
    unrolled<N>([&]<int J>() PACELINE_INLINE { sums[p][J] = load<f32x16>(out[J] + (panel + p) * 16); });
  });
  for (int64_t at = low; at < high;) {
    const int64_t block = (at - values.first) / kBlockRows, lane = at % kBlockRows;
    const int64_t n = std::min(high - at, kBlockRows - lane);
    const float *w[N], *rows[P];
    unrolled<N>([&]<int J>() PACELINE_INLINE { w[J] = weights[J] + at; });
    unrolled<P>([&]<int p>()
                    PACELINE_INLINE { rows[p] = values.blocks[block] + (panel + p - values.begin) * 256 + lane * 16; });
    Ahead next{values.next[block] + ahead + lane * step, step};
    accumulate<1>(sums, w, rows, n, next);
    at += n;
  }
  unrolled<P>([&]<int p>() PACELINE_INLINE {
    unrolled<N>([&]<int J>() PACELINE_INLINE { store(out[J] + (panel + p) * 16, sums[p][J]); });
  });
}

inline void mix_queries(const ValueStretch& values, int64_t low, int64_t high, const float* const* weights,
                        float* const* out, int64_t n) {
  if (low >= high) return;
  const int64_t dim = values.cache.head_dim, bytes = CacheView::block_bytes(values.cache.format, dim) * 16 / dim;
  each_few(values.begin, values.end, [&]<int P>(int64_t panel) {
    const int64_t step = ceil_div(P * bytes, kBlockRows * groups_of(n));  // queries share the panels of the next blocks
    each_group(n, [&]<int N>(int64_t j) {
      mix_panels<P, N>(values, panel, low, high, weights + j, out + j, panel * bytes + P * bytes * j / n, step);
    });
  });
}

// Positions that all rows see go to all queries at once, those at the ends of a row's span to its own queries.
inline void mix_stretch(const ValueStretch& values, const QueryTile& tile, const float* const* weights,
                        float* const* out) {
  int64_t low = values.first, high = values.stop;
  for (int r = 0; r < tile.rows; ++r) {
    low = std::max(low, tile.spans[r].first);
    high = std::min(high, tile.spans[r].last + 1);
  }
  if (low >= high) low = high = values.stop;
  const auto own = [&](int64_t from, int64_t to) {
    for (int r = 0; r < tile.rows; ++r)
      mix_queries(values, std::max(from, tile.spans[r].first), std::min(to, tile.spans[r].last + 1),
                  weights + r * tile.heads, out + r * tile.heads, tile.heads);
  };
  own(values.first, low);
  mix_queries(values, low, high, weights, out, tile.queries());
  own(high, values.stop);
}

void mix(const CacheView& cache, int64_t head, const QueryTile& tile, int64_t begin, int64_t end, float* scratch) {
  const int64_t n = tile.queries();
  const float* weights[kTileQueries];
  float* out[kTileQueries];
  for (int64_t j = 0; j < n; ++j) {
    weights[j] = tile.scores + j * tile.width() - tile.begin;
    out[j] = tile.out_row(j, cache.head_dim);
    std::fill(out[j] + begin * 16, out[j] + end * 16, 0.0f);
  }
  for (int64_t first = tile.begin; first < tile.end; first += kStretchRows) {
    ValueStretch values{cache, {}, first, std::min(first + kStretchRows, tile.end), begin, end, {}};
    for (int64_t i = 0; i < kStretchRows / kBlockRows; ++i)
      values.next[i] = cache.value_block(head, std::min(values.stop + i * kBlockRows, tile.end - 1));
    for (int64_t i = 0; first + i * kBlockRows < values.stop; ++i)
      values.blocks[i] = widen_values(cache, cache.value_block(head, first + i * kBlockRows), begin, end,
                                      scratch + i * (end - begin) * 256);
    mix_stretch(values, tile, weights, out);
  }
}

}  // namespace PACELINE_NAMESPACE
