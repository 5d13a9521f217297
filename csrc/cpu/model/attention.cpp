#include "model/attention.hpp"

#include <algorithm>
#include <utility>

#include "model/layers.hpp"

namespace paceline {
namespace {

constexpr int64_t kOwnScores = int64_t(1) << 17;   // floats of scores of a tile that one worker takes: half a megabyte
constexpr int64_t kSharedWork = int64_t(1) << 18;  // products of a score step from which sharing is worth its barriers
constexpr int64_t kScoreGrain = 4, kPanelGrain = 4;  // blocks, and panels of columns, that a worker takes at once

// f(i, begin, end) over counts[i] parts of items i, as if they were one.
template <class F>
void parallel_parts(const Worker& w, const std::vector<int64_t>& counts, int64_t grain, F f) {
  int64_t total = 0;
  for (int64_t count : counts) total += count;
  w.parallel_for(total, grain, [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (size_t i = 0; i < counts.size(); first += counts[i++]) {
      const int64_t b = std::max(begin - first, int64_t(0)), e = std::min(end - first, counts[i]);
      if (b < e) f(i, b, e);
    }
  });
}

Span span_of(const Layer& layer, const Row& row) { return {layer.sliding ? row.first_sliding : 0, row.last}; }

}  // namespace

// An item as the kernels take it.
struct Attention::Tile : QueryTile {
  Span each[kTileQueries];

  Tile(const Call& call, const Item& item, float* memory) {
    const int64_t columns = item.head * call.layer.head_dim;
    for (int64_t r = 0; r < item.rows; ++r) each[r] = span_of(call.layer, call.rows[size_t(item.row + r)]);
    rows = int(item.rows), heads = int(item.heads), spans = each;
    begin = item.begin, end = item.end, scores = memory;
    q = call.q + item.row * call.q_ld + columns, q_ld = call.q_ld;
    out = call.out + item.row * call.out_ld + columns, out_ld = call.out_ld;
  }
  Tile(const Tile&) = delete;
  Tile& operator=(const Tile&) = delete;
};

void Attention::reserve(const std::vector<Layer>& layers, int64_t rows, int64_t context, int threads) {
  int64_t dim = 0, queries = 0;
  for (const Layer& layer : layers) {
    dim = std::max(dim, layer.head_dim);
    queries = std::max(queries, std::min(kTileQueries, rows * heads_ / layer.kv_heads));
  }
  scratch_floats_ = kStretchRows * round_up(dim, kCacheGroup) + kOwnScores;
  shared_floats_ = queries * round_up(context + kBlockRows, kBlockRows);
  scratch_.reserve(product({threads, scratch_floats_, 4}));
  shared_.reserve(product({shared_floats_, 4}));
}

std::vector<Attention::Item> Attention::divide(const Call& call) const {
  const int64_t kv_heads = call.layer.kv_heads, sharing = heads_ / kv_heads;  // query heads of a K/V head
  const int64_t parts = (sharing + kTileQueries - 1) / kTileQueries,
                most = std::max<int64_t>(1, kTileQueries / sharing);
  std::vector<Item> items;
  for (int64_t r = 0, count = 0; r < int64_t(call.rows.size()); r += count) {
    Span span = span_of(call.layer, call.rows[size_t(r)]);
    for (count = 0; count < most && r + count < int64_t(call.rows.size()); ++count) {
      const Row& row = call.rows[size_t(r + count)];
      if (row.slot != call.rows[size_t(r)].slot) break;
      const Span other = span_of(call.layer, row);
      span = {std::min(span.first, other.first), std::max(span.last, other.last)};
    }
    for (int64_t h = 0; h < kv_heads; ++h)
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = sharing * part / parts, stop = sharing * (part + 1) / parts;
        items.push_back({r, count, h, h * sharing + first, stop - first, span.first / kBlockRows * kBlockRows,
                         (span.last / kBlockRows + 1) * kBlockRows});
      }
  }
  return items;
}

// Norm and rotate queries [begin, end) of an item.
void Attention::prepare(const Call& call, const Item& item, int64_t begin, int64_t end) const {
  const int64_t dim = call.layer.head_dim;
  for (int64_t j = begin; j < end; ++j) {
    const int64_t r = item.row + j / item.heads, position = call.rows[size_t(r)].position;
    float* q = call.q + r * call.q_ld + (item.head + j % item.heads) * dim;
    kernels_.rms_norm(q, call.layer.q_norm.data(), dim, eps_, q);
    kernels_.rope(q, dim, call.rope.cos(position), call.rope.sin(position), call.rope.pairs());
  }
}

void Attention::run(const Worker& w, const Call& call) const {
  const int64_t dim = call.layer.head_dim;
  const std::vector<Item> items = divide(call);
  const bool few = int64_t(items.size()) < 2 * w.size;  // too few for all workers to end together
  std::vector<Item> own, shared;
  for (const Item& item : items)
    (item.floats() > kOwnScores || (few && item.floats() * dim >= kSharedWork) ? shared : own).push_back(item);
  w.parallel_for(int64_t(own.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Item& item = own[size_t(i)];
      const CacheView& view = call.views[size_t(call.rows[size_t(item.row)].slot)];
      float* wide = scratch(w);
      const Tile tile(call, item, wide + scratch_floats_ - kOwnScores);
      prepare(call, item, 0, item.queries());
      kernels_.score(view, item.kv_head, tile, 0, tile.width() / kBlockRows, wide);
      kernels_.softmax(tile, 0, item.queries());
      kernels_.mix(view, item.kv_head, tile, 0, dim / 16, wide);
    }
  });
  for (size_t i = 0; i < shared.size();) {  // as many at once as the memory for scores holds
    std::vector<Item> batch;
    for (int64_t used = 0; i < shared.size() && used + shared[i].floats() <= shared_floats_; ++i) {
      shared[i].scores = std::exchange(used, used + shared[i].floats());
      batch.push_back(shared[i]);
    }
    run_shared(w, call, batch);
  }
  if (shared.empty()) w.barrier();
}

void Attention::run_shared(const Worker& w, const Call& call, const std::vector<Item>& items) const {
  std::vector<int64_t> queries, blocks, panels(items.size(), call.layer.head_dim / 16);
  for (const Item& item : items)
    queries.push_back(item.queries()), blocks.push_back((item.end - item.begin) / kBlockRows);
  const auto tile = [&](size_t i) { return Tile(call, items[i], shared_.floats() + items[i].scores); };
  const auto view = [&](size_t i) -> const CacheView& {
    return call.views[size_t(call.rows[size_t(items[i].row)].slot)];
  };
  parallel_parts(w, queries, 1, [&](size_t i, int64_t begin, int64_t end) { prepare(call, items[i], begin, end); });
  w.barrier();
  parallel_parts(w, blocks, kScoreGrain, [&](size_t i, int64_t begin, int64_t end) {
    kernels_.score(view(i), items[i].kv_head, tile(i), begin, end, scratch(w));
  });
  w.barrier();
  parallel_parts(w, queries, 1, [&](size_t i, int64_t begin, int64_t end) { kernels_.softmax(tile(i), begin, end); });
  w.barrier();
  parallel_parts(w, panels, kPanelGrain, [&](size_t i, int64_t begin, int64_t end) {
    kernels_.mix(view(i), items[i].kv_head, tile(i), begin, end, scratch(w));
  });
  w.barrier();
}

}  // namespace paceline
