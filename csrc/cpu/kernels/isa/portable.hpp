// Operations in plain C++, for instruction sets that have no instruction for them.
//
// An instruction set's file defines, or takes from here:
//   fused         a * b + c of one register, rounded once
//   round_even    to the nearest integer, ties to even, for |x| < 2^22
//   widen_halves  sixteen 16-bit numbers as 32-bit ones
//   from_half     sixteen fp16 as floats
//   store_bytes   lanes of integers as bytes; they fit
//   widen_bytes   sixteen signed bytes as integers
//   lookup        for bytes 0..15 those of sixteen values; with 128 added if kUnsignedBytes
//   multiply      low and high halves of the products of lanes with a number
//   dot2          acc[i] += w[2 i] * a[0] + w[2 i + 1] * a[1] over the two bfloat16 at `a`
//   dot4          the same of four 8-bit integers, weights unsigned if kUnsignedBytes. With panels_narrow.hpp a
//                 `PartSum<Largest>` takes kRun<Largest> times four weights up to the largest by four activations,
//                 exactly, and `total` gives the sixteen sums. Weights are unsigned but where the largest is 128.
#pragma once

#include "kernels/registers.hpp"

namespace PACELINE_NAMESPACE::portable {

#ifdef __FP_FAST_FMAF
inline f32 fused(f32 a, f32 b, f32 c) {
  f32 sum;
  for (int i = 0; i < kLanes; ++i) sum[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return sum;
}
#else
// Without an instruction for it: two lanes at a time in double, where products of floats are exact.
typedef double f64x2 __attribute__((vector_size(16)));
typedef uint64_t u64x2 __attribute__((vector_size(16)));
typedef float f32x2 __attribute__((vector_size(8)));

// a * b + c, of the two doubles around it the one with an odd last bit: rounding that to float gives what rounding the
// exact sum would.
inline f64x2 odd_sum(f64x2 a, f64x2 b, f64x2 c) {
  const f64x2 product = a * b, sum = product + c, back = sum - product;
  const f64x2 error = (product - (sum - back)) + (c - back);
  const u64x2 inexact = (u64x2)(error > 0) | (u64x2)(error < 0);  // not for NaN
  const u64x2 to_odd = inexact & ~(u64x2)sum & 1, toward_zero = ((u64x2)error ^ (u64x2)sum) >> 63;
  return (f64x2)((u64x2)sum + to_odd - 2 * (to_odd & toward_zero));
}

inline f32 fused(f32 a, f32 b, f32 c) {
  static_assert(kLanes == 4);
  const auto low = [](f32 x) { return __builtin_convertvector(__builtin_shufflevector(x, x, 0, 1), f64x2); };
  const auto high = [](f32 x) { return __builtin_convertvector(__builtin_shufflevector(x, x, 2, 3), f64x2); };
  const auto rounded = [](f64x2 x, f64x2 y) {
    return __builtin_shufflevector(__builtin_convertvector(x, f32x2), __builtin_convertvector(y, f32x2), 0, 1, 2, 3);
  };
  const f64x2 x = low(a) * low(b) + low(c), y = high(a) * high(b) + high(c);
  // A sum rounded to double is rounded wrongly to float only where it lies in the middle between two normal floats, or
  // among the subnormal ones.
  const u32 last = __builtin_shufflevector((u32)x, (u32)y, 0, 2, 4, 6);
  const i32 first = (i32)__builtin_shufflevector((u32)x, (u32)y, 1, 3, 5, 7) & 0x7fffffff;
  const u64x2 doubtful = (u64x2)((last & 0x1fffffff) == 0x10000000) | (u64x2)(first < 0x38100000);
  if (__builtin_expect(doubtful[0] | doubtful[1], 0))
    return rounded(odd_sum(low(a), low(b), low(c)), odd_sum(high(a), high(b), high(c)));
  return rounded(x, y);
}
#endif

template <class V = u32x16>  // of four lanes a register
inline V widen_halves(const uint16_t* p) {
  // GCC converts vectors of half a register one element at a time.
  typedef uint16_t whole __attribute__((vector_size(16)));
  using R = Register<V>;
  const whole a = load<whole>(p), b = load<whole>(p + 8), zero = {};
  return V{{(R)__builtin_shufflevector(a, zero, 0, 8, 1, 9, 2, 10, 3, 11),
            (R)__builtin_shufflevector(a, zero, 4, 12, 5, 13, 6, 14, 7, 15),
            (R)__builtin_shufflevector(b, zero, 0, 8, 1, 9, 2, 10, 3, 11),
            (R)__builtin_shufflevector(b, zero, 4, 12, 5, 13, 6, 14, 7, 15)}};
}

inline i32x16 widen_bytes(const int8_t* p) {
  int32_t t[16];
  for (int i = 0; i < 16; ++i) t[i] = p[i];
  return load<i32x16>(t);
}

inline u8x64 lookup(const int8_t* values, u8x64 index) {
  uint8_t t[64];
  store(t, index);
  for (uint8_t& x : t) x = uint8_t(values[x & 15]);
  return load<u8x64>(t);
}

// For processors that add two products of bytes in 16 bits: how many operands' sums these hold, each two weights by two
// activations up to 127. A power of two, and at most a group's. A single one is worth no sums in 16 bits.
constexpr int operands_in_16_bits(int largest) {
  int run = 1;
  while (run < 8 && 2 * run * 2 * largest * 127 <= 32767) run *= 2;
  return run;
}
template <int Largest> constexpr bool fits_16_bits = operands_in_16_bits(Largest) > 1;
template <int Largest> constexpr int kRun = fits_16_bits<Largest> ? operands_in_16_bits(Largest) : 8;

inline void store_bytes(int8_t* p, i32x16 v) {
  int32_t t[16];
  store(t, v);
  for (int i = 0; i < 16; ++i) p[i] = int8_t(t[i]);
}

inline void multiply(u32x16 a, uint32_t m, u32x16& low, u32x16& high) {
  uint32_t x[16], l[16], h[16];
  store(x, a);
  for (int i = 0; i < 16; ++i) {
    const uint64_t product = uint64_t(x[i]) * m;
    l[i] = uint32_t(product);
    h[i] = uint32_t(product >> 32);
  }
  low = load<u32x16>(l);
  high = load<u32x16>(h);
}

inline f32x16 dot2(f32x16 acc, u32x16 w, const uint8_t* a) {
  const u32x16 pair = broadcast<u32x16>(a);
  acc = fma(bits<f32x16>(w << 16), bits<f32x16>(pair << 16), acc);
  return fma(bits<f32x16>(w & 0xffff0000u), bits<f32x16>(pair & 0xffff0000u), acc);
}

}  // namespace PACELINE_NAMESPACE::portable
