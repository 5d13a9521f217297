// A Gemma 4 MTP drafter: all draft steps of a round over the target's cache.
#pragma once

#include <memory>
#include <vector>

#include "model/layers.hpp"
#include "model/target.hpp"

namespace paceline {

struct DrafterWeights {
  DrafterWeights(const ModelConfig& config, const Weights& weights);

  ModelConfig config;
  MatrixPtr pre_projection, post_projection;
  Floats final_norm;
  std::vector<Layer> layers;  // queries only

  // The head. Dense: [draft_vocab, hidden]; of a part of the vocabulary, `tokens` names the token of each row. With
  // centroids: the rows in the order of the centroids' token lists, each list padded to whole panels, -1 in `tokens`.
  MatrixPtr head;
  MatrixPtr centroids;  // [count, hidden]; empty: dense head
  std::vector<int32_t> tokens;
};

constexpr int kConfidenceBins = 16;

// How far to draft.
struct DraftLimit {
  int64_t length = 0;  // tokens at most
  // [length]: stop after a token when the draft's chance of acceptance is below this; empty: never. The chance is the
  // product of `acceptance` [kConfidenceBins] by each token's confidence.
  std::vector<float> floors, acceptance;
};

// A sequence to draft for.
struct DraftRequest {
  int64_t slot, position;  // of the newest token, which is not in the KV cache yet
  int32_t newest;
  const float* hidden;  // [backbone] the target's state at the row before it
  SamplingParams params;
  const DraftLimit& limit;
};

struct DraftResult {
  std::vector<int32_t> tokens;
  std::vector<float> confidence;  // the probability of each token among those it was sampled from
};

class Drafter {
 public:
  // Throws std::invalid_argument for settings that no drafter has, that do not fit the target's, or that the tensors do
  // not fit.
  Drafter(const ModelConfig& config, const Weights& weights, std::shared_ptr<Target> target);

  // One result a request. Requests continue their slots: Decoder checks it.
  std::vector<DraftResult> draft(const std::vector<DraftRequest>& requests);

  // The last draft step of anchor `row`, for comparison with a reference: its logits [vocab], -3e38 where the head did
  // not look, and the hidden state [backbone] that a next step would start from.
  // Throws std::out_of_range when the last step had no such row.
  Floats last_logits(int64_t row) const;
  Floats last_hidden(int64_t row) const;

  void set_observer(Observer* observer) { runner_.set_observer(observer); }

 private:
  void check_pair() const;
  void check_row(int64_t row) const;
  void reserve(int64_t rows);
  void enter(const Worker& w, const std::vector<Sampled>& newest, int64_t rows);
  void choose(const Worker& w, const std::vector<DraftRequest>& requests, int64_t step, std::vector<Sampled>& sampled);
  Sampled sample(const Logits& logits, const DraftRequest& request, int64_t step) const;
  const Matrix& first_head() const { return weights_.centroids ? *weights_.centroids : *weights_.head; }
  void centroid_head(const Worker& w, int64_t rows);
  const std::vector<int32_t>* ids(int64_t row) const;

  DrafterWeights weights_;
  std::shared_ptr<Target> target_;
  LayerRunner runner_;
  std::vector<const std::vector<CacheView>*> views_;  // [layer]
  std::vector<std::vector<int64_t>> clusters_;        // [row]: the chosen centroids
  std::vector<std::vector<int32_t>> ids_;             // [row]: the tokens of its logits
  int64_t drafted_ = 0;                               // anchors of the last call of draft
  Buffer both_, x_, next_, logits_;
  PackedRows inputs_, rows_;
};

}  // namespace paceline
