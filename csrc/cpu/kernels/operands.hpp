// How the weights of each format become operands of dot products, and what their sums are multiplied with.
#pragma once

#include <algorithm>
#include <bit>

#include "formats/formats.hpp"
#include "kernels/vec.hpp"

namespace PACELINE_NAMESPACE {

using paceline::ActFormat;
using paceline::ActView;
using paceline::Format;
using paceline::FormatTraits;
using paceline::Header;
using paceline::kGroup;
using paceline::kPanel;
using paceline::kSuper;
using paceline::kTile;
using paceline::traits;

constexpr int kRows =
    64;  // batch rows that a kernel takes at most, so that it goes through a panel once for all of them

template <Format F> constexpr bool kIntegers = traits(F).act() == ActFormat::int8;

// f<0>(), f<1>(), ... f<N - 1>().
template <int N, class F>
PACELINE_INLINE inline void unrolled(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      PACELINE_INLINE { (f.template operator()<I>(), ...); }(std::make_integer_sequence<int, N>());
}

// f<count>(), count from 1 to Most.
template <int Most, class F>
inline void with_count(int count, F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (void)((count == I + 1 && (f.template operator()<I + 1>(), true)) || ...);
  }(std::make_integer_sequence<int, Most>());
}

constexpr int64_t ceil_div(int64_t n, int64_t parts) { return (n + parts - 1) / parts; }

// In how many blocks of at most `most` rows of a tile rows are taken.
constexpr int row_blocks(int rows, int most) {
  return int(rows / kTile * ceil_div(kTile, most) + ceil_div(rows % kTile, most));
}

// f<count>(tile, first) for blocks of at most `Most` rows of a tile, as equal as they can be.
template <int Most, class G>
inline void for_row_blocks(int rows, G f) {
  for (int tile = 0; tile * kTile < rows; ++tile) {
    int left = std::min(rows - tile * kTile, kTile);
    for (int first = 0, blocks = row_blocks(left, Most); left; --blocks) {
      const int count = (left + blocks - 1) / blocks;
      with_count<Most>(count, [&]<int M>() { f.template operator()<M>(tile, first); });
      first += count, left -= count;
    }
  }
}

// Fetches what is needed later, a step at a time between other loads, so that the memory has something to do all the time:
// many lines at once would hold up the loads behind them.
struct Ahead {
  const uint8_t* p;
  int64_t step;  // bytes

  PACELINE_INLINE void fetch() {
    prefetch(p);
    p += step;
  }
};

// Plain formats: the weights of one lane of activations, one column or a pair of bfloat16, and
// acc[i] += the weights of row i times the activations at `a`.
template <Format F>
inline auto plain_weights(const uint8_t* w) {
  if constexpr (F == Format::f32) return load<f32x16>(w);
  else if constexpr (F == Format::f16) return from_half(reinterpret_cast<const uint16_t*>(w));
  else return load<u32x16>(w);
}
template <Format F> constexpr int kPlainBytes = F == Format::f16 ? 32 : 64;

inline f32x16 dot_lane(f32x16 acc, f32x16 w, const uint8_t* a) {
  float x;
  std::memcpy(&x, a, 4);
  return fma(w, splat(x), acc);
}
inline f32x16 dot_lane(f32x16 acc, u32x16 w, const uint8_t* a) { return dot2(acc, w, a); }

// Quantised formats: a group of columns has eight operands, each four columns of sixteen rows.
constexpr int kOperands = kGroup / 4;

// What the numbers of operands are: bytes of any sign, or unsigned numbers up to 15, 31 or 63. An instruction set whose
// dot product takes unsigned weights (kUnsignedBytes) gets bytes with 128 added.
constexpr bool is_table(Format f) { return traits(traits(f).element).lookup != paceline::Lookup::none; }
constexpr bool is_bytes(Format f) { return traits(f).bits == 8 || is_table(f); }

// Three-bit numbers are multiplied by eight, so that start values serve them which other formats have too.
template <Format F> constexpr int kFactor = traits(F).bits == 3 ? 8 : 1;
template <Format F> constexpr int kLargest = is_bytes(F) ? 128 : kFactor<F> * ((1 << traits(F).bits) - 1);

// What was added to the numbers, and start values of sums cancel.
template <Format F>
constexpr int kOffset = is_bytes(F) ? (kUnsignedBytes ? 128 : 0) : kFactor<F> * traits(traits(F).element).offset;

template <int Left>  // negative: to the right
PACELINE_INLINE inline u8x64 shift(u8x64 v) {
  if constexpr (Left > 0) return bits<u8x64>(bits<u32x16>(v) << Left);
  else if constexpr (Left < 0) return bits<u8x64>(bits<u32x16>(v) >> -Left);
  else return v;
}

template <int I>
PACELINE_INLINE inline u8x64 nibbles(const uint8_t* p) {
  return shift<I % 2 ? -4 : 0>(load<u8x64>(p + I / 2 * 64)) & 15;
}

