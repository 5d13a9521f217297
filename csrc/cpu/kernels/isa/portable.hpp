// Operations in plain C++, for instruction sets that have no instruction for them.
//
// An instruction set's file defines, or takes from here:
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
