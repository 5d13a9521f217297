// A Gemma 3 or Gemma 4 target: one forward pass over a ragged batch of rows.
#pragma once

#include <memory>
#include <vector>

#include "model/layers.hpp"

namespace paceline {

struct TargetWeights {
  TargetWeights(const ModelConfig& config, const Weights& weights);

  ModelConfig config;
  float embed_scale;
  MatrixPtr embedding, head;  // the same where the head is tied
  Floats final_norm;
  std::vector<Layer> layers;

  // Per-layer embeddings, if there are any. The table stays in its mapped file.
  float ple_scale = 1.0f;
  Table ple_table;
  MatrixPtr ple_projection;
  Floats ple_norm;
};

class Target {
 public:
  // Throws std::invalid_argument for settings or sizes that no model has, and for tensors that do not fit the settings.
  Target(const ModelConfig& config, const Weights& weights, const Kernels& kernels, int threads, int64_t slots,
         int64_t context, int64_t max_rows, CacheFormat cache);

  // Rows of a slot are adjacent, with positions that continue its cache: Decoder checks it. Returns how many are selected; their logits
  // [selected, logits_ld()] and hidden states [selected, hidden] stay valid until the next call.
  int64_t forward(const int64_t* slots, const int64_t* positions, const int32_t* tokens, const uint8_t* selected,
                  int64_t rows);

  float* logits() { return logits_.floats(); }
  const float* hidden() const { return hidden_.floats(); }
  int64_t logits_ld() const { return round_up(weights_.config.vocab, kPanel); }

  // For benchmarks: continue a slot's cache with random rows up to a length. Throws std::invalid_argument if that is shorter,
  // or more than the cache holds.
  void fill_random(int64_t slot, int64_t length);

  void set_threads(int threads);
  void simulate_routing(const SimulatedRouting& routing) { runner_.simulate_routing(routing); }
  void set_observer(Observer* observer) { runner_.set_observer(observer); }
  int threads() const { return pool_->size(); }

  const TargetWeights& weights() const { return weights_; }
  const Kernels& kernels() const { return kernels_; }
  KvCache& cache() { return cache_; }
  const KvCache& cache() const { return cache_; }
  ThreadPool& pool() { return *pool_; }
  RopeTable& rope(bool sliding) { return sliding ? rope_sliding_ : rope_full_; }
  // Views of a layer's cache, a slot.
  const std::vector<CacheView>& views(int64_t layer) const { return views_[size_t(layer)]; }
  int64_t last_layer(bool sliding) const;       // the last with K/V of its own of that type; -1 if none
  void embed(int32_t token, float* out) const;  // [hidden], scaled

 private:
  void embed_rows(const Worker& w, const int32_t* tokens, int64_t rows);
  void head(const Worker& w, int64_t rows);

  TargetWeights weights_;
  const Kernels& kernels_;
  std::unique_ptr<ThreadPool> pool_;
  KvCache cache_;
  std::vector<std::vector<CacheView>> views_;  // [layer][slot]: the cache it attends to
  RopeTable rope_sliding_, rope_full_;
  LayerRunner runner_;
  int64_t last_kv_ = 0;  // after this layer's K/V only selected rows go on
  Buffer ple_, logits_, hidden_;
};

}  // namespace paceline
