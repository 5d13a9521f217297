// Packing checkpoint rows into panels, and back. Runs once per load; the NumPy reference is tests/fixtures/reference_formats.py.
#include "formats/formats.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "formats/quantise.hpp"

namespace paceline {
namespace {

// A lane's numbers of a group are eight words, one for each operand, of four bytes with their bits in the low end.
constexpr int kOperands = kGroup / 4;

uint32_t& word(uint8_t* operands, int i, int lane) { return reinterpret_cast<uint32_t*>(operands)[i * kPanel + lane]; }

void store_nibbles(const uint32_t* q, int pairs, int lane, uint8_t* group) {
  for (int i = 0; i < pairs; ++i) word(group, i, lane) = (q[2 * i] & 0x0f0f0f0f) | (q[2 * i + 1] & 0x0f0f0f0f) << 4;
}

void load_nibbles(uint8_t* group, int pairs, int lane, uint32_t* q) {
  for (int i = 0; i < pairs; ++i) {
    q[2 * i] = word(group, i, lane) & 0x0f0f0f0f;
    q[2 * i + 1] = word(group, i, lane) >> 4 & 0x0f0f0f0f;
  }
}

void store_pairs(const uint32_t* q, int lane, uint8_t* group) {  // the low two bits
  for (int half = 0; half < 2; ++half, q += 4) {
    uint32_t pairs = 0;
    for (int i = 0; i < 4; ++i) pairs |= (q[i] & 0x03030303) << 2 * i;
    word(group, half, lane) = pairs;
  }
}

void load_pairs(uint8_t* group, int lane, uint32_t* q) {
  for (int i = 0; i < kOperands; ++i) q[i] = word(group, i / 4, lane) >> 2 * (i % 4) & 0x03030303;
}

void store_bit(const uint32_t* q, int bit, int lane, uint8_t* group) {
  uint32_t bits = 0;
  for (int i = 0; i < kOperands; ++i) bits |= (q[i] >> bit & 0x01010101) << i;
  word(group, 0, lane) = bits;
}

void load_bit(uint8_t* group, int bit, int lane, uint32_t* q) {
  for (int i = 0; i < kOperands; ++i) q[i] |= (word(group, 0, lane) >> i & 0x01010101) << bit;
}

void store_numbers(int bits, const uint32_t* q, int lane, uint8_t* group) {
  if (bits == 8) {
    for (int i = 0; i < kOperands; ++i) word(group, i, lane) = q[i];
  } else if (bits == 2) {
    store_pairs(q, lane, group);
  } else if (bits == 3) {
    store_bit(q, 2, lane, group);
    store_pairs(q, lane, group + 64);
  } else if (bits == 4) {
    store_nibbles(q, 4, lane, group);
  } else if (bits == 5) {
    store_bit(q, 4, lane, group);
    store_nibbles(q, 4, lane, group + 64);
  } else {
    for (int half = 0; half < 2; ++half, q += 4, group += 192) {
      uint32_t high = 0;
      for (int i = 0; i < 4; ++i) high |= (q[i] >> 4 & 0x03030303) << 2 * i;
      word(group, 0, lane) = high;
      store_nibbles(q, 2, lane, group + 64);
    }
  }
}

void load_numbers(int bits, uint8_t* group, int lane, uint32_t* q) {
  if (bits == 8) {
    for (int i = 0; i < kOperands; ++i) q[i] = word(group, i, lane);
  } else if (bits == 2) {
    load_pairs(group, lane, q);
  } else if (bits == 3) {
    load_pairs(group + 64, lane, q);
    load_bit(group, 2, lane, q);
  } else if (bits == 4) {
    load_nibbles(group, 4, lane, q);
  } else if (bits == 5) {
    load_nibbles(group + 64, 4, lane, q);
    load_bit(group, 4, lane, q);
  } else {
    for (int half = 0; half < 2; ++half, q += 4, group += 192) {
      load_nibbles(group + 64, 2, lane, q);
      for (int i = 0; i < 4; ++i) q[i] |= (word(group, 0, lane) >> 2 * i & 0x03030303) << 4;
    }
  }
}

// Where the column `k`, the first of a group, lies in a panel.
struct Place {
  uint8_t *super, *header, *group;
  int second;  // 1: the second group of its block

