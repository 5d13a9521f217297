// Any processor: vectors of four lanes as the compiler lowers them, no intrinsics.
#pragma once

namespace PACELINE_NAMESPACE {

constexpr int kLanes = 4;  // 32-bit lanes of a register
#if __aarch64__
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

}  // namespace PACELINE_NAMESPACE

#define PACELINE_PANELS "kernels/panels_narrow.hpp"
#include "kernels/registers.hpp"
#include "kernels/isa/portable.hpp"

namespace PACELINE_NAMESPACE {

using portable::dot2;
using portable::multiply;
using portable::store_bytes;
using portable::widen_halves;

inline f32x16 round_even(f32x16 x) {
  const f32x16 magic = splat(12582912.0f);
  return (x + magic) - magic;
}

inline f32x16 from_half(const uint16_t* p) {
  // Shift exponent and mantissa into place, then multiply by 2^112: exact, subnormals included. Scales are finite.
  const u32x16 half = widen_halves(p);
  const f32x16 magnitude = bits<f32x16>((half & 0x7fff) << 13) * splat(5.192296858534828e33f);
  return bits<f32x16>(bits<u32x16>(magnitude) | ((half & 0x8000) << 16));
}

// Sums of two products fit 16 bits: 2 * 128 * 127 for bytes, and for nibbles even those of a whole group, 16 * 15 * 127.
template <OperandKind O> using GroupSum = std::conditional_t<O == OperandKind::nibbles, i16x32, i32x16>;

inline i32x16 total(i32x16 sum) { return sum; }
inline i32x16 total(i16x32 sum) {
  return map([](i16 s) { return (((i32)s << 16) >> 16) + ((i32)s >> 16); }, sum);
}

template <OperandKind O>
inline GroupSum<O> dot4(GroupSum<O> sum, u8x64 w, u8x64 a) {
  const i16x32 pairs = map(
      [](u8 u, u8 v) {
        const i16 x = (i16)u, y = (i16)v;
        return ((x << 8) >> 8) * ((y << 8) >> 8) + (x >> 8) * (y >> 8);
      },
      w, a);
  if constexpr (O == OperandKind::nibbles) return sum + pairs;
  else return sum + total(pairs);
}

}  // namespace PACELINE_NAMESPACE