// Operand I of the group at `group`. The layouts are in formats.hpp.
template <Format F, int I>
PACELINE_INLINE inline u8x64 operand(const uint8_t* group) {
  constexpr int bits = traits(F).bits;
  if constexpr (bits == 8) {
    const u8x64 stored = load<u8x64>(group + I * 64);
    return kUnsignedBytes ? stored : stored ^ 128;
  } else if constexpr (bits == 2) {
    return shift<-2 * (I % 4)>(load<u8x64>(group + I / 4 * 64)) & 3;
  } else if constexpr (bits == 3) {
    return (shift<3 - 2 * (I % 4)>(load<u8x64>(group + 64 + I / 4 * 64)) & 24) |
           (shift<5 - I>(load<u8x64>(group)) & 32);
  } else if constexpr (bits == 4 && is_table(F)) {
    return lookup(values_of(traits(traits(F).element).lookup), nibbles<I>(group));
  } else if constexpr (bits == 4) {
    return nibbles<I>(group);
  } else if constexpr (bits == 5) {
    return nibbles<I>(group + 64) | (shift<4 - I>(load<u8x64>(group)) & 16);
  } else {
    const uint8_t* half = group + I / 4 * 192;
    return nibbles<I % 4>(half + 64) | (shift<4 - 2 * (I % 4)>(load<u8x64>(half)) & 48);
  }
}

// The scales of a group, or of its halves, and what their minima add for each unit of the activations' sums.
template <Format F>
class Scales {
  static constexpr Header kHeader = traits(F).header;

 public:
  static constexpr int kParts = kHeader == Header::half_scales || kHeader == Header::half_minima ? 2 : 1;  // of a group
  static constexpr bool kMinima = traits(traits(F).element).has_min;

  void set_super(const uint8_t* p) {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(p);
    d_ = from_half(halves);
    if constexpr (kFactor<F> != 1) d_ = d_ * splat(1.0f / kFactor<F>);
    if constexpr (kMinima) m_ = from_half(halves + kPanel) * splat(-1.0f);
  }
  void set_block(const uint8_t* p) {
    header_ = p;
    if constexpr (kHeader == Header::group_scales) d_ = half(0);
  }
  f32x16 scale(int group, int part) const {
    if constexpr (kHeader == Header::scale || kHeader == Header::scale_minimum) return half(group);
    else if constexpr (kHeader == Header::power) return bits<f32x16>(widen_halves(halves(group)) << 16);
    else if constexpr (kHeader == Header::group_scales) return d_ * factor(2 + group);
    else return d_ * factor(group * kParts + part);
  }
  f32x16 minimum(int group, int part) const {
    if constexpr (kHeader == Header::scale_minimum) return half(2 + group);
    else return m_ * factor((2 + group) * kParts + part);
  }

 private:
  const uint16_t* halves(int i) const { return reinterpret_cast<const uint16_t*>(header_) + i * kPanel; }
  f32x16 half(int i) const { return from_half(halves(i)); }
  f32x16 factor(int i) const {
    return convert<f32x16>(widen_bytes(reinterpret_cast<const int8_t*>(header_) + i * kPanel));
  }

  const uint8_t* header_ = nullptr;
  f32x16 d_, m_;
};

// The words of one row's group.
struct GroupWords {
  const uint32_t* words;
  int64_t stride;  // from one word to the next

  float number(int word) const { return std::bit_cast<float>(words[word * stride]); }
  int32_t whole(int word) const { return int32_t(words[word * stride]); }
};

// What a minimum is multiplied with: the scaled sum of a row's group, or of a half of it.
template <Format F, int Part>
PACELINE_INLINE inline f32x16 scaled_sum(const GroupWords& group) {
  if constexpr (Scales<F>::kParts == 1) return splat(group.number(paceline::kScaledSum));
  const float half = group.number(paceline::kScaledHalf);
  return splat(Part ? group.number(paceline::kScaledSum) - half : half);
}

// With what the sums of part `Part` of a group start.
template <Format F, int Part>
PACELINE_INLINE inline i32x16 start(const GroupWords& group) {
  constexpr int offset = kOffset<F>;
  static_assert(offset == 0 || offset == 8 || offset == 16 || offset == 32 || offset == 128);
  if constexpr (offset == 0) return splat(0);
  else if constexpr (offset == 8) return splat(group.whole(paceline::kStart8));
  else if constexpr (offset == 16) return splat(group.whole(paceline::kStart16));
  else if constexpr (offset == 128) return splat(group.whole(paceline::kStart128));
  else return splat(group.whole(paceline::kStart32 + Part));
}

// sum += dots * (weight scale * activation scale): one order of operations, whatever the instruction set.
PACELINE_INLINE inline f32x16 add_scaled_dots(f32x16 sum, i32x16 dots, f32x16 weight_scale, float act_scale) {
  return fma(convert<f32x16>(dots), weight_scale * splat(act_scale), sum);
}

}  // namespace PACELINE_NAMESPACE
