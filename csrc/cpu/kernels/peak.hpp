// How fast a processor can multiply and add at best: the dot product of a weight format alone, in registers. It is built
// on the operations of the matrix kernels, so an instruction set needs nothing more. Included by kernels.cpp.
#pragma once

#include <array>

#include "kernels/operands.hpp"

namespace PACELINE_NAMESPACE {

// Rows whose sums, ten registers or so, hide the latency of additions and leave registers for the rest.
template <Format F>
constexpr int kPeakRows = kLanes == 16                         ? 10
                          : kLanes == 4                        ? 3
                          : traits(F).act() == ActFormat::bf16 ? 4
                                                               : 5;

// p, opaque to the compiler.
PACELINE_INLINE inline const uint8_t* unknown(const uint8_t* p) {
  asm("" : "+r"(p));
  return p;
}

// One operand of weights by the activations at `a`, as panel kernels do it.
template <Format F>
PACELINE_INLINE inline auto peak_dot(auto sum, auto w, const uint8_t* a) {
  if constexpr (!kIntegers<F>) return dot_lane(sum, w, a);
  else if constexpr (requires { dot4(sum, w, w); }) return dot4(sum, w, broadcast<u8x64>(a));
  else return dot4<kLargest<F>>(sum, w, broadcast<u8x64>(a));
}

template <Format F>
PACELINE_INLINE inline auto peak_sum(auto w) {
  if constexpr (!kIntegers<F>) return splat(0.0f);
  else if constexpr (requires { dot4(splat(0), w, w); }) return splat(0);
  else return decltype(dot4<kLargest<F>>({}, w, w)){};
}

template <Format F>
PACELINE_INLINE inline auto peak_weights(const uint8_t* w) {
  if constexpr (kIntegers<F>) return load<u8x64>(w);
  else return plain_weights<F>(w);
}

// Multiply-adds of `steps` operands by kPeakRows rows.
template <Format F>
int64_t peak_of(int64_t steps) {
  alignas(64) uint8_t weights[64], sink[64];
  std::memset(weights, 60, sizeof weights);    // as floats of any width neither large nor subnormal
  const uint8_t acts[4] = {60, 196, 60, 196};  // sums of integers stay 0
  auto w = peak_weights<F>(unknown(weights));
  const uint8_t* a = acts;
  decltype(peak_sum<F>(w)) sums[kPeakRows<F>];
  // unrolled: loops over the sums would keep them in memory
  unrolled<kPeakRows<F>>([&]<int m>() PACELINE_INLINE { sums[m] = peak_sum<F>(w); });
  for (int64_t i = 0; i < steps; ++i) {
    w = in_register(w);
    unrolled<kPeakRows<F>>([&]<int m>() PACELINE_INLINE {
      a = unknown(a);
      sums[m] = peak_dot<F>(sums[m], w, a);
    });
  }
  unrolled<kPeakRows<F>>([&]<int m>() PACELINE_INLINE {
    store(sink, sums[m]);
    asm volatile("" : : "r"(sink) : "memory");
  });
  return steps * kPeakRows<F> * kPanel * lane_columns(traits(F).act());
}

int64_t dot_peak(Format format, int64_t steps) {
  constexpr auto loops = []<int... F>(std::integer_sequence<int, F...>) {
    return std::array{peak_of<Format(F)>...};
  }(std::make_integer_sequence<int, paceline::kFormatCount>());
  return loops[size_t(format)](steps);
}

}  // namespace PACELINE_NAMESPACE
