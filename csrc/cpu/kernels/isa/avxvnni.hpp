// AVX-VNNI: four products of bytes are added in 32 bits by one instruction. Compiled for processors that have it, in VEX
// encoding, and, as the set avxvnni_evex, for those with AVX-512 VNNI, to test it there.
#pragma once

#include "kernels/isa/avx2_lanes.hpp"

namespace PACELINE_NAMESPACE {

inline __m256i dot_bytes(__m256i sum, __m256i w, __m256i a) {
#if __AVXVNNI__
  return _mm256_dpbusd_avx_epi32(sum, w, a);
#else
  return _mm256_dpbusd_epi32(sum, w, a);
#endif
}

inline u8x64 lookup(const int8_t* values, u8x64 index) {
  const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  return bytes_of(_mm_xor_si128(sixteen, _mm_set1_epi8(char(-128))), index);
}

constexpr bool kUnsignedBytes = true;
template <int> using PartSum = i32x16;
template <int> constexpr int kRun = 8;  // a whole group

PACELINE_INLINE inline i32x16 total(i32x16 sum) { return sum; }

template <int>
PACELINE_INLINE inline i32x16 dot4(i32x16 sum, u8x64 w, u8x64 a) {
  return map([](i32 s, u8 x, u8 y) { return (i32)dot_bytes((__m256i)s, (__m256i)x, (__m256i)y); }, sum, w, a);
}

}  // namespace PACELINE_NAMESPACE
