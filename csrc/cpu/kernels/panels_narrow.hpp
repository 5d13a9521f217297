// Panel kernels for registers that hold less than a panel's sixteen outputs.
//
// The registers hold the sums of few batch rows (kFloatRows, kIntegerRows), so a tile's rows are taken that many at a
// time, over stretches of weights that stay in the nearest cache: each is fetched from memory once, whatever
// the number of rows. Each row has its own sums, in the same order for every number of rows. Included by matmul.hpp.
#pragma once

#include "kernels/operands.hpp"

namespace PACELINE_NAMESPACE {

// A stretch of a panel's columns, and the activations of a tile's rows for it.
struct Stretch {
  const uint8_t* weights;
  const uint8_t* a;
  const uint32_t* words;
  int64_t stride;  // of words
  int lanes;
  int64_t columns;
  int64_t ahead;  // bytes to the next stretch, which is prefetched; then 0: once is enough, but a branch costs more

  void next_rows(int count) { a += 4 * count, words += count, ahead = 0; }
};

// Whole blocks, or super-blocks, of four kilobytes or a little more.
template <Format F>
constexpr int64_t kStretchColumns = [] {
  constexpr FormatTraits format = traits(F);
  constexpr int64_t least = format.super_bytes() ? kSuper : format.block_cols();
  return paceline::round_up(4096, format.panel_bytes(least)) / format.panel_bytes(least) * least;
}();
template <Format F>
constexpr int64_t kStretchBytes = traits(F).panel_bytes(kStretchColumns<F>);

struct RowSums {
  f32x16 even, odd;
};

template <Format F, int M>
inline void stretch_floats(const Stretch& s, RowSums* sums) {
  constexpr int bytes = kPlainBytes<F>;
  const int step = s.lanes * 4;
  const uint8_t *w = s.weights, *a = s.a;
  f32x16 even[M], odd[M];
  for (int m = 0; m < M; ++m) even[m] = sums[m].even, odd[m] = sums[m].odd;
  for (int64_t i = 0; i < s.columns / lane_columns(traits(F).act()); i += 2, w += 2 * bytes, a += 2 * step) {
    prefetch(w + s.ahead), prefetch(w + s.ahead + bytes);
    const auto w0 = in_register(plain_weights<F>(w));
    for (int m = 0; m < M; ++m) even[m] = dot_lane(even[m], w0, a + 4 * m);
    const auto w1 = in_register(plain_weights<F>(w + bytes));
    for (int m = 0; m < M; ++m) odd[m] = dot_lane(odd[m], w1, a + step + 4 * m);
  }
  for (int m = 0; m < M; ++m) sums[m] = {even[m], odd[m]};
}

// One group of columns: exact sums of products of integers, then scaled and added to the rows' sums. `PartSum` takes
// kRun<largest number> operands before `total` has to widen it.
template <Format F, int M>
PACELINE_INLINE inline void add_group(const Stretch& s, const uint8_t* w, const Scales<F>& scales, int second,
                                      const uint8_t* a, const uint32_t* words, f32x16* sums) {
  const auto row = [=, stride = s.stride](int m) PACELINE_INLINE { return GroupWords{words + m, stride}; };
  constexpr int parts = Scales<F>::kParts, of_part = kOperands / parts;
  constexpr int run = std::min(of_part, kRun<kLargest<F>>), lines = int(traits(F).group_bytes()) / 64;
  unrolled<parts>([&]<int Part>() PACELINE_INLINE {
    i32x16 dots[M];
    unrolled<of_part / run>([&]<int Run>() PACELINE_INLINE {
      PartSum<kLargest<F>> part[M] = {};
      unrolled<run>([&]<int J>() PACELINE_INLINE {
        constexpr int i = Part * of_part + Run * run + J, line = i * lines / kOperands;
        if constexpr (i == 0 || line != (i - 1) * lines / kOperands) prefetch(w + s.ahead + line * 64);
        const u8x64 numbers = operand<F, i>(w);
        unrolled<M>([&]<int m>() PACELINE_INLINE {  // GCC would keep all the products and add them at the end
          part[m] = in_register(dot4<kLargest<F>>(part[m], numbers, broadcast<u8x64>(a + 4 * m)));
        });
        a += 4 * s.lanes;
      });
      unrolled<M>([&]<int m>() PACELINE_INLINE { dots[m] = Run ? dots[m] + total(part[m]) : total(part[m]); });
    });
    const f32x16 scale = scales.scale(second, Part);
    unrolled<M>([&]<int m>() PACELINE_INLINE {
      if constexpr (kOffset<F> != 0) dots[m] = dots[m] + start<F, Part>(row(m));
      sums[m] = add_scaled_dots(sums[m], dots[m], scale, row(m).number(paceline::kScale));
    });
    if constexpr (Scales<F>::kMinima) {
      const f32x16 minimum = scales.minimum(second, Part);
      unrolled<M>([&]<int m>() PACELINE_INLINE { sums[m] = fma(minimum, scaled_sum<F, Part>(row(m)), sums[m]); });
    }
  });
}

template <Format F, int M>
inline void stretch_integers(const Stretch& s, RowSums* sums) {
  constexpr FormatTraits format = traits(F);
  const uint8_t *w = s.weights, *a = s.a;
  const uint32_t* words = s.words;
  Scales<F> scales;
  f32x16 sum[M];
  for (int m = 0; m < M; ++m) sum[m] = sums[m].even;
  for (int64_t k = 0; k < s.columns; k += 2 * kGroup) {
    if constexpr (format.super_bytes() != 0)
      if (k % kSuper == 0) {
        prefetch(w + s.ahead);
        scales.set_super(w);
        w += format.super_bytes();
      }
    for (int64_t line = 0; line < format.header_bytes(); line += 64) prefetch(w + s.ahead + line);
    scales.set_block(w);
    w += format.header_bytes();
#pragma GCC unroll 1
    for (int second = 0; second < 2; ++second) {
      add_group<F, M>(s, w, scales, second, a, words, sum);
      w += format.group_bytes();
      a += kGroup * s.lanes;
      words += s.lanes;
    }
  }
  for (int m = 0; m < M; ++m) sums[m].even = sum[m];
}

// out [rows of the tile], rows in 1..kTile.
template <Format F>
void panel_tile(const uint8_t* panel, const ActView& act, int rows, f32x16* out) {
  constexpr int most = kIntegers<F> ? kIntegerRows : kFloatRows;
  RowSums sums[kTile];
  for (int m = 0; m < rows; ++m) sums[m] = {splat(0.0f), splat(0.0f)};
  for (int64_t k = 0; k < act.padded_cols; k += kStretchColumns<F>, panel += kStretchBytes<F>) {
    const uint32_t* words = kIntegers<F> ? &act.word(k / kGroup, 0, 0) : nullptr;
    const int64_t columns = std::min(act.padded_cols - k, kStretchColumns<F>);
    Stretch s{panel,           act.data + k * act_bytes(act.format) * act.lanes,
              words,           act.groups() * act.lanes,
              act.lanes,       columns,
              kStretchBytes<F>};
    for (int first = 0; first < rows; first += most, s.next_rows(most))
      with_count<most>(std::min(rows - first, most), [&]<int M>() {
        if constexpr (kIntegers<F>) stretch_integers<F, M>(s, sums + first);
        else stretch_floats<F, M>(s, sums + first);
      });
  }
  for (int m = 0; m < rows; ++m) out[m] = kIntegers<F> ? sums[m].even : sums[m].even + sums[m].odd;
}

}  // namespace PACELINE_NAMESPACE
