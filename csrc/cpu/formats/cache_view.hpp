// The layout of keys and values that attention kernels read.
#pragma once

#include <cstdint>

namespace paceline {

// What keys and values are held as. q8: groups of 32 along the head's dimension, int8 numbers and a bfloat16 scale each.
enum class CacheFormat : uint8_t { f32, bf16, q8 };

constexpr int64_t kBlockRows = 16;   // positions that lie together
constexpr int64_t kCacheGroup = 32;  // columns of a q8 scale; the last group of a row may be half as wide
constexpr int64_t kScaleBytes = 32;  // sixteen bfloat16, in front of a q8 group
constexpr int64_t kGroupBytes = kScaleBytes + kCacheGroup * kBlockRows;

// Where the keys and values of one layer and slot lie. Rows live at position % ring (ring is a multiple of 16), in blocks
// of sixteen positions:
//   keys    [kv head][ring / 16][head_dim][16]: sixteen keys side by side
//   values  [kv head][ring / 16][head_dim / 16][16][16]: sixteen columns of sixteen values, a panel, together
// In q8 each group of 32 columns, two panels of values, follows its scales, one for each position.
struct CacheView {
  CacheFormat format = CacheFormat::bf16;
  int64_t ring = 0, head_dim = 0;
  uint8_t* keys = nullptr;
  uint8_t* values = nullptr;

  // Bytes of the keys, or the values, of a block of one head.
  static int64_t block_bytes(CacheFormat format, int64_t head_dim) {
    const int64_t numbers = head_dim * kBlockRows;
    if (format == CacheFormat::q8) return numbers + (head_dim + kCacheGroup - 1) / kCacheGroup * kScaleBytes;
    return numbers * (format == CacheFormat::bf16 ? 2 : 4);
  }
  // The offset of the block that holds a position of a head.
  int64_t offset(int64_t head, int64_t position) const {
    return (head * ring + position % ring) / kBlockRows * block_bytes(format, head_dim);
  }
  uint8_t* key_block(int64_t head, int64_t position) const { return keys + offset(head, position); }
  uint8_t* value_block(int64_t head, int64_t position) const { return values + offset(head, position); }
};

}  // namespace paceline
