// Sixteen-lane vectors: one source for every instruction set.
//
// One register holds sixteen lanes with AVX-512, eight with AVX2 and four elsewhere. Compilers can lower vectors wider
// than a register, but GCC then keeps every value in memory, so such a vector is a struct of registers here. Only dot
// products, rounding and half-precision loads need intrinsics. Everything is in a namespace named after the instruction
// set, so that no inline function compiled for one can be linked into another.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if PACELINE_AVX512 || PACELINE_AVX2
#include <immintrin.h>
#elif PACELINE_NEON
#include <arm_neon.h>
#endif

namespace PACELINE_ISA {

// A vector of N registers.
template <class V, int N>
struct Parts {
  using Part = V;
  V part[N];
};

#if PACELINE_AVX512
constexpr int kLanes = 16;  // of one register
template <class V> using Sixteen = V;
#elif PACELINE_AVX2
constexpr int kLanes = 8;
template <class V> using Sixteen = Parts<V, 2>;
#else
constexpr int kLanes = 4;
template <class V> using Sixteen = Parts<V, 4>;
#endif

#if PACELINE_AVX512 || __aarch64__
constexpr int kRegisterBytes = 32 * kLanes * 4;  // of all registers
#else
constexpr int kRegisterBytes = 16 * kLanes * 4;
#endif

typedef float f32 __attribute__((vector_size(4 * kLanes)));
typedef int32_t i32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t u32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t u16 __attribute__((vector_size(2 * kLanes)));
typedef int16_t i16 __attribute__((vector_size(4 * kLanes)));  // i16 and u8: as many as fill a register
typedef uint8_t u8 __attribute__((vector_size(4 * kLanes)));

using f32x16 = Sixteen<f32>;
using i32x16 = Sixteen<i32>;
using u32x16 = Sixteen<u32>;
using u16x16 = Sixteen<u16>;
using i16x32 = Sixteen<i16>;
using u8x64 = Sixteen<u8>;

template <class V>
concept Split = requires { typename V::Part; };

// A register of V, and what one of its lanes holds.
template <class V>
struct RegisterOf {
  using type = V;
};
template <Split V>
struct RegisterOf<V> {
  using type = typename V::Part;
};
template <class V> using Register = typename RegisterOf<V>::type;
template <class V> using Element = std::remove_cvref_t<decltype(Register<V>{}[0])>;

// f for the registers of the vectors, the first ones, the second ones and so on.
template <class F, class... V>
inline auto map(F f, V... v) {
  if constexpr ((Split<V> && ...)) {
    const auto at = [&](auto i) { return f(v.part[i]...); };
    return [&]<int... I>(std::integer_sequence<int, I...>) {
      return Parts<decltype(at(0)), sizeof...(I)>{{at(I)...}};
    }(std::make_integer_sequence<int, 16 / kLanes>());
  } else {
    return f(v...);
  }
}

#define PACELINE_OPERATOR(op)                                                        \
  template <class V, int N>                                                          \
  inline Parts<V, N> operator op(Parts<V, N> a, Parts<V, N> b) {                     \
    return map([](V x, V y) { return x op y; }, a, b);                               \
  }                                                                                  \
  template <class V, int N>                                                          \
  inline Parts<V, N> operator op(Parts<V, N> a, Element<V> b) {                      \
    return map([b](V x) { return x op b; }, a);                                      \
  }
PACELINE_OPERATOR(+)
PACELINE_OPERATOR(-)
PACELINE_OPERATOR(*)
PACELINE_OPERATOR(/)
PACELINE_OPERATOR(&)
PACELINE_OPERATOR(|)
PACELINE_OPERATOR(^)
PACELINE_OPERATOR(<<)
PACELINE_OPERATOR(>>)
#undef PACELINE_OPERATOR

// A vector of the same register again and again; of the same element.
template <class V>
inline V repeat(Register<V> r) {
  if constexpr (Split<V>) return map([r](Register<V>) { return r; }, V{});
  else return r;
}

template <class V>
inline V fill(Element<V> x) {
  return repeat<V>(x - Register<V>{});
}
inline f32x16 splat(float x) { return fill<f32x16>(x); }
inline i32x16 splat(int32_t x) { return fill<i32x16>(x); }

template <class V, class T>
inline V load(const T* p) {
  if constexpr (Split<V>) {
    return [p]<int... I>(std::integer_sequence<int, I...>) {
      return V{{load<Register<V>>(reinterpret_cast<const char*>(p) + I * sizeof(Register<V>))...}};
    }(std::make_integer_sequence<int, 16 / kLanes>());
  } else {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
}

template <class V, class T>
inline void store(T* p, V v) {
  if constexpr (Split<V>) {
    [=]<int... I>(std::integer_sequence<int, I...>) {
      (store(reinterpret_cast<char*>(p) + I * sizeof v.part[0], v.part[I]), ...);
    }(std::make_integer_sequence<int, 16 / kLanes>());
  } else {
    std::memcpy(p, &v, sizeof v);
  }
}

// The same bits as lanes of another type, and the same values.
template <class To, class V>
inline To bits(V v) {
  return map([](Register<V> r) { return (Register<To>)r; }, v);
}
template <class To, class V>
inline To convert(V v) {
  return map([](Register<V> r) { return __builtin_convertvector(r, Register<To>); }, v);
}

// a * b + c. Contracted to one fused operation where the instruction set has it, always or never within one file.
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return map([](f32 x, f32 y, f32 z) { return x * y + z; }, a, b, c); }

// x where a > b, else y.
inline f32x16 where_greater(f32x16 a, f32x16 b, f32x16 x, f32x16 y) {
  return map([](f32 a1, f32 b1, f32 x1, f32 y1) { return a1 > b1 ? x1 : y1; }, a, b, x, y);
}

inline f32x16 max(f32x16 a, f32x16 b) { return where_greater(a, b, a, b); }

// v, opaque to the compiler: not to be read from memory again, or computed in general registers, for each use.
template <class V>
inline V in_register(V v) {
#if __x86_64__
  return map([](Register<V> r) { asm("" : "+x"(r)); return r; }, v);
#elif __aarch64__
  return map([](Register<V> r) { asm("" : "+w"(r)); return r; }, v);
#else
  return v;
#endif
}

// The four bytes at `a` in every lane.
template <class V>
inline V broadcast(const uint8_t* a) {
  uint32_t lane;
  std::memcpy(&lane, a, 4);
  return repeat<V>(in_register((Register<V>)(lane - u32{})));
}

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
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) t[i] = t[i + width] > t[i] ? t[i + width] : t[i];
  return t[0];
}

