// A model's configuration, and its tensors by canonical name (those of paceline.checkpoint.names).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <variant>
#include <vector>

#include "runtime/kv_cache.hpp"
#include "runtime/memory.hpp"

namespace paceline {

using Floats = std::vector<float>;

struct RopeConfig {
  double theta = 1e4, rotary_factor = 1;  // the share of the head's frequency pairs that rotate
  double scaling = 1;                     // positions are divided by it
};

struct LayerConfig {
  bool sliding;
  int64_t head_dim, kv_heads, intermediate;
  int64_t kv_source;  // the layer whose K/V it attends to
  bool has_v;
};

// The fields of paceline.config.TargetConfig or DrafterConfig that the native code uses.
struct ModelConfig {
  int64_t vocab, hidden, heads, window;
  float eps;
  RopeConfig rope_sliding, rope_full;
  std::vector<LayerConfig> layers;
  double attention_scale = 1;  // of the scores
  bool value_norm = true, layer_scalar = true;

  // Of targets: 0 for none.
  float softcap = 0;
  bool tied_head = true;  // the LM head is the embedding
  int64_t ple_size = 0, ple_vocab = 0;
  int64_t experts = 0, active_experts = 0, expert_intermediate = 0;

  // Of drafters.
  int64_t backbone = 0;                       // hidden size of the target
  int64_t draft_vocab = 0;                    // tokens of a drafter's head
  int64_t centroids = 0, centroid_top_k = 0;  // 0: dense head
};

// Throws std::invalid_argument, naming the setting, when no model has these settings: a count out of range, heads that do
// not divide, a layer that attends to another one's K/V which does not fit it, a number that is not finite. All that is
// sized or indexed by a setting counts on this, so it comes first.
void check_target(const ModelConfig& config);
void check_drafter(const ModelConfig& config);

// A model's tensors. What a format or a file cannot say is checked here: every access names the shape it needs, and
// throws std::invalid_argument with the tensor's name when it is missing or of another shape.
class Weights {
 public:
  using Tensor = std::variant<MatrixPtr, std::vector<MatrixPtr>, Floats, std::vector<int32_t>, Table>;

  void add(const std::string& name, Tensor tensor) { tensors_.insert_or_assign(name, std::move(tensor)); }

  MatrixPtr matrix(const std::string& name, int64_t rows, int64_t cols) const;
  std::vector<MatrixPtr> matrices(const std::string& name, int64_t count, int64_t rows, int64_t cols) const;
  const Floats& vector(const std::string& name, int64_t size) const;
  const Table& table(const std::string& name, int64_t rows, int64_t cols) const;
  const std::vector<int32_t>& integers(const std::string& name) const;

  // Throws when there is a tensor that no access has named: the settings are another model's.
  void check_all_used() const;

 private:
  template <class T>
  const T& get(const std::string& name) const;

  std::map<std::string, Tensor> tensors_;
  mutable std::set<std::string> used_;
};

}  // namespace paceline
