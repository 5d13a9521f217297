// Sixteen-lane arithmetic: one source for every instruction set. What differs is in isa/<set>.hpp, which each set's
// compilation names as PACELINE_SET.
#pragma once

#include PACELINE_SET

namespace PACELINE_NAMESPACE {

// f of registers over the lanes in pairs: lanes i and i + 8, then i and i + 4, and so on. Lane 0 holds the result.
template <int Width, class R, class F>
inline R fold_lanes(R r, F f) {
  if constexpr (Width == 0) {
    return r;
  } else {
    const R other = [r]<int... I>(std::integer_sequence<int, I...>) {
      return __builtin_shufflevector(r, r, (I ^ Width)...);
    }(std::make_integer_sequence<int, kLanes>());
    return fold_lanes<Width / 2>(f(r, other), f);
  }
}
template <class V, class F>
inline Scalar<V> fold(V v, F f) {
  if constexpr (Split<V>) {
    for (int width = 8 / kLanes; width; width /= 2)
      for (int i = 0; i < width; ++i) v.part[i] = f(v.part[i], v.part[i + width]);
    return fold_lanes<kLanes / 2>(v.part[0], f)[0];
  } else {
    return fold_lanes<kLanes / 2>(v, f)[0];
  }
}
template <class V>
inline Scalar<V> sum(V v) {
  return fold(v, [](auto a, auto b) { return a + b; });
}
inline float max_lane(f32x16 v) {
  return fold(v, [](f32 a, f32 b) { return b > a ? b : a; });
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

// e^x to about 2 ulp for x in [-87, 88], clamped outside (Cephes' polynomial on [-ln 2 / 2, ln 2 / 2]). The sampler's, which
// NumPy repeats, is not fused.
template <bool Fused = true>
inline f32x16 exp(f32x16 x) {
  const auto fma = [](f32x16 a, f32x16 b, f32x16 c) {
    if constexpr (Fused) return PACELINE_NAMESPACE::fma(a, b, c);
    else return a * b + c;
  };
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

}  // namespace PACELINE_NAMESPACE
