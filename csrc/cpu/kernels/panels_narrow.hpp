// Panel kernels for registers that hold less than a panel's sixteen outputs.
//
// The registers hold the sums of few batch rows (kFloatRows of floats, kPairRows of pairs of bfloat16, kIntegerRows of
// integers), so rows are taken that many at a time, over stretches of weights that stay in the nearest cache: each is fetched
// from memory once, whatever the number of rows. For more rows (kPackedRows) a stretch is unpacked once, too. Each row has its
// own sums, in the same order for every number of rows. Included by matmul.hpp.
#pragma once

#include "kernels/operands.hpp"

namespace PACELINE_NAMESPACE {

// Sums of products may be pairs of 16-bit numbers, whose total is the sum.
constexpr bool kPairSums = !std::is_same_v<PartSum<15>, i32x16>;

// How many of a part's operands are added before `total` has to widen the sums. Those of a format with an offset may pass
// the range of 16 bits on the way: with their start value they end within it.
template <Format F>
constexpr int kOperandsAtOnce = [] {
  constexpr int all = kOperands / Scales<F>::kParts;
  if (!kPairSums || kOffset<F> == 0) return std::min(all, kRun<kLargest<F>>);
  static_assert(kOffset<F> * 127 * 2 * all <= 32767 || !kPairSums);
  return all;
}();

// A stretch of a panel's columns, and the activations of a tile's rows for it.
struct Stretch {
  const uint8_t* weights;
  const uint8_t* a;
  const uint32_t* words;
  int64_t stride;  // of words
  int lanes;
  int64_t columns;

  // The rows of a tile from `first` on.
  Stretch rows_from(const ActView& act, int tile, int first) const {
    Stretch s = *this;
    s.a += tile * act.tile_bytes() + 4 * first;
    if (words) s.words += tile * act.tile_words() + first;
    return s;
  }
};

// Whole blocks, or super-blocks, of eight kilobytes or a little more.
template <Format F>
constexpr int64_t kStretchColumns = [] {
  constexpr FormatTraits format = traits(F);
  constexpr int64_t least = format.super_bytes() ? kSuper : format.block_cols();
  return paceline::round_up(8192, format.panel_bytes(least)) / format.panel_bytes(least) * least;
}();
template <Format F>
constexpr int64_t kStretchBytes = traits(F).panel_bytes(kStretchColumns<F>);

struct RowSums {
  f32x16 even, odd;
};

template <Format F, int M>
inline void stretch_floats(const Stretch& s, Ahead& shared, RowSums* sums) {
  constexpr int bytes = kPlainBytes<F>;
  Ahead ahead = shared;
  const int step = s.lanes * 4;
  const uint8_t *w = s.weights, *a = s.a;
  f32x16 even[M], odd[M];
  for (int m = 0; m < M; ++m) even[m] = sums[m].even, odd[m] = sums[m].odd;
  for (int64_t i = 0; i < s.columns / lane_columns(traits(F).act()); i += 2, w += 2 * bytes, a += 2 * step) {
    ahead.fetch();
    if constexpr (bytes == 64) ahead.fetch();
    const auto w0 = in_register(plain_weights<F>(w));
    for (int m = 0; m < M; ++m) even[m] = dot_lane(even[m], w0, a + 4 * m);
    const auto w1 = in_register(plain_weights<F>(w + bytes));
    for (int m = 0; m < M; ++m) odd[m] = dot_lane(odd[m], w1, a + step + 4 * m);
  }
  for (int m = 0; m < M; ++m) sums[m] = {even[m], odd[m]};
  shared = ahead;
}

// A group's numbers and scales as they are packed.
template <Format F>
struct PackedGroup {
  const uint8_t* w;
  const Scales<F>& scales;
  int second;  // of its block

  template <int I>
  PACELINE_INLINE u8x64 numbers() const {
    return operand<F, I>(w);
  }
  PACELINE_INLINE f32x16 scale(int part) const { return scales.scale(second, part); }
  PACELINE_INLINE f32x16 minimum(int part) const { return scales.minimum(second, part); }
};

// The same for tiles of so many rows that a stretch is unpacked first.
template <Format F>
struct UnpackedGroup {
  static constexpr int kParts = Scales<F>::kParts;
  alignas(64) uint8_t operands[kOperands][64];
  float scales[kParts][kPanel], minima[Scales<F>::kMinima ? kParts : 0][kPanel];

