#include "model/target.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace paceline {
namespace {

std::vector<KvCache::LayerShape> cache_layers(const TargetWeights& weights) {
  std::vector<KvCache::LayerShape> layers;
  for (const Layer& layer : weights.layers)
    layers.push_back({layer.sliding, bool(layer.k), layer.kv_heads, layer.head_dim});
  return layers;
}

RopeTable rope_table(const ModelConfig& config, bool sliding) {
  const RopeConfig& rope = sliding ? config.rope_sliding : config.rope_full;
  for (const LayerConfig& layer : config.layers)
    if (layer.sliding == sliding) return RopeTable(rope.theta, rope.rotary_factor, rope.scaling, layer.head_dim);
  return {};
}

ModelConfig checked(const ModelConfig& c) {
  check_target(c);
  return c;
}

}  // namespace

TargetWeights::TargetWeights(const ModelConfig& c, const Weights& weights)
    : config(checked(c)), embed_scale(weights.vector("embed_tokens.scale", 1)[0]),
      embedding(weights.matrix("embed_tokens.weight", c.vocab, c.hidden)),
      head(c.tied_head ? embedding : weights.matrix("lm_head.weight", c.vocab, c.hidden)),
      final_norm(weights.vector("norm.weight", c.hidden)), layers(find_layers(c, weights)) {
  if (c.ple_size) {
    const int64_t width = c.ple_size * int64_t(c.layers.size());
    ple_scale = weights.vector("embed_tokens_per_layer.scale", 1)[0];
    ple_table = weights.table("embed_tokens_per_layer.weight", c.ple_vocab, width);
    ple_projection = weights.matrix("per_layer_model_projection.weight", width, c.hidden);
    ple_norm = weights.vector("per_layer_projection_norm.weight", c.ple_size);
  }
  weights.check_all_used();
}

Target::Target(const ModelConfig& config, const Weights& weights, const Kernels& kernels, int threads, int64_t slots,
               int64_t context, int64_t max_rows, CacheFormat cache)
    : weights_(config, weights), kernels_(kernels), pool_(std::make_unique<ThreadPool>(threads)),
      cache_(cache_layers(weights_), slots, context, config.window, max_rows, cache),
      rope_sliding_(rope_table(config, true)), rope_full_(rope_table(config, false)),
      runner_(kernels, weights_.config) {
  for (size_t i = 0; i < weights_.layers.size(); ++i) {
    const Layer& layer = weights_.layers[i];
    if (layer.k) last_kv_ = int64_t(i);
    views_.emplace_back();
    for (int64_t slot = 0; slot < slots; ++slot) views_.back().push_back(cache_.view(layer.kv_source, slot));
  }
}

void Target::fill_random(int64_t slot, int64_t length) {
  const int64_t first = cache_.length(slot);
  if (length < first || length > cache_.context())
    throw std::invalid_argument("a slot of " + std::to_string(first) + " positions cannot be filled up to " +
                                std::to_string(length) + " of " + std::to_string(cache_.context()));
  constexpr int64_t kNumbers = 4099;  // a prime, so that rows differ
  int64_t widest = 0;
  for (const Layer& layer : weights_.layers) widest = std::max(widest, layer.head_dim);
  Floats numbers(static_cast<size_t>(kNumbers + widest));
  uint32_t state = 1;
  for (float& x : numbers) x = float(int32_t(state = state * 1664525u + 1013904223u)) * 0x1p-31f;
  cache_.touch(slot, length);
  pool_->run([&](const Worker& w) {
    for (size_t i = 0; i < weights_.layers.size(); ++i) {
      const Layer& layer = weights_.layers[i];
      if (!layer.k) continue;
      const CacheView& view = views_[i][size_t(slot)];
      const int64_t begin = std::max(first, length - view.ring);
      w.for_share(length - begin, [&](int64_t n) {
        for (int64_t head = 0; head < layer.kv_heads; ++head) {
          const float* row = &numbers[size_t((begin + n) * 577 + head * 101) % kNumbers];
          kernels_.append(view, head, begin + n, row, row);
        }
      });
    }
  });
  cache_.extend(slot, length);
}

void Target::set_threads(int threads) { pool_ = std::make_unique<ThreadPool>(threads); }

int64_t Target::last_layer(bool sliding) const {
  for (int64_t i = int64_t(weights_.layers.size()) - 1; i >= 0; --i)
    if (weights_.layers[size_t(i)].k && weights_.layers[size_t(i)].sliding == sliding) return i;
  return -1;
}

void Target::embed(int32_t token, float* out) const {
  weights_.embedding->row(token, out);
  for (int64_t i = 0; i < weights_.config.hidden; ++i) out[i] *= weights_.embed_scale;
}

