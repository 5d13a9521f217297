// Matrix kernels: one panel of 16 outputs by one tile of up to 8 batch rows, for each weight format.
//
// M, the number of rows, is only a loop bound: each row has its own accumulators and the same order of operations
// for every M. The panel kernels here are those of AVX-512, whose registers hold a panel's sixteen outputs; narrow.hpp
// has the others. Included by kernels.cpp.
#pragma once

#include "formats.hpp"
#include "vec.hpp"
#if !PACELINE_AVX512
#include "narrow.hpp"
#endif

namespace PACELINE_ISA {

using paceline::ActView;
using paceline::Format;
using paceline::kGroup;
using paceline::kPanel;
using paceline::kTile;
using paceline::MatrixView;

#if PACELINE_AVX512

constexpr int kAhead = 4096;  // bytes to prefetch ahead of a weight load

template <int M>
inline void panel_f32(const uint8_t* w, const ActView& act, f32x16* out) {
  const int step = act.lanes * 4;
  const uint8_t* a = act.data;
  f32x16 even[M], odd[M];
  for (int m = 0; m < M; ++m) even[m] = odd[m] = splat(0.0f);
  for (int64_t k = 0; k < act.padded_cols; k += 2, w += 128, a += 2 * step) {
    prefetch(w + kAhead);
    prefetch(w + kAhead + 64);
    const f32x16 w0 = load<f32x16>(w), w1 = load<f32x16>(w + 64);
    for (int m = 0; m < M; ++m) {
      float a0, a1;
      std::memcpy(&a0, a + 4 * m, 4);
      std::memcpy(&a1, a + step + 4 * m, 4);
      even[m] = fma(w0, splat(a0), even[m]);
      odd[m] = fma(w1, splat(a1), odd[m]);
    }
  }
  for (int m = 0; m < M; ++m) out[m] = even[m] + odd[m];
}

template <int M>
inline void panel_bf16(const uint8_t* w, const ActView& act, f32x16* out) {
  const int step = act.lanes * 4;
  const uint8_t* a = act.data;
  f32x16 even[M], odd[M];
  for (int m = 0; m < M; ++m) even[m] = odd[m] = splat(0.0f);
  for (int64_t k = 0; k < act.padded_cols; k += 4, w += 128, a += 2 * step) {
    prefetch(w + kAhead);
    prefetch(w + kAhead + 64);
    const u32x16 w0 = load<u32x16>(w), w1 = load<u32x16>(w + 64);
    for (int m = 0; m < M; ++m) even[m] = dot2(even[m], w0, a + 4 * m);
    for (int m = 0; m < M; ++m) odd[m] = dot2(odd[m], w1, a + step + 4 * m);
  }
  for (int m = 0; m < M; ++m) out[m] = even[m] + odd[m];
}

// Each group of 32 columns as integers, then scaled: total += (W_q a_q) * (weight scale * activation scale).
template <int M, bool Nibbles>
inline void panel_quantised(const uint8_t* w, const ActView& act, f32x16* out) {
  const int step = act.lanes * 4;
  const uint8_t* a = act.data;
  const float* scale = act.scale;
  const int32_t* start = act.start;
  const uint16_t* weight_scale = nullptr;
  f32x16 total[M];
  for (int m = 0; m < M; ++m) total[m] = splat(0.0f);
  for (int64_t k = 0; k < act.padded_cols; k += kGroup, scale += act.lanes, start += act.lanes) {
    const bool second = k % paceline::kBlock != 0;
    if (!second) {  // a block begins with the scales of its two groups
      prefetch(w + kAhead);
      weight_scale = reinterpret_cast<const uint16_t*>(w);
      w += paceline::kScaleBytes;
    }
    i32x16 acc[M];
    for (int m = 0; m < M; ++m) acc[m] = splat(start[m]);
    for (int i = 0; i < (Nibbles ? 4 : 8); ++i, w += 64) {
      prefetch(w + kAhead);
      const u8x64 bytes = load<u8x64>(w);
      const u8x64 low = Nibbles ? bytes & 15 : bytes;
      for (int m = 0; m < M; ++m) acc[m] = dot4(acc[m], low, a + 4 * m);
      a += step;
      if constexpr (Nibbles) {
        const u8x64 high = (u8x64)((u32x16)bytes >> 4) & 15;
        for (int m = 0; m < M; ++m) acc[m] = dot4(acc[m], high, a + 4 * m);
        a += step;
      }
    }
    const f32x16 ws = from_half(weight_scale + second * kPanel);
    for (int m = 0; m < M; ++m)
      total[m] = fma(__builtin_convertvector(acc[m], f32x16), ws * splat(scale[m]), total[m]);
  }
  for (int m = 0; m < M; ++m) out[m] = total[m];
}

template <int M>
inline void panel_rows(Format format, const uint8_t* panel, const ActView& act, f32x16* out) {
  switch (format) {
    case Format::f32: return panel_f32<M>(panel, act, out);
    case Format::bf16: return panel_bf16<M>(panel, act, out);
    case Format::q8: return panel_quantised<M, false>(panel, act, out);
    case Format::q4: return panel_quantised<M, true>(panel, act, out);
  }
}

// out [rows of the tile], rows in 1..8.
inline void panel_tile(Format format, const uint8_t* panel, const ActView& act, int rows, f32x16* out) {
  switch (rows) {
    case 1: return panel_rows<1>(format, panel, act, out);
    case 2: return panel_rows<2>(format, panel, act, out);
    case 3: return panel_rows<3>(format, panel, act, out);
    case 4: return panel_rows<4>(format, panel, act, out);
    case 5: return panel_rows<5>(format, panel, act, out);
    case 6: return panel_rows<6>(format, panel, act, out);
    case 7: return panel_rows<7>(format, panel, act, out);
    case 8: return panel_rows<8>(format, panel, act, out);
  }
}

#endif

inline int tile_rows(int64_t rows, int64_t tile) { return int(rows - tile * kTile < kTile ? rows - tile * kTile : kTile); }

void matmul(const MatrixView& w, const ActView& act, int64_t rows, int64_t begin, int64_t end, float* out, int64_t ld) {
  const int64_t last = end * 2 < w.panels() ? end * 2 : w.panels();
  for (int64_t panel = begin * 2; panel < last; ++panel)
    for (int64_t tile = 0; tile * kTile < rows; ++tile) {
      const int count = tile_rows(rows, tile);
      f32x16 y[kTile];
      panel_tile(w.format, w.panel(panel), act.tile(tile), count, y);
      for (int m = 0; m < count; ++m) store(out + (tile * kTile + m) * ld + panel * kPanel, y[m]);
    }
}

// Put 32 columns (one group) of a row into its lane of a tile.
inline void prepare_group(const ActView& act, int64_t row, int64_t group, f32x16 x0, f32x16 x1) {
  const int64_t lane = row % act.lanes;
  const ActView tile = act.tile(row / act.lanes);
  uint8_t* p = tile.data + (group * kGroup / paceline::lane_columns(act.format) * act.lanes + lane) * 4;
  const int step = act.lanes * 4;
  if (act.format == Format::f32) {
    float t[kGroup];
    store(t, x0);
    store(t + 16, x1);
    for (int i = 0; i < kGroup; ++i) std::memcpy(p + i * step, t + i, 4);
    return;
  }
  if (act.format == Format::bf16) {
    uint16_t t[kGroup];
    store(t, to_bf16(x0));
    store(t + 16, to_bf16(x1));
    for (int i = 0; i < kGroup / 2; ++i) std::memcpy(p + i * step, t + 2 * i, 4);
    return;
  }
  const f32x16 zero = splat(0.0f);
  const f32x16 m0 = max(x0, zero - x0), m1 = max(x1, zero - x1);
  const float top = max_lane(max(m0, m1)), scale = top / 127.0f, inverse = top > 1e-30f ? 127.0f / top : 0.0f;
  const i32x16 q0 = convert<i32x16>(round_even(x0 * splat(inverse)));
  const i32x16 q1 = convert<i32x16>(round_even(x1 * splat(inverse)));
  int8_t t[kGroup];
  store_bytes(t, q0);
  store_bytes(t + 16, q1);
  for (int i = 0; i < kGroup / 4; ++i) std::memcpy(p + i * step, t + 4 * i, 4);
  tile.scale[group * act.lanes + lane] = scale;
  tile.start[group * act.lanes + lane] = -(act.format == Format::q8 ? 128 : 8) * sum(q0 + q1);
}

void prepare(const ActView& act, int64_t row, const float* x, int64_t n, int64_t begin, int64_t end) {
  for (int64_t group = begin; group < end; ++group) {
    const int64_t left = n - group * kGroup;
    if (left >= kGroup) {
      prepare_group(act, row, group, load<f32x16>(x + group * kGroup), load<f32x16>(x + group * kGroup + 16));
    } else {
      float t[kGroup] = {};
      for (int64_t i = 0; i < left; ++i) t[i] = x[group * kGroup + i];
      prepare_group(act, row, group, load<f32x16>(t), load<f32x16>(t + 16));
    }
  }
}

// Zeros for the columns that pad a row of activations to whole blocks.
inline void prepare_padding(const ActView& act, int64_t row, int64_t first_group) {
  for (int64_t group = first_group; group < act.padded_cols / kGroup; ++group)
    prepare_group(act, row, group, splat(0.0f), splat(0.0f));
}

void gated(const MatrixView& gate, const MatrixView* up, const float* factor, int64_t ld, const ActView& act,
           int64_t rows, int64_t begin, int64_t end, const ActView& out) {
  for (int64_t unit = begin; unit < end; ++unit)
    for (int64_t tile = 0; tile * kTile < rows; ++tile) {
      const int count = tile_rows(rows, tile);
      f32x16 y[2][kTile], z[2][kTile];
      for (int half = 0; half < 2; ++half) {
        const int64_t panel = unit * 2 + half;
        for (int m = 0; m < count; ++m) y[half][m] = z[half][m] = splat(0.0f);
        if (panel >= gate.panels()) continue;  // an odd panel at the end: the padding of the next matrix is zero
        panel_tile(gate.format, gate.panel(panel), act.tile(tile), count, y[half]);
        if (up) panel_tile(up->format, up->panel(panel), act.tile(tile), count, z[half]);
        else
          for (int m = 0; m < count; ++m) z[half][m] = load<f32x16>(factor + (tile * kTile + m) * ld + panel * kPanel);
      }
      for (int m = 0; m < count; ++m)
        prepare_group(out, tile * kTile + m, unit, gelu(y[0][m]) * z[0][m], gelu(y[1][m]) * z[1][m]);
      if (unit + 1 == gate.units())
        for (int m = 0; m < count; ++m) prepare_padding(out, tile * kTile + m, unit + 1);
    }
}

}  // namespace PACELINE_ISA
