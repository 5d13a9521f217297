// Two registers of eight lanes hold a panel's sixteen outputs: what AVX2 and AVX-VNNI have in common (with FMA and F16C).
#pragma once

#include <immintrin.h>

namespace PACELINE_NAMESPACE {

constexpr int kLanes = 8;  // 32-bit lanes of a register

// Measured: a few sums more than the registers hold cost less than taking weights apart again for the next rows.
constexpr int kFloatRows = 3, kPairRows = 4, kIntegerRows = 6;

}  // namespace PACELINE_NAMESPACE

#define PACELINE_PANELS "kernels/panels_narrow.hpp"
#include "kernels/registers.hpp"
#include "kernels/isa/portable.hpp"

namespace PACELINE_NAMESPACE {

using portable::dot2;
using portable::store_bytes;

inline f32 fused(f32 a, f32 b, f32 c) { return (f32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

inline f32x16 round_even(f32x16 x) {
  return map([](f32 v) { return (f32)_mm256_round_ps((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }, x);
}

inline u32x16 widen_halves(const uint16_t* p) { return convert<u32x16>(load<u16x16>(p)); }

inline f32x16 from_half(const uint16_t* p) {
  return map([](u16 h) { return (f32)_mm256_cvtph_ps((__m128i)h); }, load<u16x16>(p));
}

inline i32x16 widen_bytes(const int8_t* p) {
  return {{(i32)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))),
           (i32)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))}};
}

// For bytes 0..15 those of `sixteen`.
inline u8x64 bytes_of(__m128i sixteen, u8x64 index) {
  const __m256i table = _mm256_broadcastsi128_si256(sixteen);
  return map([table](u8 i) { return (u8)_mm256_shuffle_epi8(table, (__m256i)i); }, index);
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
