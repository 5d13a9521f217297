// AVX2 with FMA and F16C: two registers hold a panel's sixteen outputs.
#pragma once

#include <immintrin.h>

namespace PACELINE_NAMESPACE {

constexpr int kLanes = 8;  // 32-bit lanes of a register
constexpr int kRegisters = 16;

}  // namespace PACELINE_NAMESPACE

#define PACELINE_PANELS "kernels/panels_narrow.hpp"
#include "kernels/registers.hpp"
#include "kernels/isa/portable.hpp"

namespace PACELINE_NAMESPACE {

using portable::dot2;
using portable::store_bytes;

inline f32x16 round_even(f32x16 x) {
  return map([](f32 v) { return (f32)_mm256_round_ps((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }, x);
}

inline u32x16 widen_halves(const uint16_t* p) { return convert<u32x16>(load<u16x16>(p)); }

inline f32x16 from_half(const uint16_t* p) {
  return map([](u16 h) { return (f32)_mm256_cvtph_ps((__m128i)h); }, load<u16x16>(p));
}

// Sums of two products fit 16 bits: 2 * 128 * 127 for bytes, and for nibbles even those of a whole group, 16 * 15 * 127.
template <OperandKind O> using GroupSum = std::conditional_t<O == OperandKind::nibbles, i16x32, i32x16>;

inline i32x16 total(i32x16 sum) { return sum; }
inline i32x16 total(i16x32 sum) {
  return map([](i16 s) { return (i32)_mm256_madd_epi16((__m256i)s, _mm256_set1_epi16(1)); }, sum);
}

template <OperandKind O>
inline GroupSum<O> dot4(GroupSum<O> sum, u8x64 w, u8x64 a) {
  // maddubs takes unsigned by signed bytes: of signed weights the magnitudes, their signs given to the activations.
  const i16x32 pairs = map(
      [](u8 x, u8 y) {
        const __m256i u = (__m256i)x, v = (__m256i)y;
        if constexpr (O == OperandKind::nibbles) return (i16)_mm256_maddubs_epi16(u, v);
        else return (i16)_mm256_maddubs_epi16(_mm256_abs_epi8(u), _mm256_sign_epi8(v, u));
      },
      w, a);
  if constexpr (O == OperandKind::nibbles) return sum + pairs;
  else return sum + total(pairs);
}

inline void multiply(u32x16 a, uint32_t m, u32x16& low, u32x16& high) {
  for (int i = 0; i < 2; ++i) {
    const __m256i factor = _mm256_set1_epi32(int32_t(m)), x = (__m256i)a.part[i];
    const __m256i even = _mm256_mul_epu32(x, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor);
    low.part[i] = (u32)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    high.part[i] = (u32)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  }
}

}  // namespace PACELINE_NAMESPACE
