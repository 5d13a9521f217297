// AVX2: products of bytes are added in 16 bits.
#pragma once

#include "kernels/isa/avx2_lanes.hpp"

namespace PACELINE_NAMESPACE {

inline u8x64 lookup(const int8_t* values, u8x64 index) {
  return bytes_of(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)), index);
}

constexpr bool kUnsignedBytes = false;
template <int Largest> using PartSum = std::conditional_t<portable::fits_16_bits<Largest>, i16x32, i32x16>;
template <int Largest> constexpr int kRun = portable::kRun<Largest>;

PACELINE_INLINE inline i32x16 total(i32x16 sum) { return sum; }
PACELINE_INLINE inline i32x16 total(i16x32 sum) {
  return map([](i16 s) { return (i32)_mm256_madd_epi16((__m256i)s, _mm256_set1_epi16(1)); }, sum);
}

template <int Largest>
PACELINE_INLINE inline PartSum<Largest> dot4(PartSum<Largest> sum, u8x64 w, u8x64 a) {
  // maddubs takes unsigned by signed bytes: of signed weights the magnitudes, their signs given to the activations.
  const i16x32 pairs = map(
      [](u8 x, u8 y) {
        const __m256i u = (__m256i)x, v = (__m256i)y;
        if constexpr (Largest < 128) return (i16)_mm256_maddubs_epi16(u, v);
        else return (i16)_mm256_maddubs_epi16(_mm256_abs_epi8(u), _mm256_sign_epi8(v, u));
      },
      w, a);
  if constexpr (portable::fits_16_bits<Largest>)
    return map([](i16 s, i16 p) { return (i16)_mm256_add_epi16((__m256i)s, (__m256i)p); }, sum, pairs);
  else return sum + total(pairs);
}

}  // namespace PACELINE_NAMESPACE
