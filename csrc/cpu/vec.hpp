// Sixteen-lane vectors: one source for every instruction set.
//
// Compilers lower these to whatever the file is compiled for (one AVX-512 register, two of AVX2, four of SSE or NEON);
// only the dot products and the half-precision loads need intrinsics. Everything is in a namespace named after the
// instruction set, so that no inline function compiled for one can be linked into another.
#pragma once

#include <cstdint>
#include <cstring>

#if PACELINE_AVX512 || PACELINE_AVX2
#include <immintrin.h>
#endif

namespace PACELINE_ISA {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));

template <class V, class T>
inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V, class T>
inline void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

inline f32x16 splat(float x) { return f32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
inline i32x16 splat(int32_t x) { return i32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

// a * b + c. Contracted to one fused operation where the instruction set has it, always or never within one file.
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return a * b + c; }

inline f32x16 max(f32x16 a, f32x16 b) { return a > b ? a : b; }

// Sums and maxima over the lanes, in a fixed order.
inline float sum(f32x16 v) {
  float t[16];
  store(t, v);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) t[i] += t[i + width];
  return t[0];
}

inline float max_lane(f32x16 v) {
  float t[16];
  store(t, v);
  float top = t[0];
  for (int i = 1; i < 16; ++i) top = t[i] > top ? t[i] : top;
  return top;
}

inline f32x16 from_bf16(u16x16 v) { return (f32x16)(__builtin_convertvector(v, u32x16) << 16); }

inline u16x16 to_bf16(f32x16 v) {  // to nearest, ties to even; the inputs are finite
  const u32x16 bits = (u32x16)v;
  return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, u16x16);
}

// Elements of a K/V cache: float or bfloat16 in memory, float in registers.
inline f32x16 widen(const float* p) { return load<f32x16>(p); }
inline f32x16 widen(const uint16_t* p) { return from_bf16(load<u16x16>(p)); }
inline void narrow(float* p, f32x16 v) { store(p, v); }
inline void narrow(uint16_t* p, f32x16 v) { store(p, to_bf16(v)); }

inline f32x16 round_even(f32x16 x) {  // |x| < 2^22
  const f32x16 magic = splat(12582912.0f);
  return (x + magic) - magic;
}

// e^x to about 2 ulp for x in [-87, 88], clamped outside (Cephes' polynomial on [-ln 2 / 2, ln 2 / 2]).
inline f32x16 exp(f32x16 x) {
  x = x < splat(-87.0f) ? splat(-87.0f) : x;
  x = x > splat(88.0f) ? splat(88.0f) : x;
  const f32x16 n = round_even(x * splat(1.44269504f));
  const f32x16 r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
  f32x16 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  const f32x16 e = fma(p * r, r, r) + splat(1.0f);
  const i32x16 power = (__builtin_convertvector(n, i32x16) + 127) << 23;
  return e * (f32x16)power;
}

// tanh x = 1 - 2 / (e^2x + 1).
inline f32x16 tanh(f32x16 x) { return splat(1.0f) - splat(2.0f) / (exp(x + x) + splat(1.0f)); }

// gelu_pytorch_tanh: x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
inline f32x16 gelu(f32x16 x) {
  const f32x16 inner = splat(0.79788456f) * fma(splat(0.044715f) * x * x, x, x);
  return x / (splat(1.0f) + exp(splat(-2.0f) * inner));
}

// Sixteen fp16 to float.
inline f32x16 from_half(const uint16_t* p) {
#if PACELINE_AVX512
  return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif PACELINE_AVX2
  f32x16 v;
  for (int i = 0; i < 2; ++i) {
    const __m256 half = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i)));
    std::memcpy(reinterpret_cast<char*>(&v) + 32 * i, &half, 32);
  }
  return v;
#else
  // Shift exponent and mantissa into place, then multiply by 2^112: exact, subnormals included. Scales are finite.
  const u32x16 bits = __builtin_convertvector(load<u16x16>(p), u32x16);
  const f32x16 magnitude = (f32x16)((bits & 0x7fff) << 13) * splat(5.192296858534828e33f);
  return (f32x16)((u32x16)magnitude | ((bits & 0x8000) << 16));
#endif
}

// acc[i] += w[4 i + 0..3] * a[0..3]: unsigned weight bytes by the four signed bytes at `a`. Exact.
inline i32x16 dot4(i32x16 acc, u8x64 w, const uint8_t* a) {
  int32_t lane;
  std::memcpy(&lane, a, 4);
#if PACELINE_AVX512
  return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(lane));
#elif PACELINE_AVX2
  // maddubs would saturate on 8-bit weights; widen to 16 bits and use madd, which cannot.
  const __m256i a16 = _mm256_cvtepi8_epi16(_mm_set1_epi32(lane));
  i32x16 out = acc;
  for (int i = 0; i < 2; ++i) {
    __m256i half, sum;
    std::memcpy(&half, reinterpret_cast<const char*>(&w) + 32 * i, 32);
    std::memcpy(&sum, reinterpret_cast<const char*>(&acc) + 32 * i, 32);
    const __m256i low = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(half)), a16);
    const __m256i high = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_extracti128_si256(half, 1)), a16);
    const __m256i pairs = _mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), 0xd8);
    sum = _mm256_add_epi32(sum, pairs);
    std::memcpy(reinterpret_cast<char*>(&out) + 32 * i, &sum, 32);
  }
  return out;
#else
  const i32x16 bits = (i32x16)w;
  const int8_t* b = reinterpret_cast<const int8_t*>(&lane);
  for (int i = 0; i < 4; ++i) acc += ((bits >> (8 * i)) & 255) * splat(int32_t(b[i]));
  return acc;
#endif
}

// acc[i] += w[2 i] * a[0] + w[2 i + 1] * a[1] over bfloat16 pairs.
inline f32x16 dot2(f32x16 acc, u32x16 w, const uint8_t* a) {
  uint32_t lane;
  std::memcpy(&lane, a, 4);
#if PACELINE_AVX512
  return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(int32_t(lane)));
#else
  const u32x16 pair = (u32x16)splat(int32_t(lane));
  acc = fma((f32x16)(w << 16), (f32x16)(pair << 16), acc);
  return fma((f32x16)(w & 0xffff0000u), (f32x16)(pair & 0xffff0000u), acc);
#endif
}

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace PACELINE_ISA