int64_t Target::forward(const int64_t* slots, const int64_t* positions, const int32_t* tokens, const uint8_t* selected,
                        int64_t count) {
  if (!count) return 0;
  std::vector<Row> rows;
  for (int64_t r = 0; r < count; ++r)
    rows.push_back(
        {slots[r], positions[r], positions[r], std::max(int64_t(0), positions[r] - weights_.config.window + 1), r});
  const std::vector<uint8_t> keep(selected, selected + count);
  const int64_t kept = std::count_if(keep.begin(), keep.end(), [](uint8_t s) { return s != 0; });
  int64_t top = 0;
  for (const Row& row : rows) top = std::max(top, row.position + 1);
  rope_sliding_.cover(top);
  rope_full_.cover(top);
  const int64_t ple_row = weights_.config.ple_size * int64_t(weights_.layers.size());
  runner_.reserve(weights_.layers, count, cache_.context(), pool_->size(), kept == count);
  ple_.reserve(product({count, round_up(ple_row, kPanel), 4}));
  hidden_.reserve(product({kept, weights_.config.hidden, 4}));
  logits_.reserve(product({kept, logits_ld(), 4}));

  for (const Row& row : rows) cache_.touch(row.slot, row.position + 1);
  pool_->run([&](const Worker& w) {
    embed_rows(w, tokens, count);
    for (size_t i = 0; i < weights_.layers.size(); ++i) {
      const Layer& layer = weights_.layers[i];
      const LayerRunner::Call call{layer,
                                   views_[i],
                                   rope(layer.sliding),
                                   ple_.floats() + int64_t(i) * weights_.config.ple_size,
                                   round_up(ple_row, kPanel),
                                   int64_t(i) == last_kv_ && kept < count,
                                   &keep};
      runner_.run(w, call, rows);
      if (rows.empty()) break;
    }
    if (kept) head(w, kept);
  });
  for (int64_t r = 0; r < count; ++r) cache_.extend(slots[r], positions[r] + 1);
  return kept;
}

// x = embedding * scale, and the per-layer inputs of all layers:
// (norm(projection(x) * hidden^-0.5) + table row * scale) * 2^-0.5.
void Target::embed_rows(const Worker& w, const int32_t* tokens, int64_t rows) {
  runner_.for_owned_rows(w, rows, [&](int64_t r) { embed(tokens[r], runner_.x(w, r)); });
  if (!weights_.config.ple_size) return;
  const int64_t size = weights_.config.ple_size, layers = int64_t(weights_.layers.size());
  const int64_t ld = round_up(size * layers, kPanel), hidden = weights_.config.hidden;
  runner_.sync_rows(w);
  const ActView act = runner_.pack_activations(w, *weights_.ple_projection, rows, runner_.x(w, 0), hidden);
  runner_.project(w, *weights_.ple_projection, act, rows, ple_.floats(), ld);
  w.barrier();
  const float root = 1.0f / std::sqrt(float(hidden)), half = std::sqrt(0.5f);
  w.for_share(rows, [&](int64_t r) {
    Floats inputs(size_t(weights_.ple_table.cols));
    weights_.ple_table.row(tokens[r], inputs.data());
    for (int64_t layer = 0; layer < layers; ++layer) {
      float* p = ple_.floats() + r * ld + layer * size;
      for (int64_t i = 0; i < size; ++i) p[i] *= root;
      kernels_.rms_norm(p, weights_.ple_norm.data(), size, weights_.config.eps, p);
      const float* input = &inputs[size_t(layer * size)];
      for (int64_t i = 0; i < size; ++i) p[i] = (p[i] + input[i] * weights_.ple_scale) * half;
    }
  });
}

// The selected rows are the first of x: final norm, LM head, soft cap.
void Target::head(const Worker& w, int64_t rows) {
  const int64_t hidden = weights_.config.hidden;
  runner_.norm_rows(w, rows, weights_.final_norm);
  w.for_share(rows, [&](int64_t r) { std::copy_n(runner_.temporary(w, r), hidden, hidden_.floats() + r * hidden); });
  const ActView act = runner_.pack_activations(w, *weights_.head, rows, runner_.temporary(w, 0), hidden);
  runner_.observe(w, weights_.head.get(), act, rows);
  const MatrixView& matrix = weights_.head->view();
  w.parallel_for(matrix.units(), 1, [&](int64_t begin, int64_t end) {
    kernels_.matmul(matrix, act, rows, begin, end, logits_.floats(), logits_ld());
    if (weights_.config.softcap == 0) return;
    const int64_t first = begin * kUnit, last = std::min(end * kUnit, logits_ld());
    for (int64_t r = 0; r < rows; ++r)
      kernels_.softcap(logits_.floats() + r * logits_ld() + first, last - first, weights_.config.softcap);
  });
}

}  // namespace paceline
