// A Gemma 4 MTP drafter: all draft steps of a round over the target's cache.
#pragma once

#include <memory>
#include <vector>

#include "model/layers.hpp"
#include "model/target.hpp"

namespace paceline {

struct DrafterWeights {
  int64_t vocab = 0, backbone = 0;
  Shape shape;
  MatrixPtr pre_projection, post_projection;
  Floats final_norm;
  std::vector<Layer> layers;  // queries only

  // The head. Dense: [vocab, hidden]. With centroids: the rows in the order of the centroids' token lists, each list
  // padded to whole panels; `tokens` names the token of each row, -1 for padding.
  MatrixPtr head;
  MatrixPtr centroids;  // [count, hidden]; empty: dense head
  int64_t centroid_top_k = 0;
  std::vector<int32_t> tokens;
};

constexpr int kConfidenceBins = 16;

// What to draft: `depth` tokens at most for each of `anchors` sequences.
struct DraftRequest {
  const int32_t *slots, *positions, *newest;  // [anchors]
  const float* hidden;                        // [anchors][backbone]
  int64_t anchors, depth;
  const Draw* draws;  // [anchors]
  // [anchors][depth]: no drafting behind a depth when the line's chance of being accepted so far is below this; null: no
  // early stop. The chance is the product of `acceptance` [anchors][kConfidenceBins] by each draft's confidence.
  const float* floors;
  const float* acceptance;
};

struct DraftResult {
  int32_t* tokens;    // [anchors][depth]
  float* confidence;  // [anchors][depth]: the probability of each draft among those it was drawn from
  int32_t* lengths;   // [anchors]: drafts made; what stands behind them is void
  float* logits;      // [anchors][depth][vocab], null if not wanted
};

class Drafter {
 public:
  Drafter(DrafterWeights weights, std::shared_ptr<Target> target);

  void draft(const DraftRequest& request, const DraftResult& result);
  int64_t backbone() const { return weights_.backbone; }
  int64_t vocab() const { return weights_.vocab; }

  // The last draft step of anchor `row`, for comparison with a reference: its logits [vocab], -3e38 where the head did
  // not look, and the hidden state [backbone] that a next step would start from.
  void last_logits(int64_t row, float* out) const;
  const float* last_hidden(int64_t row) const { return next_.floats() + row * weights_.backbone; }

 private:
  void enter(const Worker& w, const std::vector<Drawn>& newest, const float* hidden, int64_t rows);
  void choose(const Worker& w, const DraftRequest& request, int64_t step, std::vector<Drawn>& drawn);
  Drawn draw(const Logits& logits, const DraftRequest& request, int64_t row, int64_t step) const;
  const Matrix& first_head() const { return weights_.centroids ? *weights_.centroids : *weights_.head; }
  void centroid_head(const Worker& w, int64_t rows);

  DrafterWeights weights_;
  std::shared_ptr<Target> target_;
  LayerRunner runner_;
  std::vector<const std::vector<CacheView>*> views_;  // a layer
  std::vector<std::vector<int64_t>> clusters_;        // a row: the centroids chosen
  std::vector<std::vector<int32_t>> ids_;             // a row: the tokens of its logits
  Buffer both_, x_, next_, logits_;
  PackedRows inputs_, rows_;
};

}  // namespace paceline
