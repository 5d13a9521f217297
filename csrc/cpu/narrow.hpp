// Panel kernels for instruction sets whose registers hold less than a panel's sixteen outputs.
//
// Their registers hold the sums of two batch rows (floats) or four (integers), so a tile's rows are taken that many at
// a time, over stretches of weights that stay in the nearest cache: each is fetched from memory once, whatever the
// number of rows. Each row keeps its own sums in the same order for every number of rows. Included by matmul.hpp.
#pragma once

#include "formats.hpp"
#include "vec.hpp"

namespace PACELINE_ISA {

using paceline::ActView;
using paceline::Format;
using paceline::kGroup;
using paceline::kPanel;
using paceline::kTile;

// A stretch of a panel's columns, four kilobytes or a little more, and the rows of a tile that meet it.
struct Stretch {
  const uint8_t* weights;
  const uint8_t* a;
  const float* scale;
  const int32_t* start;
  int lanes;
  int64_t columns;
  bool fetch;  // prefetch the next stretch: once is enough

  void next_rows(int count) { a += 4 * count, scale += count, start += count, fetch = false; }
};

template <Format F>
constexpr int64_t kStretch = F == Format::f32 ? 64 : F == Format::bf16 ? 128 : F == Format::q8 ? 256 : 512;  // columns

template <Format F>
constexpr int64_t kStretchBytes = F == Format::f32 || F == Format::bf16 ? 4096 : F == Format::q8 ? 4352 : 4608;

struct RowSums {
  f32x16 even, odd;
};

template <int M>
inline void stretch_f32(const Stretch& s, RowSums* sums) {
  const int step = s.lanes * 4;
  const uint8_t *w = s.weights, *a = s.a;
  f32x16 even[M], odd[M];
  for (int m = 0; m < M; ++m) even[m] = sums[m].even, odd[m] = sums[m].odd;
  for (int64_t k = 0; k < s.columns; k += 2, w += 128, a += 2 * step) {
    if (s.fetch) prefetch(w + kStretchBytes<Format::f32>), prefetch(w + kStretchBytes<Format::f32> + 64);
    const f32x16 w0 = in_register(load<f32x16>(w)), w1 = in_register(load<f32x16>(w + 64));
    for (int m = 0; m < M; ++m) {
      float a0, a1;
      std::memcpy(&a0, a + 4 * m, 4);
      std::memcpy(&a1, a + step + 4 * m, 4);
      even[m] = fma(w0, splat(a0), even[m]);
      odd[m] = fma(w1, splat(a1), odd[m]);
    }
  }
  for (int m = 0; m < M; ++m) sums[m] = {even[m], odd[m]};
}

template <int M>
inline void stretch_bf16(const Stretch& s, RowSums* sums) {
  const int step = s.lanes * 4;
  const uint8_t *w = s.weights, *a = s.a;
  f32x16 even[M], odd[M];
  for (int m = 0; m < M; ++m) even[m] = sums[m].even, odd[m] = sums[m].odd;
  for (int64_t k = 0; k < s.columns; k += 4, w += 128, a += 2 * step) {
    if (s.fetch) prefetch(w + kStretchBytes<Format::bf16>), prefetch(w + kStretchBytes<Format::bf16> + 64);
    const u32x16 w0 = in_register(load<u32x16>(w));
    for (int m = 0; m < M; ++m) even[m] = dot2(even[m], w0, a + 4 * m);
    const u32x16 w1 = in_register(load<u32x16>(w + 64));
    for (int m = 0; m < M; ++m) odd[m] = dot2(odd[m], w1, a + step + 4 * m);
  }
  for (int m = 0; m < M; ++m) sums[m] = {even[m], odd[m]};
}

// Each group of 32 columns as integers, then scaled: even += (W_q a_q) * (weight scale * activation scale).
template <int M, bool Nibbles>
inline void stretch_quantised(const Stretch& s, RowSums* sums) {
  constexpr int64_t ahead = kStretchBytes<Nibbles ? Format::q4 : Format::q8>;
  const int step = s.lanes * 4;
  const uint8_t *w = s.weights, *a = s.a;
  const uint16_t* weight_scale = nullptr;
  for (int64_t group = 0; group < s.columns / kGroup; ++group) {
    const bool second = group % 2 != 0;
    if (!second) {  // a block begins with the scales of its two groups
      if (s.fetch) prefetch(w + ahead);
      weight_scale = reinterpret_cast<const uint16_t*>(w);
      w += paceline::kScaleBytes;
    }
    GroupSum<Nibbles> acc[M] = {};
    for (int i = 0; i < (Nibbles ? 4 : 8); ++i, w += 64) {
      if (s.fetch) prefetch(w + ahead);
      const u8x64 bytes = load<u8x64>(w);
      const u8x64 low = Nibbles ? bytes & 15 : bytes ^ 128;  // q8 becomes signed: no start value to cancel an offset
      for (int m = 0; m < M; ++m) acc[m] = dot4<Nibbles>(acc[m], low, broadcast<u8x64>(a + 4 * m));
      a += step;
      if constexpr (Nibbles) {
        const u8x64 high = bits<u8x64>(bits<u32x16>(bytes) >> 4) & 15;
        for (int m = 0; m < M; ++m) acc[m] = dot4<Nibbles>(acc[m], high, broadcast<u8x64>(a + 4 * m));
        a += step;
      }
    }
    const f32x16 ws = from_half(weight_scale + second * kPanel);
    for (int m = 0; m < M; ++m) {
      const int64_t at = group * s.lanes + m;
      const i32x16 sum = Nibbles ? total(acc[m]) + splat(s.start[at]) : total(acc[m]);
      sums[m].even = fma(convert<f32x16>(sum), ws * splat(s.scale[at]), sums[m].even);
    }
  }
}

template <Format F, int M>
inline void stretch_rows(const Stretch& s, RowSums* sums) {
  if constexpr (F == Format::f32) stretch_f32<M>(s, sums);
  else if constexpr (F == Format::bf16) stretch_bf16<M>(s, sums);
  else stretch_quantised<M, F == Format::q4>(s, sums);
}

// stretch_rows for `count` rows, 1 to Most.
template <Format F, int Most>
inline void with_rows(int count, const Stretch& s, RowSums* sums) {
  if constexpr (Most > 1)
    if (count < Most) return with_rows<F, Most - 1>(count, s, sums);
  stretch_rows<F, Most>(s, sums);
}

template <Format F>
inline void panel_as(const uint8_t* panel, const ActView& act, int rows, f32x16* out) {
  constexpr bool integers = F == Format::q8 || F == Format::q4;
  constexpr int most = kRegisterBytes / (integers ? 128 : 256);  // half of the registers are for sums
  RowSums sums[kTile];
  for (int m = 0; m < rows; ++m) sums[m] = {splat(0.0f), splat(0.0f)};
  for (int64_t k = 0; k < act.padded_cols; k += kStretch<F>, panel += kStretchBytes<F>) {
    const int64_t lane = k / paceline::lane_columns(F) * act.lanes, group = integers ? k / kGroup * act.lanes : 0;
    const int64_t left = act.padded_cols - k, columns = left < kStretch<F> ? left : kStretch<F>;
    Stretch s = {panel, act.data + 4 * lane, act.scale + group, act.start + group, act.lanes, columns, true};
    for (int first = 0; first < rows; first += most, s.next_rows(most))
      with_rows<F, most>(rows - first < most ? rows - first : most, s, sums + first);
  }
  for (int m = 0; m < rows; ++m) out[m] = integers ? sums[m].even : sums[m].even + sums[m].odd;
}

// out [rows of the tile], rows in 1..8.
inline void panel_tile(Format format, const uint8_t* panel, const ActView& act, int rows, f32x16* out) {
  switch (format) {
    case Format::f32: return panel_as<Format::f32>(panel, act, rows, out);
    case Format::bf16: return panel_as<Format::bf16>(panel, act, rows, out);
    case Format::q8: return panel_as<Format::q8>(panel, act, rows, out);
    case Format::q4: return panel_as<Format::q4>(panel, act, rows, out);
  }
}

}  // namespace PACELINE_ISA
