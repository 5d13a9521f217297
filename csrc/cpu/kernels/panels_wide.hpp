// Panel kernels for registers that hold a panel's sixteen outputs.
//
// M, the number of rows, is only a loop bound: each row has its own accumulators and the same order of operations for
// every M. Included by matmul.hpp.
#pragma once

#include "kernels/operands.hpp"

namespace PACELINE_NAMESPACE {

constexpr int kAhead = 4096;  // bytes to prefetch ahead of a weight load

template <Format F, int M>
inline void panel_floats(const uint8_t* w, const ActView& act, f32x16* out) {
  using Load = typename Operands<F>::Load;
  const int step = act.lanes * 4;
  const uint8_t* a = act.data;
  f32x16 even[M], odd[M];
  for (int m = 0; m < M; ++m) even[m] = odd[m] = splat(0.0f);
  for (int64_t i = 0; i < act.padded_cols / traits(F).act.lane_columns(); i += 2, w += 128, a += 2 * step) {
    prefetch(w + kAhead);
    prefetch(w + kAhead + 64);
    const Load w0 = load<Load>(w), w1 = load<Load>(w + 64);
    for (int m = 0; m < M; ++m) even[m] = dot_lane(even[m], w0, a + 4 * m);
    for (int m = 0; m < M; ++m) odd[m] = dot_lane(odd[m], w1, a + step + 4 * m);
  }
  for (int m = 0; m < M; ++m) out[m] = even[m] + odd[m];
}

// Each group of columns as integers, then scaled: sum += (W_q a_q) * (weight scale * activation scale).
template <Format F, int M>
inline void panel_integers(const uint8_t* w, const ActView& act, f32x16* out) {
  constexpr int loads = kGroup / 4 / Operands<F>::kCount;  // of a group
  const int step = act.lanes * 4;
  const uint8_t* a = act.data;
  const float* scale = act.scale;
  const int32_t* start = act.start;
  const uint16_t* weight_scale = nullptr;
  f32x16 sum[M];
  for (int m = 0; m < M; ++m) sum[m] = splat(0.0f);
  for (int64_t k = 0; k < act.padded_cols; k += kGroup, scale += act.lanes, start += act.lanes) {
    const bool second = k % traits(F).block_cols != 0;
    if (!second) {  // a block begins with the scales of its two groups
      prefetch(w + kAhead);
      weight_scale = reinterpret_cast<const uint16_t*>(w);
      w += paceline::kScaleBytes;
    }
    i32x16 acc[M];
    for (int m = 0; m < M; ++m) acc[m] = splat(start[m]);
    for (int i = 0; i < loads; ++i, w += 64) {
      prefetch(w + kAhead);
      Operands<F>::each(load<u8x64>(w), [&](u8x64 operand) {
        for (int m = 0; m < M; ++m) acc[m] = dot4(acc[m], operand, a + 4 * m);
        a += step;
      });
    }
    const f32x16 ws = from_half(weight_scale + second * kPanel);
    for (int m = 0; m < M; ++m) sum[m] = fma(convert<f32x16>(acc[m]), ws * splat(scale[m]), sum[m]);
  }
  for (int m = 0; m < M; ++m) out[m] = sum[m];
}

// out [rows of the tile], rows in 1..kTile.
template <Format F>
void panel_tile(const uint8_t* panel, const ActView& act, int rows, f32x16* out) {
  with_count<kTile>(rows, [&]<int M>() {
    if constexpr (kIntegers<F>) panel_integers<F, M>(panel, act, out);
    else panel_floats<F, M>(panel, act, out);
  });
}

}  // namespace PACELINE_NAMESPACE