  Place(const FormatTraits& t, uint8_t* panel, int64_t k)
      : super(panel + k / kSuper * t.panel_bytes(kSuper)),
        header(panel + k / t.block_cols() * t.block_bytes() + (k / kSuper + 1) * t.super_bytes()),
        group(header + t.header_bytes() + k % t.block_cols() / kGroup * t.group_bytes()),
        second(int(k % t.block_cols() / kGroup)) {}
};

enum class Direction { store, load };

template <Direction D, class T>
void move(T& packed, T& field) {
  if constexpr (D == Direction::store) packed = field;
  else field = packed;
}

// The header of group `index` of a block, between its fields and lane `lane` of a panel.
template <Direction D>
void move_header(const FormatTraits& t, const Place& at, int lane, int index, BlockFields& f) {
  uint16_t *halves = reinterpret_cast<uint16_t*>(at.header), *super = reinterpret_cast<uint16_t*>(at.super);
  int8_t* factors = reinterpret_cast<int8_t*>(at.header);
  const int row = at.second * kPanel + lane, half = 2 * at.second * kPanel + lane;
  switch (t.header) {
    case Header::none: break;
    case Header::scale:
    case Header::power: move<D>(halves[row], f.d); break;
    case Header::scale_minimum: move<D>(halves[row], f.d), move<D>(halves[2 * kPanel + row], f.m); break;
    case Header::group_scales: move<D>(halves[lane], f.d), move<D>(factors[2 * kPanel + row], f.scale[index]); break;
    case Header::half_scales:
      move<D>(super[lane], f.d);
      for (int i = 0; i < 2; ++i) move<D>(factors[half + i * kPanel], f.scale[2 * index + i]);
      if (D == Direction::store) super[kPanel + lane] = 0;
      break;
    case Header::half_minima:
      move<D>(super[lane], f.d), move<D>(super[kPanel + lane], f.m);
      for (int i = 0; i < 2; ++i) {
        move<D>(factors[half + i * kPanel], f.scale[2 * index + i]);
        move<D>(factors[4 * kPanel + half + i * kPanel], f.min[2 * index + i]);
      }
      break;
    case Header::scales_minima:
      move<D>(super[lane], f.d), move<D>(super[kPanel + lane], f.m);
      move<D>(factors[row], f.scale[index]), move<D>(factors[2 * kPanel + row], f.min[index]);
      break;
  }
}

// And its numbers.
void store_group(const FormatTraits& t, const Place& at, int lane, int index, BlockFields& f) {
  uint32_t q[kOperands];
  std::memcpy(q, f.q + index * kGroup, kGroup);
  move_header<Direction::store>(t, at, lane, index, f);
  store_numbers(t.bits, q, lane, at.group);
}

void load_group(const FormatTraits& t, const Place& at, int lane, int index, BlockFields& f) {
  uint32_t q[kOperands];
  move_header<Direction::load>(t, at, lane, index, f);
  load_numbers(t.bits, at.group, lane, q);
  std::memcpy(f.q + index * kGroup, q, kGroup);
}

// The blocks of a row into a panel; columns past `cols`, and past those of the blocks, are zero bytes.
void store_blocks(const MatrixView& shape, uint8_t* panel, int lane, Element type, const uint8_t* blocks) {
  const FormatTraits& t = traits(shape.format);
  const ElementTraits& e = traits(type);
  BlockFields f = {}, past = {};
  for (int64_t k = 0; k < shape.padded_cols; k += e.columns) {
    if (k < shape.cols) {
      e.read(blocks + k / e.columns * e.bytes, f);
      past.d = f.d, past.m = f.m;  // groups of a super-block share them
    } else {
      past = {};
    }
    const int64_t groups = std::min(e.columns, shape.padded_cols - k) / kGroup;
    for (int g = 0; g < groups; ++g)
      store_group(t, {t, panel, k + g * kGroup}, lane, g, k + g * kGroup < shape.cols ? f : past);
  }
}

// Plain formats: `Pair` columns of a row side by side.
template <class T, int Pair>
T& plain_at(uint8_t* panel, int64_t k, int lane) {
  return reinterpret_cast<T*>(panel)[(k / Pair * kPanel + lane) * Pair + k % Pair];
}

void store_plain(Format format, const std::vector<float>& x, uint8_t* panel, int lane) {
  for (int64_t k = 0; k < int64_t(x.size()); ++k) {
    const float value = x[size_t(k)];
    if (format == Format::f32) plain_at<float, 1>(panel, k, lane) = value;
    else if (format == Format::f16) plain_at<uint16_t, 1>(panel, k, lane) = float_to_half(value);
    else plain_at<uint16_t, 2>(panel, k, lane) = float_to_bf16(value);
  }
}

float load_plain(Format format, uint8_t* panel, int64_t k, int lane) {
  if (format == Format::f32) return plain_at<float, 1>(panel, k, lane);
  if (format == Format::f16) return half_to_float(plain_at<uint16_t, 1>(panel, k, lane));
  return bf16_to_float(plain_at<uint16_t, 2>(panel, k, lane));
}

uint64_t next_random(uint64_t& state) {  // xorshift64
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}

float next_uniform(uint64_t& state, float spread) {
  return (float(next_random(state) >> 40) / float(1 << 23) - 1.0f) * spread;
}

// Headers of one group for random numbers: values of mean zero and of about `spread` in size.
BlockFields random_scales(const FormatTraits& t, float spread) {
  constexpr int factor = 32;
  const ElementTraits& e = traits(t.element);
  const float numbers = float(1 << (t.bits - 1));
  const float largest = e.lookup == Lookup::iq4 ? 127.0f : e.lookup == Lookup::mxfp4 ? 12.0f : numbers;
  const float d = spread / (largest / 2), m = -d * (largest - 0.5f);  // the mean number times d
  BlockFields f = {};
  f.d = t.header == Header::power ? float_to_bf16(d) : float_to_half(e.part ? d / factor : d);
  f.m = float_to_half(e.part ? -m / factor : m);
  std::fill_n(f.scale, 16, int8_t(factor)), std::fill_n(f.min, 16, int8_t(factor));
  return f;
}

}  // namespace

Format format_from(const std::string& name) {
  std::string known;
  for (const FormatTraits& f : kFormats) {
    if (name == f.name) return Format(&f - kFormats);
    known += (known.empty() ? "" : ", ") + std::string(f.name);
  }
  throw std::invalid_argument("unknown weight format " + name + " (known: " + known + ")");
}

void throw_misfit(const MatrixView& w, const ActView& act) {
  throw std::invalid_argument("activations of " + std::to_string(act.padded_cols) +
                              " columns, packed for another weight format or width than those of a " +
                              traits(w.format).name + " matrix of " + std::to_string(w.padded_cols));
}

void pack_rows(const MatrixView& shape, uint8_t* data, Element type, const void* source, int64_t first, int64_t count,
               const float* importance) {
  const FormatTraits& t = traits(shape.format);
  const bool same_bits = type == t.element;
  if (!same_bits && !t.plain() && !traits(t.element).write)
    throw std::invalid_argument(std::string("nothing is quantised to ") + t.name + "; it takes blocks of its own type");
  const int64_t stride = row_bytes(type, shape.cols), own = traits(t.element).columns;
  std::vector<float> x(size_t(round_up(shape.padded_cols, own)), 0.0f);
  std::vector<float> padded(importance ? x.size() : 0, 1.0f);  // the importance of all columns
  if (importance) std::copy_n(importance, shape.cols, padded.begin());
  std::vector<uint8_t> blocks(t.plain() || same_bits ? 0 : size_t(row_bytes(t.element, int64_t(x.size()))));
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* from = static_cast<const uint8_t*>(source) + i * stride;
    uint8_t* panel = data + (first + i) / kPanel * shape.stride;
    const int lane = int((first + i) % kPanel);
    if (!t.plain() && same_bits) {
      store_blocks(shape, panel, lane, type, from);
      continue;
    }
    decode(type, from, 0, shape.cols, x.data());
    if (t.plain()) {
      store_plain(shape.format, x, panel, lane);
    } else {
      quantise(t.element, x.data(), int64_t(x.size()), importance ? padded.data() : nullptr, blocks.data());
      store_blocks(shape, panel, lane, t.element, blocks.data());
    }
  }
}

