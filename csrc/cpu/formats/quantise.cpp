// Sixteen parts of a row are searched at once, one in each lane of a vector, so that no sum runs across lanes.
#include "formats/quantise.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace paceline {
namespace {

constexpr int kLanes = 16;
constexpr float kLargest = 65504.0f;  // of fp16

// Sixteen floats in vectors of the width that the instruction set has: GCC takes wider ones apart, number by number.
#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kVectors = kLanes / kWidth;
typedef float FloatVector __attribute__((vector_size(4 * kWidth)));
typedef int32_t IntVector __attribute__((vector_size(4 * kWidth)));

struct Masks {
  IntVector v[kVectors];
  bool operator[](int lane) const { return v[lane / kWidth][lane % kWidth] != 0; }
};

struct Floats {
  FloatVector v[kVectors];
  float operator[](int lane) const { return v[lane / kWidth][lane % kWidth]; }
  void set(int lane, float x) { v[lane / kWidth][lane % kWidth] = x; }
};

template <class To = Floats, class F>
inline To each(F f) {
  To r;
  for (int i = 0; i < kVectors; ++i) r.v[i] = f(i);
  return r;
}

inline Floats all(float x) {
  return each([=](int) { return FloatVector{} + x; });
}

#define PACELINE_OPERATOR(R, op)                             \
  inline R operator op(const Floats& a, const Floats& b) {   \
    return each<R>([&](int i) { return a.v[i] op b.v[i]; }); \
  }                                                          \
  inline R operator op(const Floats& a, float b) { return a op all(b); }
PACELINE_OPERATOR(Floats, +)
PACELINE_OPERATOR(Floats, -)
PACELINE_OPERATOR(Floats, *)
PACELINE_OPERATOR(Floats, /)
PACELINE_OPERATOR(Masks, <)
PACELINE_OPERATOR(Masks, >)
PACELINE_OPERATOR(Masks, <=)
PACELINE_OPERATOR(Masks, ==)
PACELINE_OPERATOR(Masks, !=)
#undef PACELINE_OPERATOR

inline void operator+=(Floats& a, const Floats& b) { a = a + b; }
inline Floats operator-(const Floats& a) { return all(0) - a; }
inline Masks operator&(const Masks& a, const Masks& b) {
  return each<Masks>([&](int i) { return a.v[i] & b.v[i]; });
}

inline Floats choose(const Masks& mask, const Floats& yes, const Floats& no) {
  return each(
      [&](int i) { return (FloatVector)((mask.v[i] & (IntVector)yes.v[i]) | (~mask.v[i] & (IntVector)no.v[i])); });
}
inline Floats magnitude(const Floats& x) {
  return each([&](int i) { return (FloatVector)((IntVector)x.v[i] & 0x7fffffff); });
}
inline Floats least(const Floats& a, const Floats& b) { return choose(a < b, a, b); }
inline Floats most(const Floats& a, const Floats& b) { return choose(a > b, a, b); }
inline Floats clamp(const Floats& x, float low, float high) { return most(least(x, all(high)), all(low)); }
inline Floats inverse(const Floats& x) { return choose(x != 0.0f, all(1) / x, all(0)); }

inline bool any(const Masks& mask) {
  IntVector found = mask.v[0];
  for (int i = 1; i < kVectors; ++i) found |= mask.v[i];
  for (int i = 0; i < kWidth; ++i)
    if (found[i]) return true;
  return false;
}

inline Floats nearest(const Floats& x) {  // whole number, halves to even; |x| < 2^22
  const Floats shift = all(12582912.0f);
  return (x + shift) - shift;
}

uint16_t half_bits(float x) { return float_to_half(std::clamp(x, -kLargest, kLargest)); }

Floats to_half(Floats x) {
  for (int i = 0; i < kLanes; ++i) x.set(i, half_to_float(half_bits(x[i])));
  return x;
}

// Columns of sixteen parts of a row, with their importance.
template <int N>
struct Parts {
  Floats x[N], weight[N];
};

template <int N>
void load(Parts<N>& p, const float* x, const float* importance, int64_t parts) {
  constexpr float reach = kLargest * 32;
  alignas(64) float value[N][kLanes] = {}, weight[N][kLanes] = {};
  for (int64_t lane = 0; lane < parts; ++lane)
    for (int i = 0; i < N; ++i) {
      const float v = x[lane * N + i];
      value[i][lane] = v == v ? std::clamp(v, -reach, reach) : 0.0f;
      weight[i][lane] = importance ? std::clamp(importance[lane * N + i], 1e-6f, 1e6f) : 1.0f;
    }
  std::copy_n(&value[0][0], N * kLanes, reinterpret_cast<float*>(p.x));
  std::copy_n(&weight[0][0], N * kLanes, reinterpret_cast<float*>(p.weight));
}

// Grids: the nearest number to x / scale.
struct Whole {
  float low, high;
  Floats operator()(Floats x) const { return clamp(nearest(clamp(x, low - 1, high + 1)), low, high); }
};

struct Iq4 {
  Floats operator()(Floats x) const {
    Floats found = all(kIq4Values[0]);
    for (int i = 0; i < 15; ++i) {
      const float here = kIq4Values[i], next = kIq4Values[i + 1];
      found += choose(x > all((here + next) / 2), all(next - here), Floats{});
    }
    return found;
  }
};

template <int N>
Floats extreme(const Parts<N>& p) {  // the value of largest magnitude
  Floats top{}, found{};
  for (int i = 0; i < N; ++i) {
    const Masks above = magnitude(p.x[i]) > top;
    top = choose(above, magnitude(p.x[i]), top), found = choose(above, p.x[i], found);
  }
  return found;
}

// Scales d with x ~ d * q. Each of the candidates is a place of the extreme value on the grid; the numbers q that follow
// give the best scale for them.
template <int N, class Grid>
Floats search_scale(const Parts<N>& p, Grid grid, float from, float to, float step, bool both_signs) {
  const Floats unit = inverse(extreme(p));
  Floats best{}, scale{};
  for (float at = from; at <= to; at += step)
    for (float sign : {-1.0f, 1.0f}) {
      if (sign > 0 && !both_signs) continue;
      const Floats factor = unit * (sign * at);
      Floats xq{}, qq{};
      for (int i = 0; i < N; ++i) {
        const Floats q = grid(p.x[i] * factor), weighted = p.weight[i] * q;
        xq += weighted * p.x[i], qq += weighted * q;
      }
      const Floats fit = xq * inverse(qq), gain = fit * xq;
      const Masks better = gain > best;
      best = choose(better, gain, best), scale = choose(better, fit, scale);
    }
  return scale;
}

// Scales d and offsets m with x ~ d * q + m, q = 0 .. top, from four guesses at the range of q: all values, or all but
// half a step at either end. `negative`: m <= 0.
template <int N>
void search_range(const Parts<N>& p, float top, bool negative, Floats& scale, Floats& offset) {
  Floats low = p.x[0], high = p.x[0], w{}, wx{}, wxx{};
  for (int i = 0; i < N; ++i) {
    low = least(low, p.x[i]), high = most(high, p.x[i]);
    w += p.weight[i], wx += p.weight[i] * p.x[i], wxx += p.weight[i] * p.x[i] * p.x[i];
  }
  if (negative) low = least(low, Floats{});
  const Whole grid{0, top};
  Floats best = all(std::numeric_limits<float>::infinity());
  scale = (high - low) / top, offset = low;
  for (int guess = 0; guess < 4; ++guess) {
    const Floats trim = (high - low) * (0.5f / top);
    Floats m = guess & 1 ? low + trim : low, factor = inverse((guess & 2 ? high - trim : high) - m) * top;
    if (negative) m = least(m, Floats{});
    for (int round = 0; round < 2; ++round) {
      Floats q1{}, qq{}, xq{};
      for (int i = 0; i < N; ++i) {
        const Floats q = grid((p.x[i] - m) * factor), weighted = p.weight[i] * q;
        q1 += weighted, qq += weighted * q, xq += weighted * p.x[i];
      }
      const Floats unit = inverse(w * qq - q1 * q1);
      Floats d = (w * xq - wx * q1) * unit;
      m = (qq * wx - q1 * xq) * unit;
      if (negative) d = choose(m > 0.0f, xq * inverse(qq), d), m = least(m, Floats{});
      const Floats error = wxx + d * d * qq + w * m * m + (d * m * q1 - d * xq - m * wx) * 2;
      const Masks better = (error < best) & (d > 0.0f);
      best = choose(better, error, best), scale = choose(better, d, scale), offset = choose(better, m, offset);
      factor = inverse(d);
    }
  }
}

template <int N, class Grid>
Floats error_of(const Parts<N>& p, Grid grid, Floats d, Floats m) {
  const Floats factor = inverse(d);
  Floats sum{};
  for (int i = 0; i < N; ++i) {
    const Floats miss = d * grid((p.x[i] - m) * factor) + m - p.x[i];
    sum += p.weight[i] * miss * miss;
  }
  return sum;
}

// Whole factors of d, and of m, near the given ones: those of least error among them and their neighbours.
template <int N, class Grid>
void refine(const Parts<N>& p, Grid grid, Floats d, Floats m, Whole factors, Floats& scale, Floats& minimum) {
  const Floats s0 = scale, m0 = minimum;
  const int reach = m[0] != 0 || m[kLanes / 2] != 0 ? 1 : 0;  // super-blocks are half of the lanes, or all
  Floats best = all(std::numeric_limits<float>::infinity());
  for (int a = -1; a <= 1; ++a)
    for (int b = -reach; b <= reach; ++b) {
      const Floats s = clamp(s0 + float(a), factors.low, factors.high), n = clamp(m0 + float(b), 0, 63);
      const Floats error = error_of(p, grid, d * s, -(m * n));
      const Masks better = error < best;
      best = choose(better, error, best), scale = choose(better, s, scale), minimum = choose(better, n, minimum);
    }
}

// For all lanes of a super-block, its value of largest magnitude.
Floats extreme_of_super(Floats x, int lanes) {
  for (int first = 0; first < kLanes; first += lanes) {
    float found = 0;
    for (int i = first; i < first + lanes; ++i)
      if (std::fabs(x[i]) > std::fabs(found)) found = x[i];
    for (int i = first; i < first + lanes; ++i) x.set(i, found);
  }
  return x;
}

// If the part in that lane is roundings to bfloat16 of scale * q, that scale; else 0. Scales that are bfloat16 come first.
template <int N>
float exact_scale(const Parts<N>& p, int lane, float near, float top) {
  const uint16_t fitted = half_bits(near), short_one = half_bits(bf16_to_float(float_to_bf16(near)));
  for (int candidate = -1; candidate < 9; ++candidate) {
    const int step = (candidate + 1) / 2;  // 0 1 1 .. 4 4
    const uint16_t bits = candidate < 0 ? short_one : uint16_t(candidate % 2 ? fitted + step : fitted - step);
    const float scale = half_to_float(bits);
    bool exact = scale != 0;
    for (int i = 0; exact && i < N; ++i) {
      const float x = p.x[i][lane], q = std::clamp(std::nearbyint(x / scale), -top, top - 1);
      exact = float_to_bf16(q * scale) == float_to_bf16(x);
    }
    if (exact) return scale;
  }
  return 0;
}

// The scales of parts that lie on the grid -top .. top - 1, and the given ones for others.
template <int N>
Floats on_grid(const Parts<N>& p, float top, Floats scale) {
  const Floats unit = inverse(extreme(p));
  for (float at = top; at >= 1; at -= 1) {
    const Floats factor = unit * -at;
    Floats xq = all(0), qq = all(0);
    Masks fits = unit != 0.0f;
    for (int i = 0; i < N; ++i) {
      const Floats place = p.x[i] * factor, q = nearest(place);
      fits = fits & (magnitude(place - q) <= magnitude(q) * 0x1.04p-7f);  // the value and the extreme are rounded
      xq += p.x[i] * q, qq += q * q;
      if (i % 8 == 7 && !any(fits)) break;
    }
    for (int lane = 0; lane < kLanes; ++lane)
      if (fits[lane])
        if (const float found = exact_scale(p, lane, xq[lane] / qq[lane], top); found != 0) scale.set(lane, found);
  }
  return scale;
}

// Numbers of parts and what scales them, as blocks take them: value = d * scale * q + m.
template <int N>
struct Numbers {
  Floats q[N], d, m, scale, minimum;
};

template <int N, class Grid>
void assign(const Parts<N>& p, Grid grid, Floats d, Floats m, Floats* q) {
  const Floats factor = inverse(d);
  for (int i = 0; i < N; ++i) q[i] = grid((p.x[i] - m) * factor);
}

// Q4_0, Q5_0, Q8_0, IQ4_NL, Q4_1, Q5_1: each lane is a block.
void quantise_blocks(Element type, const Parts<32>& p, Numbers<32>& n) {
  if (type == Element::q8_0) {  // the largest magnitude is 127 scales, halves are rounded away from zero
    const Floats scale = magnitude(extreme(p)) / 127.0f, factor = inverse(scale);
    for (int i = 0; i < 32; ++i) {
      const Floats size = magnitude(p.x[i] * factor), down = nearest(size);
      const Floats q = least(choose(size - down == 0.5f, down + 1.0f, down), all(127));
      n.q[i] = choose(p.x[i] < 0.0f, -q, q);
    }
    n.d = to_half(scale);
  } else if (type == Element::q4_0 || type == Element::q5_0) {
    const float top = type == Element::q4_0 ? 8 : 16;
    const Whole grid{-top, top - 1};
    const float from = top == 8 ? 5 : 12, step = top == 8 ? 0.5f : 1;
    n.d = to_half(on_grid(p, top, search_scale(p, grid, from, top * 1.1f, step, true)));
    assign(p, grid, n.d, Floats{}, n.q);
  } else if (type == Element::iq4_nl) {
    n.d = to_half(search_scale(p, Iq4{}, 76, 138, 8, true));
    assign(p, Iq4{}, n.d, Floats{}, n.q);
  } else {
    const float top = type == Element::q4_1 ? 15 : 31;
    search_range(p, top, false, n.d, n.m);
    n.d = to_half(n.d), n.m = to_half(n.m);
    assign(p, Whole{0, top}, n.d, n.m, n.q);
  }
}

// Q4_K, Q5_K: eight lanes are a super-block, with factors 0 .. 63 of d and m.
void quantise_ranges(Element type, const Parts<32>& p, Numbers<32>& n) {
  const Whole grid{0, type == Element::q4_k ? 15.0f : 31.0f}, factors{0, 63};
  Floats scale, offset;
  search_range(p, grid.high, true, scale, offset);
  n.d = to_half(extreme_of_super(scale, 8) / 63.0f), n.m = to_half(extreme_of_super(-offset, 8) / 63.0f);
  n.scale = factors(scale * inverse(n.d)), n.minimum = factors(-offset * inverse(n.m));
  refine(p, grid, n.d, n.m, factors, n.scale, n.minimum);
  assign(p, grid, n.d * n.scale, -(n.m * n.minimum), n.q);
}

// Q6_K and IQ4_XS: factors of d are signed.
template <int N, class Grid>
void quantise_factors(const Parts<N>& p, Grid grid, Whole factors, Floats scale, Numbers<N>& n) {
  n.d = to_half(extreme_of_super(scale, kMostElements / N) / factors.low);
  n.scale = factors(scale * inverse(n.d));
  Floats none{};
  refine(p, grid, n.d, Floats{}, factors, n.scale, none);
  assign(p, grid, n.d * n.scale, Floats{}, n.q);
}

uint8_t stored(const ElementTraits& t, float q) {
  if (t.lookup == Lookup::none) return uint8_t(int(q) + t.offset);
  const int8_t* values = values_of(t.lookup);
  return uint8_t(std::lower_bound(values, values + 16, int(q)) - values);
}

// Blocks of the first `parts` lanes.
template <int N>
void write(const ElementTraits& t, const Numbers<N>& n, int64_t parts, uint8_t* blocks) {
  const int lanes = int(t.columns) / N;
  BlockFields f = {};
  for (int64_t first = 0; first < parts; first += lanes, blocks += t.bytes) {
    f.d = half_bits(n.d[first]), f.m = half_bits(n.m[first]);
    for (int i = 0; i < lanes; ++i) {
      f.scale[i] = int8_t(n.scale[first + i]), f.min[i] = int8_t(n.minimum[first + i]);
      for (int k = 0; k < N; ++k) f.q[i * N + k] = stored(t, n.q[k][first + i]);
    }
    t.write(f, blocks);
  }
}

template <int N>
void quantise_row(Element type, const float* x, int64_t cols, const float* importance, uint8_t* blocks) {
  const ElementTraits& t = traits(type);
  Parts<N> p;
  Numbers<N> n = {};
  for (int64_t k = 0; k < cols; k += N * kLanes) {
    const int64_t parts = std::min<int64_t>(kLanes, (cols - k) / N);
    load(p, x + k, importance ? importance + k : nullptr, parts);
    if constexpr (N == 16) {
      const Whole grid{-32, 31};
      quantise_factors(p, grid, {-128, 127}, search_scale(p, grid, 27, 33, 1, false), n);
    } else if (type == Element::iq4_xs) {
      quantise_factors(p, Iq4{}, {-32, 31}, search_scale(p, Iq4{}, 76, 138, 8, true), n);
    } else if (type == Element::q4_k || type == Element::q5_k) {
      quantise_ranges(type, p, n);
    } else {
      quantise_blocks(type, p, n);
    }
    write(t, n, parts, blocks + k / t.columns * t.bytes);
  }
}

}  // namespace

void quantise(Element type, const float* x, int64_t cols, const float* importance, uint8_t* blocks) {
  if (traits(type).part == 16) quantise_row<16>(type, x, cols, importance, blocks);
  else quantise_row<32>(type, x, cols, importance, blocks);
}

}  // namespace paceline
