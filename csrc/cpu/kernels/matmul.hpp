// Matrix kernels: panels of 16 outputs by up to 64 batch rows, for each weight format. Included by kernels.cpp.
#pragma once

#include <algorithm>
#include <array>
#include <bit>

#include "kernels/kernels.hpp"
#include "kernels/operands.hpp"
#include PACELINE_PANELS

namespace PACELINE_NAMESPACE {

using paceline::GateFactor;
using paceline::MatrixView;

constexpr int kUnitPanels = paceline::kUnit / kPanel;

using PanelKernel = void (*)(const uint8_t* first, int64_t stride, int panels, const ActView& act, int rows,
                             f32x16 (*out)[kRows]);

constexpr auto kPanelKernels = []<int... F>(std::integer_sequence<int, F...>) {
  return std::array<PanelKernel, sizeof...(F)>{panel_rows<Format(F)>...};
}(std::make_integer_sequence<int, paceline::kFormatCount>());

// f(unit, first row, rows) for units [begin, end) and at most kRows rows at once: as many units as stay in the second
// cache are taken together with the same rows, whose activations stay there, too.
template <class F>
inline void for_row_chunks(const MatrixView& w, int64_t rows, int64_t begin, int64_t end, F f) {
  constexpr int64_t cached = 128 << 10;
  const int64_t step = std::max<int64_t>(cached / (w.stride * kUnitPanels), 1);
  for (; begin < end; begin += step)
    for (int64_t row = 0; row < rows; row += kRows)
      for (int64_t unit = begin; unit < std::min(begin + step, end); ++unit)
        f(unit, row, int(std::min<int64_t>(rows - row, kRows)));
}

void matmul(const MatrixView& w, const ActView& act, int64_t rows, int64_t begin, int64_t end, float* out, int64_t ld) {
  paceline::check_fits(w, act);
  const PanelKernel kernel = kPanelKernels[size_t(w.format)];
  for_row_chunks(w, rows, begin, end, [&](int64_t unit, int64_t row, int count) {
    const int64_t first = unit * kUnitPanels;
    const int panels = int(std::min<int64_t>(w.panels() - first, kUnitPanels));
    f32x16 y[kUnitPanels][kRows];
    kernel(w.panel(first), w.stride, panels, act.tile(row / kTile), count, y);
    for (int p = 0; p < panels; ++p)
      for (int m = 0; m < count; ++m) store(out + (row + m) * ld + (first + p) * kPanel, y[p][m]);
  });
}

// Store one group of columns, four bytes (`Columns` of them) in each lane of a row.
template <int Columns>
inline void store_lanes(const ActView& tile, int64_t group, int64_t lane, const void* packed) {
  uint8_t* p = tile.data + (group * (kGroup / Columns) * tile.lanes + lane) * 4;
  const int step = tile.lanes * 4;
  for (int i = 0; i < kGroup / Columns; ++i) std::memcpy(p + i * step, static_cast<const uint8_t*>(packed) + 4 * i, 4);
}

// To the nearest number from -127 to 127, NaN to -127: finite rows are in this range already, and what follows counts on
// it also where damaged weights have made others.
inline i32x16 to_int8(f32x16 x) {
  const f32x16 low = splat(-127.0f), high = splat(127.0f);
  x = where_greater(x, low, x, low);
  return convert<i32x16>(round_even(where_greater(high, x, x, high)));
}

alignas(64) constexpr int32_t kSecondPairs[16] = {0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1};

// Pack one group of columns of a row into its lane of a tile. Always inline: its vectors would be passed in memory.
PACELINE_INLINE inline void pack_group(const ActView& act, int64_t row, int64_t group, f32x16 x0, f32x16 x1) {
  static_assert(kGroup == 32);  // x0 and x1
  const int64_t lane = row % act.lanes;
  const ActView tile = act.tile(row / act.lanes);
  if (act.format == ActFormat::f32) {
    float packed[kGroup];
    store(packed, x0);
    store(packed + 16, x1);
    store_lanes<1>(tile, group, lane, packed);
  } else if (act.format == ActFormat::bf16) {
    uint16_t packed[kGroup];
    store(packed, to_bf16(x0));
    store(packed + 16, to_bf16(x1));
    store_lanes<2>(tile, group, lane, packed);
  } else {
    const f32x16 zero = splat(0.0f);
    const f32x16 m0 = max(x0, zero - x0), m1 = max(x1, zero - x1);
    const float top = max_lane(max(m0, m1)), scale = top / 127.0f, inverse = top > 1e-30f ? 127.0f / top : 0.0f;
    const i32x16 q0 = to_int8(x0 * splat(inverse)), q1 = to_int8(x1 * splat(inverse));
    int8_t packed[kGroup];
    store_bytes(packed, q0);
    store_bytes(packed + 16, q1);
    store_lanes<4>(tile, group, lane, packed);
    // Of each half of the group, and of it the columns that are the second pair of four.
    const i32x16 second = load<i32x16>(kSecondPairs);
    const int32_t low = sum(q0), high = sum(q1), all = low + high;
    const int32_t low_second = kPairSums ? sum(q0 & second) : 0, high_second = kPairSums ? sum(q1 & second) : 0;
    const auto start = [](int factor, int32_t total, int32_t second_pair) {
      if constexpr (!kPairSums) return factor * total;
      return int32_t(uint32_t(factor * second_pair) << 16 | (uint32_t(factor * (total - second_pair)) & 0xffff));
    };
    const auto set = [&](int word, auto value) { tile.word(group, word, lane) = std::bit_cast<uint32_t>(value); };
    set(paceline::kStart8, start(-8, all, low_second + high_second));
    set(paceline::kScale, scale);
    set(paceline::kScaledSum, scale * float(all));
    set(paceline::kScaledHalf, scale * float(low));
    set(paceline::kStart16, start(-16, all, low_second + high_second));
    set(paceline::kStart128, -128 * all);
    set(paceline::kStart32, start(-32, low, low_second));
    set(paceline::kStart32 + 1, start(-32, high, high_second));
  }
}

void pack_activations(const ActView& act, int64_t row, const float* x, int64_t n, int64_t begin, int64_t end) {
  for (int64_t group = begin; group < end; ++group) {
    const int64_t left = n - group * kGroup;
    if (left >= kGroup) {
      pack_group(act, row, group, load<f32x16>(x + group * kGroup), load<f32x16>(x + group * kGroup + 16));
    } else {
      float t[kGroup] = {};
      for (int64_t i = 0; i < left; ++i) t[i] = x[group * kGroup + i];
      pack_group(act, row, group, load<f32x16>(t), load<f32x16>(t + 16));
    }
  }
}

void gated(const MatrixView& gate, const ActView& act, const GateFactor& factor, int64_t rows, int64_t begin,
           int64_t end, const ActView& out) {
  static_assert(paceline::kUnit == kGroup);  // a unit's outputs are one group of the next matrix's columns
  paceline::check_fits(gate, act);
  if (factor.up) paceline::check_fits(*factor.up, factor.up_act);
  const PanelKernel gate_kernel = kPanelKernels[size_t(gate.format)];
  const PanelKernel up_kernel = factor.up ? kPanelKernels[size_t(factor.up->format)] : nullptr;
  for_row_chunks(gate, rows, begin, end, [&](int64_t unit, int64_t row, int count) {
    f32x16 y[kUnitPanels][kRows], z[kUnitPanels][kRows];
    const int64_t first = unit * kUnitPanels;
    const int panels = int(std::min<int64_t>(gate.panels() - first, kUnitPanels));
    for (int m = 0; m < count; ++m)
      y[1][m] = z[1][m] = splat(0.0f);  // a last one alone: the next matrix's padding is zero
    gate_kernel(gate.panel(first), gate.stride, panels, act.tile(row / kTile), count, y);
    if (up_kernel)
      up_kernel(factor.up->panel(first), factor.up->stride, panels, factor.up_act.tile(row / kTile), count, z);
    else
      for (int p = 0; p < panels; ++p)
        for (int m = 0; m < count; ++m)
          z[p][m] = load<f32x16>(factor.given + (row + m) * factor.ld + (first + p) * kPanel);
    for (int m = 0; m < count; ++m) pack_group(out, row + m, unit, gelu(y[0][m]) * z[0][m], gelu(y[1][m]) * z[1][m]);
    if (unit + 1 < gate.units()) return;
    for (int m = 0; m < count; ++m)  // zeros for the columns that pad the rows to whole blocks
      for (int64_t group = unit + 1; group < out.groups(); ++group)
        pack_group(out, row + m, group, splat(0.0f), splat(0.0f));
  });
}

}  // namespace PACELINE_NAMESPACE
