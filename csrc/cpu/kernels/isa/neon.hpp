// NEON with the dot product (Armv8.2): four registers hold a panel's sixteen outputs.
#pragma once

#include <arm_neon.h>

namespace PACELINE_NAMESPACE {

constexpr int kLanes = 4;  // 32-bit lanes of a register
constexpr int kRegisters = 32;

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
  return map([](f32 v) { return (f32)vrndnq_f32((float32x4_t)v); }, x);
}

inline f32x16 from_half(const uint16_t* p) {
  return map([](u16 h) { return (f32)vcvt_f32_f16((float16x4_t)h); }, load<u16x16>(p));
}

template <OperandKind> using GroupSum = i32x16;

inline i32x16 total(i32x16 sum) { return sum; }

template <OperandKind>
inline i32x16 dot4(i32x16 sum, u8x64 w, u8x64 a) {
  return map([](i32 s, u8 x, u8 y) { return (i32)vdotq_s32((int32x4_t)s, (int8x16_t)x, (int8x16_t)y); }, sum, w, a);
}

}  // namespace PACELINE_NAMESPACE
