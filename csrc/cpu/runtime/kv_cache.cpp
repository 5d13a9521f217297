#include "runtime/kv_cache.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "formats/elements.hpp"
#include "runtime/elementary.hpp"

namespace paceline {

CacheFormat cache_format_from(const std::string& name) {
  if (name == "f32") return CacheFormat::f32;
  if (name == "bf16") return CacheFormat::bf16;
  if (name == "q8") return CacheFormat::q8;
  throw std::invalid_argument("no KV cache format " + name + "; there are f32, bf16 and q8");
}

KvCache::KvCache(const std::vector<LayerShape>& layers, int64_t slots, int64_t context, int64_t window,
                 int64_t max_rows, CacheFormat format)
    : context_(check_range("context", context, 1, kMostPositions)), window_(window),
      max_rows_(check_range("max_rows", max_rows, 1, kMostPositions)), format_(format),
      length_(size_t(check_range("slots", slots, 1, kMostSlots)), 0), high_(size_t(slots), 0) {
  const int64_t whole = round_up(context, 16);
  ring_ = std::min(whole, round_up(window + max_rows, 16));
  for (const LayerShape& layer : layers) {
    const int64_t ring = layer.sliding ? ring_ : whole;
    const int64_t block = CacheView::block_bytes(format, layer.head_dim);
    const size_t both = layer.own ? product({2, layer.kv_heads, ring / kBlockRows, block}) : 0;
    places_.push_back({ring, layer.head_dim, int64_t(both / 2), slot_bytes_});
    slot_bytes_ += both;
  }
  memory_.reserve(product({int64_t(slot_bytes_), slots}));
}

void KvCache::check_slot(int64_t slot) const {
  if (slot < 0 || slot >= slots())
    throw std::out_of_range("no slot " + std::to_string(slot) + " in a cache of " + std::to_string(slots()));
}

CacheView KvCache::view(int64_t layer, int64_t slot) const {
  const Place& place = places_[size_t(layer)];
  uint8_t* p = memory_.data() + size_t(slot) * slot_bytes_ + place.offset;
  return {format_, place.ring, place.head_dim, p, p + place.key_bytes};
}

void KvCache::touch(int64_t slot, int64_t end) {
  check_slot(slot);
  high_[size_t(slot)] = std::max(high_[size_t(slot)], end);
}

void KvCache::extend(int64_t slot, int64_t length) {
  touch(slot, length);
  length_[size_t(slot)] = length;
}

void KvCache::clear(int64_t slot) {
  check_slot(slot);
  length_[size_t(slot)] = high_[size_t(slot)] = 0;
}

void KvCache::truncate(int64_t slot, int64_t length) {
  check_slot(slot);
  int64_t& current = length_[size_t(slot)];
  if (length < 0 || length > current)
    throw std::invalid_argument("cannot truncate a cache of " + std::to_string(current) + " rows to " +
                                std::to_string(length));
  if (ring_ < context_ && std::max<int64_t>(0, length - window_) < high_[size_t(slot)] - ring_)
    throw std::invalid_argument("cannot roll back to " + std::to_string(length) + ": the sliding rings hold only " +
                                std::to_string(ring_) + " rows");
  current = length;
}

// Column d of the key or the value in one of a block's sixteen lanes.
static float number(CacheFormat format, const uint8_t* block, bool is_key, int64_t lane, int64_t d) {
  const auto index = [&](int64_t column) {
    return is_key ? column * kBlockRows + lane : (column / 16 * kBlockRows + lane) * 16 + column % 16;
  };
  if (format == CacheFormat::f32) return reinterpret_cast<const float*>(block)[index(d)];
  const auto bf16 = [](const uint8_t* at, int64_t i) {
    return bf16_to_float(reinterpret_cast<const uint16_t*>(at)[i]);
  };
  if (format == CacheFormat::bf16) return bf16(block, index(d));
  const uint8_t* group = block + d / kCacheGroup * kGroupBytes;
  return bf16(group, lane) * float(int8_t(group[kScaleBytes + index(d % kCacheGroup)]));
}

std::vector<float> KvCache::numbers(int64_t layer, int64_t slot, int64_t first, int64_t count) const {
  check_slot(slot);
  check_range("layer", layer, 0, int64_t(places_.size()) - 1);
  const Place& place = places_[size_t(layer)];
  if (!place.key_bytes) throw std::invalid_argument("layer " + std::to_string(layer) + " has no K/V of its own");
  if (first < 0 || count < 0 || count > length(slot) || first > length(slot) - count ||
      first < high_[size_t(slot)] - place.ring)
    throw std::invalid_argument("the cache does not hold " + std::to_string(count) + " rows from " +
                                std::to_string(first) + " on");
  const CacheView cache = view(layer, slot);
  const int64_t heads = place.key_bytes / (place.ring / kBlockRows * CacheView::block_bytes(format_, place.head_dim));
  std::vector<float> out;
  out.reserve(product({2, heads, count, place.head_dim}));
  for (const bool is_key : {true, false})
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t p = first; p < first + count; ++p) {
        const uint8_t* block = is_key ? cache.key_block(head, p) : cache.value_block(head, p);
        for (int64_t d = 0; d < place.head_dim; ++d) out.push_back(number(format_, block, is_key, p % kBlockRows, d));
      }
  return out;
}

