// Any processor: vectors of four lanes as the compiler lowers them, no intrinsics.
#pragma once

namespace PACELINE_NAMESPACE {

constexpr int kLanes = 4;  // 32-bit lanes of a register
#if __aarch64__
constexpr int kFloatRows = 2, kPairRows = 2, kIntegerRows = 2;  // whose sums take half of the registers
#else
constexpr int kFloatRows = 1, kPairRows = 1, kIntegerRows = 1;
#endif

}  // namespace PACELINE_NAMESPACE

#define PACELINE_PANELS "kernels/panels_narrow.hpp"
#include "kernels/registers.hpp"
#include "kernels/isa/portable.hpp"

namespace PACELINE_NAMESPACE {

using portable::dot2;
using portable::lookup;
using portable::multiply;
using portable::store_bytes;
using portable::widen_bytes;
using portable::widen_halves;

inline f32 fused(f32 a, f32 b, f32 c) { return portable::fused(a, b, c); }

inline f32x16 round_even(f32x16 x) {
  const f32x16 magic = splat(12582912.0f);
  return (x + magic) - magic;
}

inline f32x16 from_half(const uint16_t* p) {
  // Shift exponent and mantissa into place, then multiply by 2^112: exact, subnormals included. The largest exponent
  // stands for infinity and NaN, which or-ing float's largest one in restores.
  const u32x16 half = widen_halves(p);
  const f32x16 magnitude = bits<f32x16>((half & 0x7fff) << 13) * splat(5.192296858534828e33f);
  const u32x16 special = map([](u32 h) { return (u32)((h & 0x7c00) == 0x7c00) & 0x7f800000; }, half);
  return bits<f32x16>(bits<u32x16>(magnitude) | special | ((half & 0x8000) << 16));
}

constexpr bool kUnsignedBytes = false;
template <int Largest> using PartSum = std::conditional_t<portable::fits_16_bits<Largest>, i16x32, i32x16>;
template <int Largest> constexpr int kRun = portable::kRun<Largest>;

PACELINE_INLINE inline i32x16 total(i32x16 sum) { return sum; }
PACELINE_INLINE inline i32x16 total(i16x32 sum) {
  return map([](i16 s) { return (((i32)s << 16) >> 16) + ((i32)s >> 16); }, sum);
}

template <int Largest>
PACELINE_INLINE inline PartSum<Largest> dot4(PartSum<Largest> sum, u8x64 w, u8x64 a) {
  const i16x32 pairs = map(
      [](u8 u, u8 v) {
        const i16 x = (i16)u, y = (i16)v;
        return ((x << 8) >> 8) * ((y << 8) >> 8) + (x >> 8) * (y >> 8);
      },
      w, a);
  typedef uint16_t whole __attribute__((vector_size(4 * kLanes)));  // of signed numbers no sum may overflow
  if constexpr (portable::fits_16_bits<Largest>)
    return map([](i16 s, i16 p) { return (i16)((whole)s + (whole)p); }, sum, pairs);
  else return sum + total(pairs);
}

}  // namespace PACELINE_NAMESPACE
