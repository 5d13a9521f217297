// Panel kernels for registers that hold less than a panel's sixteen outputs.
//
// All registers together hold the sums of two batch rows (floats) or four (integers), so a tile's rows are taken that
// many at a time, over stretches of weights that stay in the nearest cache: each is fetched from memory once, whatever
// the number of rows. Each row has its own sums, in the same order for every number of rows. Included by matmul.hpp.
#pragma once

#include "kernels/operands.hpp"

namespace PACELINE_NAMESPACE {

// A stretch of a panel's columns, and the activations of a tile's rows for it.
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

// Whole blocks of four kilobytes or a little more: eight of q4_0, four of q8_0.
template <Format F>
constexpr int64_t kStretchBlocks = (4096 + traits(F).block_bytes - 1) / traits(F).block_bytes;
template <Format F>
constexpr int64_t kStretchBytes = kStretchBlocks<F> * traits(F).block_bytes;

struct RowSums {
  f32x16 even, odd;
};

template <Format F, int M>
inline void stretch_floats(const Stretch& s, RowSums* sums) {
  using Load = typename Operands<F>::Load;
  const int step = s.lanes * 4;
  const uint8_t *w = s.weights, *a = s.a;
  f32x16 even[M], odd[M];
  for (int m = 0; m < M; ++m) even[m] = sums[m].even, odd[m] = sums[m].odd;
  for (int64_t i = 0; i < s.columns / traits(F).act.lane_columns(); i += 2, w += 128, a += 2 * step) {
    if (s.fetch) prefetch(w + kStretchBytes<F>), prefetch(w + kStretchBytes<F> + 64);
    const Load w0 = in_register(load<Load>(w));
    for (int m = 0; m < M; ++m) even[m] = dot_lane(even[m], w0, a + 4 * m);
    const Load w1 = in_register(load<Load>(w + 64));
    for (int m = 0; m < M; ++m) odd[m] = dot_lane(odd[m], w1, a + step + 4 * m);
  }
  for (int m = 0; m < M; ++m) sums[m] = {even[m], odd[m]};
}

// Each group of columns as integers, then scaled: even += (W_q a_q) * (weight scale * activation scale).
template <Format F, int M>
inline void stretch_integers(const Stretch& s, RowSums* sums) {
  constexpr OperandKind kind = Operands<F>::kKind;
  constexpr int loads = kGroup / 4 / Operands<F>::kCount;  // of a group
  const int step = s.lanes * 4;
  const uint8_t *w = s.weights, *a = s.a;
  const uint16_t* weight_scale = nullptr;
  for (int64_t group = 0; group < s.columns / kGroup; ++group) {
    const bool second = group % 2 != 0;
    if (!second) {  // a block begins with the scales of its two groups
      if (s.fetch) prefetch(w + kStretchBytes<F>);
      weight_scale = reinterpret_cast<const uint16_t*>(w);
      w += paceline::kScaleBytes;
    }
    GroupSum<kind> acc[M] = {};
    for (int i = 0; i < loads; ++i, w += 64) {
      if (s.fetch) prefetch(w + kStretchBytes<F>);
      const u8x64 bytes = load<u8x64>(w);
      for (int j = 0; j < Operands<F>::kCount; ++j, a += step) {
        u8x64 operand = Operands<F>::get(bytes, j);
        if constexpr (kind == OperandKind::bytes)
          operand = operand ^ 128;  // signed: no offset for start values to cancel
        for (int m = 0; m < M; ++m) acc[m] = dot4<kind>(acc[m], operand, broadcast<u8x64>(a + 4 * m));
      }
    }
    const f32x16 ws = from_half(weight_scale + second * kPanel);
    for (int m = 0; m < M; ++m) {
      const int64_t at = group * s.lanes + m;
      i32x16 sum = total(acc[m]);
      if constexpr (kind == OperandKind::nibbles) sum = sum + splat(s.start[at]);
      sums[m].even = fma(convert<f32x16>(sum), ws * splat(s.scale[at]), sums[m].even);
    }
  }
}

// out [rows of the tile], rows in 1..kTile.
template <Format F>
void panel_tile(const uint8_t* panel, const ActView& act, int rows, f32x16* out) {
  constexpr int most = kRegisters * kLanes / (kIntegers<F> ? 32 : 64);  // half of the registers are for sums
  constexpr int64_t stretch = kStretchBlocks<F> * traits(F).block_cols;
  RowSums sums[kTile];
  for (int m = 0; m < rows; ++m) sums[m] = {splat(0.0f), splat(0.0f)};
  for (int64_t k = 0; k < act.padded_cols; k += stretch, panel += kStretchBytes<F>) {
    const int64_t lane = k / traits(F).act.lane_columns() * act.lanes;
    const int64_t group = kIntegers<F> ? k / kGroup * act.lanes : 0;
    const int64_t columns = std::min(act.padded_cols - k, stretch);
    Stretch s{panel, act.data + 4 * lane, act.scale + group, act.start + group, act.lanes, columns, true};
    for (int first = 0; first < rows; first += most, s.next_rows(most))
      with_count<most>(std::min(rows - first, most), [&]<int M>() {
        if constexpr (kIntegers<F>) stretch_integers<F, M>(s, sums + first);
        else stretch_floats<F, M>(s, sums + first);
      });
  }
  for (int m = 0; m < rows; ++m) out[m] = kIntegers<F> ? sums[m].even : sums[m].even + sums[m].odd;
}

}  // namespace PACELINE_NAMESPACE
