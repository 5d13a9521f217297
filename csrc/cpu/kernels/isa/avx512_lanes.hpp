// AVX-512 with VNNI: a register holds a panel's sixteen outputs. What the sets with and without BF16 have in common.
#pragma once

#include <immintrin.h>

namespace PACELINE_NAMESPACE {

constexpr int kLanes = 16;  // 32-bit lanes of a register

}  // namespace PACELINE_NAMESPACE

#define PACELINE_PANELS "kernels/panels_wide.hpp"
#include "kernels/registers.hpp"

namespace PACELINE_NAMESPACE {

inline f32 fused(f32 a, f32 b, f32 c) { return (f32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }

inline f32x16 round_even(f32x16 x) {
  return (f32x16)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline u32x16 widen_halves(const uint16_t* p) { return convert<u32x16>(load<u16x16>(p)); }

inline f32x16 from_half(const uint16_t* p) {
  return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline void store_bytes(int8_t* p, i32x16 v) {
  typedef int8_t i8x16 __attribute__((vector_size(16)));
  store(p, __builtin_convertvector(v, i8x16));
}

inline i32x16 widen_bytes(const int8_t* p) {
  return (i32x16)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

constexpr bool kUnsignedBytes = true;

inline u8x64 lookup(const int8_t* values, u8x64 index) {
  const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  const __m512i table = _mm512_broadcast_i32x4(_mm_xor_si128(sixteen, _mm_set1_epi8(char(-128))));
  return (u8x64)_mm512_shuffle_epi8(table, (__m512i)index);
}

// acc[i] += w[4 i + 0..3] * a[4 i + 0..3]: unsigned weight bytes by signed ones. Exact.
inline i32x16 dot4(i32x16 acc, u8x64 w, u8x64 a) {
  return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)a);
}

inline void multiply(u32x16 a, uint32_t m, u32x16& low, u32x16& high) {
  const __m512i factor = _mm512_set1_epi32(int32_t(m));
  const __m512i even = _mm512_mul_epu32((__m512i)a, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
  low = (u32x16)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  high = (u32x16)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
}

}  // namespace PACELINE_NAMESPACE
