// NEON with the dot product (Armv8.2): four registers hold a panel's sixteen outputs.
#pragma once

#include <arm_neon.h>

namespace PACELINE_NAMESPACE {

constexpr int kLanes = 4;                                       // 32-bit lanes of a register
constexpr int kFloatRows = 2, kPairRows = 2, kIntegerRows = 4;  // whose sums take half of the registers

}  // namespace PACELINE_NAMESPACE

#define PACELINE_PANELS "kernels/panels_narrow.hpp"
#include "kernels/registers.hpp"
#include "kernels/isa/portable.hpp"

namespace PACELINE_NAMESPACE {

using portable::dot2;
using portable::multiply;
using portable::store_bytes;
using portable::widen_halves;

inline f32 fused(f32 a, f32 b, f32 c) { return (f32)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }

inline f32x16 round_even(f32x16 x) {
  return map([](f32 v) { return (f32)vrndnq_f32((float32x4_t)v); }, x);
}

inline f32x16 from_half(const uint16_t* p) {
  return map([](u16 h) { return (f32)vcvt_f32_f16((float16x4_t)h); }, load<u16x16>(p));
}

inline i32x16 widen_bytes(const int8_t* p) {
  const int8x16_t v = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(v)), high = vmovl_s8(vget_high_s8(v));
  return {{(i32)vmovl_s16(vget_low_s16(low)), (i32)vmovl_s16(vget_high_s16(low)), (i32)vmovl_s16(vget_low_s16(high)),
           (i32)vmovl_s16(vget_high_s16(high))}};
}

inline u8x64 lookup(const int8_t* values, u8x64 index) {
  const uint8x16_t table = vreinterpretq_u8_s8(vld1q_s8(values));
  return map([table](u8 i) { return (u8)vqtbl1q_u8(table, (uint8x16_t)i); }, index);
}

constexpr bool kUnsignedBytes = false;
template <int> using PartSum = i32x16;
template <int> constexpr int kRun = 8;  // a whole group

PACELINE_INLINE inline i32x16 total(i32x16 sum) { return sum; }

template <int>
PACELINE_INLINE inline i32x16 dot4(i32x16 sum, u8x64 w, u8x64 a) {
  return map([](i32 s, u8 x, u8 y) { return (i32)vdotq_s32((int32x4_t)s, (int8x16_t)x, (int8x16_t)y); }, sum, w, a);
}

}  // namespace PACELINE_NAMESPACE
