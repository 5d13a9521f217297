// How the weights of each format become operands of dot products.
#pragma once

#include "formats/formats.hpp"
#include "kernels/vec.hpp"

namespace PACELINE_NAMESPACE {

using paceline::ActView;
using paceline::Format;
using paceline::kGroup;
using paceline::kPanel;
using paceline::kTile;
using paceline::traits;

// acc[i] += the weights of lane i times the activations at `a`: one float, or two bfloat16.
inline f32x16 dot_lane(f32x16 acc, f32x16 w, const uint8_t* a) {
  float x;
  std::memcpy(&x, a, 4);
  return fma(w, splat(x), acc);
}
inline f32x16 dot_lane(f32x16 acc, u32x16 w, const uint8_t* a) { return dot2(acc, w, a); }

// Of plain formats, what one 64-byte load holds. Of quantised ones, the operands in it: each is four columns of sixteen
// rows as unsigned bytes q + offset.
template <Format F> struct Operands;

template <> struct Operands<Format::f32> {
  using Load = f32x16;
};
template <> struct Operands<Format::bf16> {
  using Load = u32x16;
};

template <> struct Operands<Format::q8_0> {
  static constexpr OperandKind kKind = OperandKind::bytes;
  static constexpr int kCount = 1;  // of a load
  static u8x64 get(u8x64 bytes, int) { return bytes; }
};

template <> struct Operands<Format::q4_0> {
  static constexpr OperandKind kKind = OperandKind::nibbles;
  static constexpr int kCount = 2;
  static u8x64 get(u8x64 bytes, int i) { return (i ? bits<u8x64>(bits<u32x16>(bytes) >> 4) : bytes) & 15; }
};

template <Format F> constexpr bool kIntegers = traits(F).act.kind == paceline::ActFormat::Kind::int8;

// f<count>(), count from 1 to Most.
template <int Most, class F>
inline void with_count(int count, F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (void)((count == I + 1 && (f.template operator()<I + 1>(), true)) || ...);
  }(std::make_integer_sequence<int, Most>());
}

}  // namespace PACELINE_NAMESPACE