template <class F>
void KvCache::each_stretch(int64_t high, F f) const {
  if (!high) return;
  for (const Place& place : places_) {
    // Keys and values of a head are each one stretch: blocks of sixteen positions in ascending order.
    const int64_t block = CacheView::block_bytes(format_, place.head_dim);
    const int64_t head = place.ring / kBlockRows * block;
    const int64_t filled = std::min(place.ring, round_up(high, kBlockRows)) / kBlockRows * block;
    for (int64_t at = 0; at < 2 * place.key_bytes; at += head) f(place.offset + size_t(at), size_t(filled));
  }
}

KvCache::Snapshot KvCache::save(int64_t slot) const {
  Snapshot snapshot{places_, context_, window_, format_, {}, length(slot), high_[size_t(slot)]};
  if (ring_ < context_ && snapshot.high > ring_)
    snapshot.shortest = std::min(snapshot.length, snapshot.high - ring_ + window_);
  size_t bytes = 0;
  each_stretch(snapshot.high, [&](size_t, size_t n) { bytes += n; });
  snapshot.rows.reserve(bytes);
  const uint8_t* from = memory_.data() + size_t(slot) * slot_bytes_;
  uint8_t* to = snapshot.rows.data();
  each_stretch(snapshot.high, [&](size_t offset, size_t n) {
    std::memcpy(to, from + offset, n);
    to += n;
  });
  return snapshot;
}

void KvCache::restore(int64_t slot, const Snapshot& snapshot) {
  if (length(slot) != 0) throw std::invalid_argument("slot " + std::to_string(slot) + " is not empty");
  if (snapshot.places != places_ || snapshot.context != context_ || snapshot.window != window_ ||
      snapshot.format != format_)
    throw std::invalid_argument("the snapshot is of a cache of another layout");
  const uint8_t* from = snapshot.rows.data();
  uint8_t* to = memory_.data() + size_t(slot) * slot_bytes_;
  each_stretch(snapshot.high, [&](size_t offset, size_t n) {
    std::memcpy(to + offset, from, n);
    from += n;
  });
  length_[size_t(slot)] = snapshot.length;
  high_[size_t(slot)] = snapshot.high;
}

RopeTable::RopeTable(double theta, double rotary_factor, double scaling, int64_t head_dim) {
  const int64_t pairs = int64_t(rotary_factor * double(head_dim)) / 2;
  // Rounded to float at the places where the reference rounds.
  for (int64_t i = 0; i < pairs; ++i) {
    const float exponent = float(2 * i) / float(head_dim);
    frequencies_.push_back(1.0f / float(elementary::pow(theta, double(exponent))) / float(scaling));
  }
}

void RopeTable::cover(int64_t positions) {
  if (positions <= covered_) return;
  const int64_t upto = round_up(positions, 256);
  cos_.resize(size_t(upto * pairs()));
  sin_.resize(cos_.size());
  for (int64_t p = covered_; p < upto; ++p)
    for (int64_t i = 0; i < pairs(); ++i) {
      const float angle = float(p) * frequencies_[size_t(i)];  // in float, as the reference does
      cos_[size_t(p * pairs() + i)] = float(elementary::cos(double(angle)));
      sin_[size_t(p * pairs() + i)] = float(elementary::sin(double(angle)));
    }
  covered_ = upto;
}

}  // namespace paceline
