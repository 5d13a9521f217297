// The layout of keys and values that attention kernels read.
#pragma once

#include <cstdint>

namespace paceline {

// Where the keys and values of one layer and slot lie. Rows live at position % ring (ring is a multiple of 16).
struct CacheView {
  bool bf16 = true;
  int64_t ring = 0, head_dim = 0;
  void* keys = nullptr;    // [kv head][ring / 16][head_dim][16]: sixteen keys side by side
  void* values = nullptr;  // [kv head][ring][head_dim]

  int64_t element() const { return bf16 ? 2 : 4; }
  uint8_t* key_head(int64_t h) const { return static_cast<uint8_t*>(keys) + h * ring * head_dim * element(); }
  uint8_t* value_head(int64_t h) const { return static_cast<uint8_t*>(values) + h * ring * head_dim * element(); }
};

}  // namespace paceline
