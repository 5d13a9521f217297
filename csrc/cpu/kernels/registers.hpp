// Sixteen lanes in the registers of an instruction set, which defines kLanes before it includes this.
//
// One register holds sixteen 32-bit lanes with AVX-512, eight with AVX2 and four elsewhere. Compilers can lower vectors
// wider than a register, but GCC then keeps every value in memory, so such a vector is a struct of registers here.
// Everything is in a namespace named after the instruction set, so that no inline function compiled for one can be
// linked into another.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace PACELINE_NAMESPACE {

// A vector of N registers.
template <class V, int N>
struct Parts {
  using Part = V;
  V part[N];
};

typedef float f32 __attribute__((vector_size(4 * kLanes)));
typedef int32_t i32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t u32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t u16 __attribute__((vector_size(2 * kLanes)));
typedef int16_t i16 __attribute__((vector_size(4 * kLanes)));  // i16 and u8: as many as fill a register
typedef uint8_t u8 __attribute__((vector_size(4 * kLanes)));

// Sixteen lanes: one register, or several.
template <class V> using Sixteen = std::conditional_t<kLanes == 16, V, Parts<V, 16 / kLanes>>;
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
template <class V> using Scalar = std::remove_cvref_t<decltype(Register<V>{}[0])>;

// For functions whose vectors, several registers each, would be passed in memory, and for lambdas that change them.
// Not with the address sanitizer, which takes ten minutes for such functions.
#ifdef __SANITIZE_ADDRESS__
#define PACELINE_INLINE
#else
#define PACELINE_INLINE __attribute__((always_inline))
#endif

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

#define PACELINE_OPERATOR(op)                                    \
  template <class V, int N>                                      \
  inline Parts<V, N> operator op(Parts<V, N> a, Parts<V, N> b) { \
    return map([](V x, V y) { return x op y; }, a, b);           \
  }                                                              \
  template <class V, int N>                                      \
  inline Parts<V, N> operator op(Parts<V, N> a, Scalar<V> b) {   \
    return map([b](V x) { return x op b; }, a);                  \
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
inline V fill(Scalar<V> x) {
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

// a * b + c, rounded once on every instruction set: each defines it for a register.
PACELINE_INLINE inline f32 fused(f32 a, f32 b, f32 c);
PACELINE_INLINE inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  return map([](f32 x, f32 y, f32 z) PACELINE_INLINE { return fused(x, y, z); }, a, b, c);
}

// x where a > b, else y.
inline f32x16 where_greater(f32x16 a, f32x16 b, f32x16 x, f32x16 y) {
  return map([](f32 a1, f32 b1, f32 x1, f32 y1) { return a1 > b1 ? x1 : y1; }, a, b, x, y);
}

inline f32x16 max(f32x16 a, f32x16 b) { return where_greater(a, b, a, b); }

// r, opaque to the compiler: not to be read from memory again, or computed in general registers, for each use.
template <class R>
inline R pinned(R r) {
#if PACELINE_EMULATED  // whose vectors may be wider than any register
#elif __x86_64__
  asm("" : "+v"(r));  // of all 32 registers where there are as many
#elif __aarch64__
  asm("" : "+w"(r));
#endif
  return r;
}
template <class V>
inline V in_register(V v) {
  return map([](Register<V> r) { return pinned(r); }, v);
}

// The four bytes at `a` in every lane.
template <class V>
inline V broadcast(const uint8_t* a) {
  uint32_t lane;
  std::memcpy(&lane, a, 4);
  return repeat<V>(in_register((Register<V>)(lane - u32{})));
}

// Inlined at once: GCC takes a function that only prefetches for one without effect, and removes calls of it.
[[gnu::always_inline]] inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace PACELINE_NAMESPACE
