// The KV cache, and the rotary angles of its positions.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "formats/cache_view.hpp"
#include "runtime/memory.hpp"

namespace paceline {

constexpr int64_t kMostPositions = int64_t(1) << 30;  // of a context, a window, a pass
constexpr int64_t kMostSlots = int64_t(1) << 20;

// Throws std::invalid_argument for a name that no format has.
CacheFormat cache_format_from(const std::string& name);

// Keys and values of every layer that has its own, for a fixed number of slots.
//
// Full-attention layers keep every position. Sliding layers keep a ring of window + max_rows positions, so that rows
// of a rejected draft never overwrite rows that are still visible.
class KvCache {
 public:
  struct LayerShape {
    bool sliding, own;
    int64_t kv_heads, head_dim;
  };
  // Throws std::invalid_argument for sizes out of range, or whose product is more than memory can hold.
  KvCache(const std::vector<LayerShape>& layers, int64_t slots, int64_t context, int64_t window, int64_t max_rows,
          CacheFormat format);

  CacheView view(int64_t layer, int64_t slot) const;
  int64_t slots() const { return int64_t(length_.size()); }
  int64_t context() const { return context_; }
  int64_t max_rows() const { return max_rows_; }
  int64_t length(int64_t slot) const { return check_slot(slot), length_[size_t(slot)]; }
  size_t bytes() const { return memory_.bytes(); }

  // A slot that does not exist is std::out_of_range here and below.
  void check_slot(int64_t slot) const;
  // Rows up to there are about to be written; they count only once the slot is extended.
  void touch(int64_t slot, int64_t end);
  void extend(int64_t slot, int64_t length);
  // Throws std::invalid_argument when the rings no longer hold what a row at `length` would see.
  void truncate(int64_t slot, int64_t length);
  void clear(int64_t slot);

  // Keys, then values, of a layer with its own at positions first .. first + count: [2][kv_heads][count][head_dim]. Throws
  // std::invalid_argument for positions that are not in the cache, or no longer in a sliding ring.
  std::vector<float> numbers(int64_t layer, int64_t slot, int64_t first, int64_t count) const;

  // The rows of a slot, copied out and back in: whole sliding rings, and full layers as far as they are filled.
  struct Place {
    int64_t ring, head_dim, key_bytes;
    size_t offset;
    bool operator==(const Place&) const = default;
  };
  struct Snapshot {
    std::vector<Place> places;  // of the cache it was taken from, as are the next two
    int64_t context = 0, window = 0;
    CacheFormat format = CacheFormat::f32;
    Buffer rows;
    int64_t length = 0, high = 0;
    int64_t shortest = 0;  // the shortest length that it can be cut back to once it is restored
  };
  Snapshot save(int64_t slot) const;
  // Throws std::invalid_argument when the slot is not empty, or the snapshot is of a cache of another layout.
  void restore(int64_t slot, const Snapshot& snapshot);

 private:
  // Calls f(offset, bytes) for each stretch of a slot that `high` positions have filled.
  template <class F>
  void each_stretch(int64_t high, F f) const;

  int64_t context_, window_, max_rows_, ring_;
  CacheFormat format_;
  size_t slot_bytes_ = 0;
  std::vector<Place> places_;           // [layer]
  std::vector<int64_t> length_, high_;  // [slot]; high: one past the highest position ever written
  Buffer memory_;
};

// Rotation angles, filled as positions are first used.
class RopeTable {
 public:
  RopeTable() = default;
  // Of the pairs that rotate: theta^(-2 i / head_dim) / scaling for the first rotary_factor * head_dim / 2 of them.
  RopeTable(double theta, double rotary_factor, double scaling, int64_t head_dim);
  void cover(int64_t positions);
  int64_t pairs() const { return int64_t(frequencies_.size()); }
  const float* cos(int64_t position) const { return cos_.data() + position * pairs(); }
  const float* sin(int64_t position) const { return sin_.data() + position * pairs(); }

 private:
  int64_t covered_ = 0;  // positions
  std::vector<float> frequencies_, cos_, sin_;
};

}  // namespace paceline
