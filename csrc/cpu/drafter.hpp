// A Gemma 4 MTP drafter: all draft steps of a round over the target's cache.
#pragma once

#include <memory>
#include <vector>

#include "layers.hpp"
#include "target.hpp"

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

class Drafter {
 public:
  Drafter(DrafterWeights weights, std::shared_ptr<Target> target);

  // Guess `depth` tokens for each of `anchors` sequences: tokens and confidence [anchors][depth].
  void draft(const int32_t* slots, const int32_t* positions, const int32_t* newest, const float* hidden,
             int64_t anchors, int64_t depth, int32_t* tokens, float* confidence);
  int64_t backbone() const { return weights_.backbone; }
  int64_t vocab() const { return weights_.vocab; }

  // The last draft step of anchor `row`, for comparison with a reference: its logits [vocab], -3e38 where the head did
  // not look, and the hidden state [backbone] that a next step would start from.
  void last_logits(int64_t row, float* out) const;
  const float* last_hidden(int64_t row) const { return next_.floats() + row * weights_.backbone; }

 private:
  void enter(const Member& m, const std::vector<int32_t>& newest, const float* hidden, int64_t rows);
  void choose(const Member& m, int64_t rows, int32_t* token, float* confidence);
  void dense_head(const Member& m, int64_t rows, int32_t* token, float* confidence);
  const Matrix& first_head() const { return weights_.centroids ? *weights_.centroids : *weights_.head; }
  void centroid_head(const Member& m, int64_t rows, int32_t* token, float* confidence);

  DrafterWeights weights_;
  std::shared_ptr<Target> target_;
  LayerRunner runner_;
  std::vector<const std::vector<CacheView>*> views_;  // a layer
  std::vector<std::vector<int64_t>> clusters_;        // a row: the centroids chosen
  Buffer both_, x_, next_, logits_;
  Prepared inputs_, rows_;
};

}  // namespace paceline