inline int32_t sum(i32x16 v) {
  int32_t t[16];
  store(t, v);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) t[i] += t[i + width];
  return t[0];
}

inline u32x16 widen_halves(const uint16_t* p) {  // sixteen 16-bit numbers as 32-bit ones
#if PACELINE_AVX512 || PACELINE_AVX2
  return convert<u32x16>(load<u16x16>(p));
#else
  // GCC converts vectors of half a register one element at a time.
  typedef uint16_t whole __attribute__((vector_size(16)));
  const whole a = load<whole>(p), b = load<whole>(p + 8), zero = {};
  return {{(u32)__builtin_shufflevector(a, zero, 0, 8, 1, 9, 2, 10, 3, 11),
           (u32)__builtin_shufflevector(a, zero, 4, 12, 5, 13, 6, 14, 7, 15),
           (u32)__builtin_shufflevector(b, zero, 0, 8, 1, 9, 2, 10, 3, 11),
           (u32)__builtin_shufflevector(b, zero, 4, 12, 5, 13, 6, 14, 7, 15)}};
#endif
}

inline u16x16 to_bf16(f32x16 v) {  // to nearest, ties to even; the inputs are finite
  const u32x16 u = bits<u32x16>(v);
  return convert<u16x16>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// Elements of a K/V cache: float or bfloat16 in memory, float in registers.
inline f32x16 widen(const float* p) { return load<f32x16>(p); }
inline f32x16 widen(const uint16_t* p) { return bits<f32x16>(widen_halves(p) << 16); }
inline void narrow(float* p, f32x16 v) { store(p, v); }
inline void narrow(uint16_t* p, f32x16 v) { store(p, to_bf16(v)); }

inline f32x16 round_even(f32x16 x) {  // |x| < 2^22
#if PACELINE_AVX512
  return (f32x16)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif PACELINE_AVX2
  return map([](f32 v) { return (f32)_mm256_round_ps((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }, x);
#elif PACELINE_NEON
  return map([](f32 v) { return (f32)vrndnq_f32((float32x4_t)v); }, x);
#else
  const f32x16 magic = splat(12582912.0f);
  return (x + magic) - magic;
#endif
}

// e^x to about 2 ulp for x in [-87, 88], clamped outside (Cephes' polynomial on [-ln 2 / 2, ln 2 / 2]).
inline f32x16 exp(f32x16 x) {
  x = where_greater(splat(-87.0f), x, splat(-87.0f), x);
  x = where_greater(x, splat(88.0f), splat(88.0f), x);
  const f32x16 n = round_even(x * splat(1.44269504f));
  const f32x16 r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
  f32x16 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  const f32x16 e = fma(p * r, r, r) + splat(1.0f);
  const i32x16 power = (convert<i32x16>(n) + 127) << 23;
  return e * bits<f32x16>(power);
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
  return map([](u16 h) { return (f32)_mm256_cvtph_ps((__m128i)h); }, load<u16x16>(p));
#elif PACELINE_NEON
  return map([](u16 h) { return (f32)vcvt_f32_f16((float16x4_t)h); }, load<u16x16>(p));
#else
  // Shift exponent and mantissa into place, then multiply by 2^112: exact, subnormals included. Scales are finite.
  const u32x16 half = widen_halves(p);
  const f32x16 magnitude = bits<f32x16>((half & 0x7fff) << 13) * splat(5.192296858534828e33f);
  return bits<f32x16>(bits<u32x16>(magnitude) | ((half & 0x8000) << 16));
#endif
}

// Lanes of integers as bytes; they fit.
inline void store_bytes(int8_t* p, i32x16 v) {
#if PACELINE_AVX512
  typedef int8_t i8x16 __attribute__((vector_size(16)));
  store(p, __builtin_convertvector(v, i8x16));
#else
  int32_t t[16];
  store(t, v);
  for (int i = 0; i < 16; ++i) p[i] = int8_t(t[i]);
#endif
}

#if PACELINE_AVX512

// acc[i] += w[4 i + 0..3] * a[0..3]: unsigned weight bytes by the four signed bytes at `a`. Exact.
inline i32x16 dot4(i32x16 acc, u8x64 w, const uint8_t* a) {
  int32_t lane;
  std::memcpy(&lane, a, 4);
  return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(lane));
}

#else

// Integer sums of one group of 32 columns, exact: `sum` collects eight times four signed weight bytes (q8) or nibbles
// 0..15 (q4) by four activations, `total` gives the sixteen sums.
#if PACELINE_NEON

template <bool Nibbles> using GroupSum = i32x16;

template <bool Nibbles>
inline i32x16 dot4(i32x16 sum, u8x64 w, u8x64 a) {
  return map([](i32 s, u8 x, u8 y) { return (i32)vdotq_s32((int32x4_t)s, (int8x16_t)x, (int8x16_t)y); }, sum, w, a);
}

inline i32x16 total(i32x16 sum) { return sum; }

#else

// Sums of two products fit 16 bits: 2 * 128 * 127 for q8, and for q4 even those of a whole group, 16 * 15 * 127.
template <bool Nibbles> using GroupSum = std::conditional_t<Nibbles, i16x32, i32x16>;

template <bool Nibbles>
inline i16 pair_products(u8 w, u8 a) {
#if PACELINE_AVX2
  // maddubs takes unsigned by signed bytes: of signed weights the magnitudes, their signs given to the activations.
  const __m256i x = (__m256i)w, y = (__m256i)a;
  if constexpr (Nibbles) return (i16)_mm256_maddubs_epi16(x, y);
  else return (i16)_mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(y, x));
#else
  const i16 x = (i16)w, y = (i16)a;
  return ((x << 8) >> 8) * ((y << 8) >> 8) + (x >> 8) * (y >> 8);
#endif
}

inline i32x16 total(i32x16 sum) { return sum; }
inline i32x16 total(i16x32 sum) {
#if PACELINE_AVX2
  return map([](i16 s) { return (i32)_mm256_madd_epi16((__m256i)s, _mm256_set1_epi16(1)); }, sum);
#else
  return map([](i16 s) { return (((i32)s << 16) >> 16) + ((i32)s >> 16); }, sum);
#endif
}

template <bool Nibbles>
inline GroupSum<Nibbles> dot4(GroupSum<Nibbles> sum, u8x64 w, u8x64 a) {
  const i16x32 pairs = map([](u8 x, u8 y) { return pair_products<Nibbles>(x, y); }, w, a);
  if constexpr (Nibbles) return sum + pairs;
  else return sum + total(pairs);
}

#endif
#endif

// acc[i] += w[2 i] * a[0] + w[2 i + 1] * a[1] over bfloat16 pairs.
inline f32x16 dot2(f32x16 acc, u32x16 w, const uint8_t* a) {
#if PACELINE_AVX512
  int32_t lane;
  std::memcpy(&lane, a, 4);
  return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(lane));
#else
  const u32x16 pair = broadcast<u32x16>(a);
  acc = fma(bits<f32x16>(w << 16), bits<f32x16>(pair << 16), acc);
  return fma(bits<f32x16>(w & 0xffff0000u), bits<f32x16>(pair & 0xffff0000u), acc);
#endif
}

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace PACELINE_ISA