  void set(const PackedGroup<F>& packed) {
    unrolled<kOperands>([&]<int I>() PACELINE_INLINE { store(operands[I], packed.template numbers<I>()); });
    for (int part = 0; part < kParts; ++part) {
      store(scales[part], packed.scale(part));
      if constexpr (Scales<F>::kMinima) store(minima[part], packed.minimum(part));
    }
  }
  template <int I>
  PACELINE_INLINE u8x64 numbers() const {
    return in_register(load<u8x64>(operands[I]));
  }
  PACELINE_INLINE f32x16 scale(int part) const { return load<f32x16>(scales[part]); }
  PACELINE_INLINE f32x16 minimum(int part) const { return load<f32x16>(minima[part]); }
};

// One group of columns: exact sums of products of integers, then scaled and added to the rows' sums. `PartSum` takes
// kRun<largest number> operands before `total` has to widen it. fetch<I>() is called before operand I is used.
template <Format F, int M, class Group, class Fetch>
PACELINE_INLINE inline void add_group(const Stretch& s, const Group& group, const uint8_t* a, const uint32_t* words,
                                      f32x16* sums, Fetch fetch) {
  const auto row = [=, stride = s.stride](int m) PACELINE_INLINE { return GroupWords{words + m, stride}; };
  constexpr int parts = Scales<F>::kParts, of_part = kOperands / parts;
  constexpr int run = kOperandsAtOnce<F>;
  unrolled<parts>([&]<int Part>() PACELINE_INLINE {
    i32x16 dots[M];
    unrolled<of_part / run>([&]<int Run>() PACELINE_INLINE {
      PartSum<kLargest<F>> part[M] = {};
      if constexpr (kOffset<F> != 0)
        unrolled<M>([&]<int m>() PACELINE_INLINE { part[m] = bits<PartSum<kLargest<F>>>(start<F, Part>(row(m))); });
      unrolled<run>([&]<int J>() PACELINE_INLINE {
        constexpr int i = Part * of_part + Run * run + J;
        fetch.template operator()<i>();
        const u8x64 numbers = group.template numbers<i>();
        unrolled<M>([&]<int m>() PACELINE_INLINE {  // GCC would keep all the products and add them at the end
          part[m] = in_register(dot4<kLargest<F>>(part[m], numbers, broadcast<u8x64>(a + 4 * m)));
        });
        a += 4 * s.lanes;
      });
      unrolled<M>([&]<int m>() PACELINE_INLINE { dots[m] = Run ? dots[m] + total(part[m]) : total(part[m]); });
    });
    const f32x16 scale = group.scale(Part);
    unrolled<M>([&]<int m>() PACELINE_INLINE {
      sums[m] = add_scaled_dots(sums[m], dots[m], scale, row(m).number(paceline::kScale));
    });
    if constexpr (Scales<F>::kMinima) {
      const f32x16 minimum = group.minimum(Part);
      unrolled<M>([&]<int m>() PACELINE_INLINE { sums[m] = fma(minimum, scaled_sum<F, Part>(row(m)), sums[m]); });
    }
  });
}

// f(group) for the groups of a stretch. fetch() is called for each line of their headers.
template <Format F, class G, class Fetch>
PACELINE_INLINE inline void for_groups(const Stretch& s, G f, Fetch fetch) {
  constexpr FormatTraits format = traits(F);
  const uint8_t* w = s.weights;
  Scales<F> scales;
  for (int64_t k = 0; k < s.columns; k += 2 * kGroup) {
    if constexpr (format.super_bytes() != 0)
      if (k % kSuper == 0) {
        fetch();
        scales.set_super(w);
        w += format.super_bytes();
      }
    for (int64_t line = 0; line < format.header_bytes(); line += 64) fetch();
    scales.set_block(w);
    w += format.header_bytes();
#pragma GCC unroll 1
    for (int second = 0; second < 2; ++second, w += format.group_bytes()) f(PackedGroup<F>{w, scales, second});
  }
}

// Whether operand I of a group is the first in its line of weights.
template <Format F, int I>
constexpr bool kNewLine = [] {
  constexpr int lines = int(traits(F).group_bytes()) / 64;
  return I == 0 || I * lines / kOperands != (I - 1) * lines / kOperands;
}();

template <Format F, int M>
inline void stretch_integers(const Stretch& s, Ahead& shared, RowSums* sums) {
  Ahead ahead = shared;
  const uint8_t* a = s.a;
  const uint32_t* words = s.words;
  f32x16 sum[M];
  for (int m = 0; m < M; ++m) sum[m] = load<f32x16>(&sums[m].even);
  const auto add = [&](const PackedGroup<F>& group) PACELINE_INLINE {
    add_group<F, M>(s, group, a, words, sum, [&]<int I>() PACELINE_INLINE {
      if constexpr (kNewLine<F, I>) ahead.fetch();
    });
    a += kGroup * s.lanes;
    words += s.lanes;
  };
  for_groups<F>(s, add, [&]() PACELINE_INLINE { ahead.fetch(); });
  for (int m = 0; m < M; ++m) sums[m].even = sum[m];
  shared = ahead;
}

template <Format F, int M>
inline void unpacked_integers(const Stretch& s, const UnpackedGroup<F>* groups, Ahead& shared, RowSums* sums) {
  Ahead ahead = shared;
  const uint8_t* a = s.a;
  const uint32_t* words = s.words;
  f32x16 sum[M];
  for (int m = 0; m < M; ++m) sum[m] = load<f32x16>(&sums[m].even);
#pragma GCC unroll 1
  for (int64_t i = 0; i < s.columns / kGroup; ++i, a += kGroup * s.lanes, words += s.lanes) {
    ahead.fetch();  // of its header
    add_group<F, M>(s, groups[i], a, words, sum, [&]<int I>() PACELINE_INLINE {
      if constexpr (kNewLine<F, I>) ahead.fetch();
    });
  }
  for (int m = 0; m < M; ++m) sums[m].even = sum[m];
  shared = ahead;
}

template <Format F> constexpr int kRowsAtOnce = kIntegers<F>        ? kIntegerRows
                                                : F == Format::bf16 ? kPairRows
                                                                    : kFloatRows;

// So many rows at most take a stretch as it is packed. Super-blocks take long to unpack, and AVX2's sums of pairs leave no
// registers for it.
template <Format F> constexpr int kPackedRows = kPairSums && traits(F).super_bytes() ? kIntegerRows : kTile;

template <Format F>
inline void stretch_rows(const Stretch& all, const ActView& act, int rows, RowSums* sums) {
  constexpr int most = kRowsAtOnce<F>;
  // the stretch after this one, a step with each line of weights that a block of rows uses: blocks share the work
  Ahead ahead{all.weights + kStretchBytes<F>, row_blocks(64, row_blocks(rows, most))};
  if constexpr (!kIntegers<F>) {
    for_row_blocks<most>(rows, [&]<int M>(int tile, int first) {
      stretch_floats<F, M>(all.rows_from(act, tile, first), ahead, sums + tile * kTile + first);
    });
  } else if (rows <= kPackedRows<F>) {
    for_row_blocks<most>(rows, [&]<int M>(int tile, int first) {
      stretch_integers<F, M>(all.rows_from(act, tile, first), ahead, sums + first);
    });
  } else {
    UnpackedGroup<F> groups[kStretchColumns<F> / kGroup], *next = groups;
    for_groups<F>(all, [&](const PackedGroup<F>& group) PACELINE_INLINE { next++->set(group); }, [] {});
    for_row_blocks<most>(rows, [&]<int M>(int tile, int first) {
      unpacked_integers<F, M>(all.rows_from(act, tile, first), groups, ahead, sums + tile * kTile + first);
    });
  }
}

template <Format F>
inline void one_panel(const uint8_t* panel, const ActView& act, int rows, f32x16* out) {
  RowSums sums[kRows];
  for (int m = 0; m < rows; ++m) sums[m] = {splat(0.0f), splat(0.0f)};
  // rows that are taken at once take the panel as one stretch
  const int64_t step = rows <= kRowsAtOnce<F> ? act.padded_cols : kStretchColumns<F>;
  for (int64_t k = 0; k < act.padded_cols; k += step, panel += kStretchBytes<F>) {
    const uint32_t* words = kIntegers<F> ? &act.word(k / kGroup, 0, 0) : nullptr;
    const int64_t columns = std::min(act.padded_cols - k, step);
    const Stretch stretch{
        panel, act.data + k * act_bytes(act.format) * act.lanes, words, act.groups() * act.lanes, act.lanes, columns};
    stretch_rows<F>(stretch, act, rows, sums);
  }
  for (int m = 0; m < rows; ++m) out[m] = kIntegers<F> ? sums[m].even : sums[m].even + sums[m].odd;
}

// out [panels][rows], panels 1 or 2, `stride` apart, rows in 1..kRows; more than kTile lie in tiles of kTile lanes.
template <Format F>
void panel_rows(const uint8_t* first, int64_t stride, int panels, const ActView& act, int rows, f32x16 (*out)[kRows]) {
  for (int p = 0; p < panels; ++p) one_panel<F>(first + p * stride, act, rows, out[p]);
}

}  // namespace PACELINE_NAMESPACE