void unpack_row(const MatrixView& m, int64_t row, float* out) {
  const FormatTraits& t = traits(m.format);
  uint8_t* panel = const_cast<uint8_t*>(m.panel(row / kPanel));  // only read
  const int lane = int(row % kPanel);
  if (t.plain()) {
    for (int64_t k = 0; k < m.cols; ++k) out[k] = load_plain(m.format, panel, k, lane);
    return;
  }
  const int64_t columns = traits(t.element).columns;
  BlockFields f = {};
  float values[kMostElements];
  for (int64_t k = 0; k < m.cols; k += columns) {
    const int64_t present = std::min(columns, m.cols - k);
    for (int g = 0; g * kGroup < present; ++g) load_group(t, {t, panel, k + g * kGroup}, lane, g, f);
    block_values(t.element, f, values);
    std::copy_n(values, present, out + k);
  }
}

void randomise(const MatrixView& shape, uint8_t* data, uint64_t seed) {
  const FormatTraits& t = traits(shape.format);
  const float spread = 1.0f / std::sqrt(float(shape.cols));
  uint64_t state = seed * 0x9e3779b97f4a7c15u + 1;
  if (t.plain()) {
    std::vector<float> x(size_t(shape.padded_cols));
    for (int64_t row = 0; row < shape.padded_rows(); ++row) {
      for (float& value : x) value = next_uniform(state, spread);
      store_plain(shape.format, x, data + row / kPanel * shape.stride, int(row % kPanel));
    }
    return;
  }
  for (int64_t i = 0; i < shape.bytes(); i += 8) {
    const uint64_t bits = next_random(state);
    std::memcpy(data + i, &bits, 8);
  }
  BlockFields f = random_scales(t, spread);
  for (int64_t panel = 0; panel < shape.panels(); ++panel)
    for (int64_t k = 0; k < shape.padded_cols; k += kGroup)
      for (int lane = 0; lane < kPanel; ++lane)
        move_header<Direction::store>(t, {t, data + panel * shape.stride, k}, lane, 0, f);
}

}  // namespace paceline
