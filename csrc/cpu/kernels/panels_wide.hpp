// Panel kernels for registers that hold a panel's sixteen outputs.
//
// M, the number of rows, is only a loop bound: each row has its own accumulators and the same order of operations for
// every M. Included by matmul.hpp.
#pragma once

#include "kernels/operands.hpp"

namespace PACELINE_NAMESPACE {

constexpr bool kPairSums = false;  // sums of products are integers of 32 bits
constexpr int kAhead = 4096;       // bytes to prefetch ahead of a weight load

template <Format F, int M>
inline void panel_floats(const uint8_t* w, const ActView& act, f32x16* out) {
  constexpr int bytes = kPlainBytes<F>;
  const int step = act.lanes * 4;
  const uint8_t* a = act.data;
  f32x16 even[M], odd[M];
  for (int m = 0; m < M; ++m) even[m] = odd[m] = splat(0.0f);
  for (int64_t i = 0; i < act.padded_cols / lane_columns(act.format); i += 2, w += 2 * bytes, a += 2 * step) {
    prefetch(w + kAhead);
    if constexpr (bytes == 64) prefetch(w + kAhead + 64);
    const auto w0 = plain_weights<F>(w), w1 = plain_weights<F>(w + bytes);
    for (int m = 0; m < M; ++m) even[m] = dot_lane(even[m], w0, a + 4 * m);
    for (int m = 0; m < M; ++m) odd[m] = dot_lane(odd[m], w1, a + step + 4 * m);
  }
  for (int m = 0; m < M; ++m) out[m] = even[m] + odd[m];
}

// One group of columns: exact sums of products of integers, then scaled and added to the rows' sums.
template <Format F, int M>
PACELINE_INLINE inline void add_group(const uint8_t* w, const Scales<F>& scales, int second, const uint8_t* a, int step,
                                      const uint32_t* words, int64_t stride, f32x16* sum) {
  const auto row = [=](int m) PACELINE_INLINE { return GroupWords{words + m, stride}; };
  constexpr int parts = Scales<F>::kParts, of_part = kOperands / parts, lines = int(traits(F).group_bytes()) / 64;
  unrolled<parts>([&]<int Part>() PACELINE_INLINE {
    i32x16 dots[M];
    unrolled<M>([&]<int m>() PACELINE_INLINE { dots[m] = start<F, Part>(row(m)); });
    unrolled<of_part>([&]<int J>() PACELINE_INLINE {
      constexpr int i = Part * of_part + J, line = i * lines / kOperands;
      if constexpr (i == 0 || line != (i - 1) * lines / kOperands) prefetch(w + kAhead + line * 64);
      const u8x64 numbers = operand<F, i>(w);
      unrolled<M>([&]<int m>() PACELINE_INLINE { dots[m] = dot4(dots[m], numbers, a + 4 * m); });
      a += step;
    });
    const f32x16 scale = scales.scale(second, Part);
    unrolled<M>([&]<int m>() PACELINE_INLINE {
      sum[m] = add_scaled_dots(sum[m], dots[m], scale, row(m).number(paceline::kScale));
    });
    if constexpr (Scales<F>::kMinima) {
      const f32x16 minimum = scales.minimum(second, Part);
      unrolled<M>([&]<int m>() PACELINE_INLINE { sum[m] = fma(minimum, scaled_sum<F, Part>(row(m)), sum[m]); });
    }
  });
}

template <Format F, int M>
inline void panel_integers(const uint8_t* w, const ActView& act, f32x16* out) {
  constexpr FormatTraits format = traits(F);
  const int lanes = act.lanes;
  const uint8_t* a = act.data;
  const uint32_t* words = act.words;
  Scales<F> scales;
  f32x16 sum[M];
  for (int m = 0; m < M; ++m) sum[m] = splat(0.0f);
  for (int64_t k = 0; k < act.padded_cols; k += 2 * kGroup) {
    if constexpr (format.super_bytes() != 0)
      if (k % kSuper == 0) {
        prefetch(w + kAhead);
        scales.set_super(w);
        w += format.super_bytes();
      }
    for (int64_t line = 0; line < format.header_bytes(); line += 64) prefetch(w + kAhead + line);
    scales.set_block(w);
    w += format.header_bytes();
#pragma GCC unroll 1
    for (int second = 0; second < 2; ++second) {
      add_group<F, M>(w, scales, second, a, 4 * lanes, words, act.groups() * lanes, sum);
      w += format.group_bytes();
      a += kGroup * lanes;
      words += lanes;
    }
  }
  for (int m = 0; m < M; ++m) out[m] = sum[m];
}

// out [rows], rows in 1..kRows; more than kTile lie in tiles of kTile lanes.
template <Format F>
void panel_rows(const uint8_t* panel, const ActView& act, int rows, f32x16* out) {
  for (int first = 0; first < rows; first += kTile)
    with_count<kTile>(std::min(rows - first, kTile), [&]<int M>() {
      const ActView tile = act.tile(first / kTile);
      if constexpr (kIntegers<F>) panel_integers<F, M>(panel, tile, out + first);
      else panel_floats<F, M>(panel, tile, out + first);
    });
}

}  // namespace PACELINE_NAMESPACE
