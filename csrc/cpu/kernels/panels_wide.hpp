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

// Formats of which more rows than a tile's take two panels at once: each broadcast of activations then serves both. Where
// scales take longer than sums that gains nothing, and where memory does, half of the rows at once would lose.
template <Format F> constexpr bool kInPairs = kIntegers<F> && !traits(F).super_bytes();

// Rows at once, so that 8 registers hold their sums, and 8 more those of a group, or of floats 16.
template <int P> constexpr int kRowsAtOnce = kTile / P;

// One group of columns of P panels, `stride` apart: exact sums of products of integers, then scaled and added to the rows'
// sums.
template <Format F, int P, int M>
PACELINE_INLINE inline void add_group(const uint8_t* w, int64_t stride, const Scales<F>* scales, int second,
                                      const uint8_t* a, int step, const uint32_t* words, int64_t words_stride,
                                      f32x16 (*sum)[M]) {
  const auto row = [=](int m) PACELINE_INLINE { return GroupWords{words + m, words_stride}; };
  constexpr int parts = Scales<F>::kParts, of_part = kOperands / parts, lines = int(traits(F).group_bytes()) / 64;
  unrolled<parts>([&]<int Part>() PACELINE_INLINE {
    i32x16 dots[P][M];
    unrolled<M>([&]<int m>() PACELINE_INLINE {
      const i32x16 first = start<F, Part>(row(m));
      unrolled<P>([&]<int p>() PACELINE_INLINE { dots[p][m] = first; });
    });
    unrolled<of_part>([&]<int J>() PACELINE_INLINE {
      constexpr int i = Part * of_part + J, line = i * lines / kOperands;
      u8x64 numbers[P];
      unrolled<P>([&]<int p>() PACELINE_INLINE {
        if constexpr (i == 0 || line != (i - 1) * lines / kOperands) prefetch(w + p * stride + kAhead + line * 64);
        numbers[p] = operand<F, i>(w + p * stride);
      });
      unrolled<M>([&]<int m>() PACELINE_INLINE {
        const u8x64 four = broadcast<u8x64>(a + 4 * m);
        unrolled<P>([&]<int p>() PACELINE_INLINE { dots[p][m] = dot4(dots[p][m], numbers[p], four); });
      });
      a += step;
    });
    unrolled<P>([&]<int p>() PACELINE_INLINE {
      const f32x16 scale = scales[p].scale(second, Part);
      unrolled<M>([&]<int m>() PACELINE_INLINE {
        sum[p][m] = add_scaled_dots(sum[p][m], dots[p][m], scale, row(m).number(paceline::kScale));
      });
      if constexpr (Scales<F>::kMinima) {
        const f32x16 minimum = scales[p].minimum(second, Part);
        unrolled<M>([&]<int m>() PACELINE_INLINE { sum[p][m] = fma(minimum, scaled_sum<F, Part>(row(m)), sum[p][m]); });
      }
    });
  });
}

// Rows `first`, first + 1, ... of a tile; out[panel][row], ...
template <Format F, int P, int M>
inline void panel_integers(const uint8_t* w, int64_t stride, const ActView& act, int first, f32x16 (*out)[kRows],
                           int row) {
  constexpr FormatTraits format = traits(F);
  const int lanes = act.lanes;
  const uint8_t* a = act.data + 4 * first;
  const uint32_t* words = act.words + first;
  Scales<F> scales[P];
  f32x16 sum[P][M];
  unrolled<P>([&]<int p>() PACELINE_INLINE { unrolled<M>([&]<int m>() PACELINE_INLINE { sum[p][m] = splat(0.0f); }); });
  for (int64_t k = 0; k < act.padded_cols; k += 2 * kGroup) {
    if constexpr (format.super_bytes() != 0)
      if (k % kSuper == 0) {
        unrolled<P>([&]<int p>() PACELINE_INLINE {
          prefetch(w + p * stride + kAhead);
          scales[p].set_super(w + p * stride);
        });
        w += format.super_bytes();
      }
    unrolled<P>([&]<int p>() PACELINE_INLINE {
      for (int64_t line = 0; line < format.header_bytes(); line += 64) prefetch(w + p * stride + kAhead + line);
      scales[p].set_block(w + p * stride);
    });
    w += format.header_bytes();
#pragma GCC unroll 1
    for (int second = 0; second < 2; ++second) {
      add_group<F, P, M>(w, stride, scales, second, a, 4 * lanes, words, act.groups() * lanes, sum);
      w += format.group_bytes();
      a += kGroup * lanes;
      words += lanes;
    }
  }
  unrolled<P>([&]<int p>()
                  PACELINE_INLINE { unrolled<M>([&]<int m>() PACELINE_INLINE { out[p][row + m] = sum[p][m]; }); });
}

// out [P][rows] of P panels, `stride` apart.
template <Format F, int P>
inline void panels_rows(const uint8_t* panels, int64_t stride, const ActView& act, int rows, f32x16 (*out)[kRows]) {
  for_row_blocks<kRowsAtOnce<P>>(rows, [&]<int M>(int tile, int first) {
    if constexpr (kIntegers<F>)
      panel_integers<F, P, M>(panels, stride, act.tile(tile), first, out, tile * kTile + first);
    else panel_floats<F, M>(panels, act.tile(tile), out[0] + tile * kTile);
  });
}

// out [panels][rows], panels 1 or 2, `stride` apart, rows in 1..kRows; more than kTile lie in tiles of kTile lanes.
template <Format F>
void panel_rows(const uint8_t* first, int64_t stride, int panels, const ActView& act, int rows, f32x16 (*out)[kRows]) {
  if constexpr (kInPairs<F>)
    if (panels == 2 && rows > kTile) return panels_rows<F, 2>(first, stride, act, rows, out);
  for (int p = 0; p < panels; ++p) panels_rows<F, 1>(first + p * stride, stride, act, rows, out + p);
}

}  // namespace PACELINE_NAMESPACE
