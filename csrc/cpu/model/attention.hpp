// Attention of a batch of rows, divided among the workers of a thread pool.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.hpp"
#include "runtime/kv_cache.hpp"
#include "runtime/memory.hpp"
#include "runtime/threads.hpp"

namespace paceline {

struct Layer;

// The place of one batch row.
struct Row {
  int64_t slot, position;
  int64_t last;           // last visible cache row
  int64_t first_sliding;  // first visible cache row of sliding layers; full layers see all from 0
  int64_t origin;         // index of the row in the batch
};

// Neighbouring rows of a slot attend as one tile, so that what they read of the cache is read once. A tile is one worker's
// work where there are enough of them; a large one is shared by all workers: scores by positions, softmax by queries,
// values by columns. No sum is divided, so the result is the same.
class Attention {
 public:
  Attention(const Kernels& kernels, int64_t heads, float eps) : kernels_(kernels), heads_(heads), eps_(eps) {}

  // Make room for that many rows over caches of that many positions.
  void reserve(const std::vector<Layer>& layers, int64_t rows, int64_t context, int threads);

  // A worker's memory, of at least two heads' width.
  float* scratch(const Worker& w) const { return scratch_.floats() + w.id * scratch_floats_; }

  // out [row][head][head_dim], rows every out_ld floats: attention of queries of that shape, which are normed and rotated
  // in place first. All workers call it; synchronised.
  struct Call {
    const Layer& layer;
    const std::vector<CacheView>& views;  // [slot]
    const RopeTable& rope;
    const std::vector<Row>& rows;
    float* q;
    int64_t q_ld;
    float* out;
    int64_t out_ld;
  };
  void run(const Worker& w, const Call& call) const;

 private:
  struct Item {
    int64_t row, rows, kv_head, head, heads;
    int64_t begin = 0, end = 0;  // positions, whole blocks
    int64_t scores = 0;          // where its scores lie in the shared memory
    int64_t queries() const { return rows * heads; }
    int64_t floats() const { return queries() * (end - begin); }
  };
  struct Tile;
  std::vector<Item> divide(const Call& call) const;
  void prepare(const Call& call, const Item& item, int64_t begin, int64_t end) const;
  void run_shared(const Worker& w, const Call& call, const std::vector<Item>& items) const;

  const Kernels& kernels_;
  int64_t heads_;
  float eps_;
  int64_t scratch_floats_ = 0, shared_floats_ = 0;
  Buffer scratch_;  // a worker: widened blocks, then the scores of its own tiles
  Buffer shared_;   // scores of tiles that all workers share
};

}  // namespace paceline
