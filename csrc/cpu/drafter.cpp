#include "drafter.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

namespace paceline {

Drafter::Drafter(DrafterWeights weights, std::shared_ptr<Target> target)
    : weights_(std::move(weights)), target_(std::move(target)), runner_(target_->kernels(), weights_.shape) {
  for (const Layer& layer : weights_.layers) {
    const int64_t source = target_->last_layer(layer.sliding);
    if (source < 0) throw std::invalid_argument("the target has no cache for one of the drafter's layers");
    views_.push_back(&target_->views(source));
  }
  if (first_head().view().format != weights_.post_projection->view().format)
    throw std::invalid_argument("a drafter's head and post projection have one format: they meet the same rows");
}

void Drafter::draft(const int32_t* slots, const int32_t* positions, const int32_t* newest, const float* hidden,
                    int64_t anchors, int64_t depth, int32_t* tokens, float* confidence) {
  const std::lock_guard lock(target_->busy());
  const int64_t window = target_->weights().window, backbone = weights_.backbone;
  std::vector<Row> rows;
  int64_t top = 0;
  for (int64_t r = 0; r < anchors; ++r) {
    const int64_t position = positions[r];
    if (slots[r] < 0 || slots[r] >= target_->cache().slots() || position < 1 ||
        position != target_->cache().length(slots[r]) || newest[r] < 0 || newest[r] >= target_->weights().vocab)
      throw std::invalid_argument("an anchor does not continue its slot");
    // The position is that of the newest token, which is not cached; sliding layers see the window of rows before it.
    rows.push_back({slots[r], position, position - 1, std::max(int64_t(0), position - window), r});
    top = std::max(top, position + 1);
  }
  for (bool sliding : {true, false}) target_->rope(sliding).cover(top);
  const int64_t width = weights_.head->view().panels() * kPanel;
  const int threads = target_->team().size();
  runner_.reserve(weights_.layers, anchors, target_->cache().context(), threads, true);
  inputs_.reserve(round_up(anchors, kTile), round_up(2 * backbone, kBlock), threads);
  rows_.reserve(anchors, round_up(weights_.shape.hidden, kBlock));
  both_.reserve(size_t(threads * anchors * 2 * backbone * 4));
  next_.reserve(size_t(anchors * round_up(backbone, kPanel) * 4));
  x_.reserve(size_t(anchors * round_up(weights_.shape.hidden, kPanel) * 4));
  logits_.reserve(size_t(anchors * width * 4));
  clusters_.resize(size_t(anchors));
  std::vector<int32_t> token(newest, newest + anchors);
  std::vector<float> sure(static_cast<size_t>(anchors));

  target_->team().run([&](const Member& m) {
    for (int64_t step = 0; step < depth; ++step) {
      enter(m, token, step ? next_.floats() : hidden, anchors);
      for (size_t i = 0; i < weights_.layers.size(); ++i) {
        const Layer& layer = weights_.layers[i];
        runner_.run(m, LayerRunner::Call{layer, *views_[i], target_->rope(layer.sliding)}, rows);
      }
      choose(m, anchors, token.data(), sure.data());
      LayerRunner::each(m, anchors, [&](int64_t r) {
        tokens[r * depth + step] = token[size_t(r)];
        confidence[r * depth + step] = std::isnan(sure[size_t(r)]) ? 0.0f : sure[size_t(r)];
      });
    }
  });
}

// x = pre_projection(concat(target embedding of the newest token, hidden)).
void Drafter::enter(const Member& m, const std::vector<int32_t>& newest, const float* hidden, int64_t rows) {
  const int64_t backbone = weights_.backbone, width = weights_.shape.hidden;
  float* both = both_.floats() + runner_.copy(m) * rows * 2 * backbone;
  runner_.keep(m, rows, [&](int64_t r) {
    target_->embed(newest[size_t(r)], both + r * 2 * backbone);
    std::copy_n(hidden + r * backbone, backbone, both + r * 2 * backbone + backbone);
  });
  runner_.gather(m);
  const ActView act = runner_.prepare_rows(m, inputs_, *weights_.pre_projection, rows, both, 2 * backbone);
  runner_.project(m, *weights_.pre_projection, act, rows, x_.floats(), round_up(width, kPanel));
  m.barrier();
  runner_.keep(m, rows, [&](int64_t r) {
    std::copy_n(x_.floats() + r * round_up(width, kPanel), width, runner_.x(m, r));
  });
}

// Final norm, the hidden state of the next step, and the best token of the head. Ends with a barrier.
void Drafter::choose(const Member& m, int64_t rows, int32_t* token, float* confidence) {
  runner_.norm_rows(m, rows, weights_.final_norm);
  const int64_t ld = weights_.head->view().panels() * kPanel;
  const ActView act = runner_.prepare_rows(m, first_head(), rows, runner_.temporary(m, 0), weights_.shape.hidden);
  runner_.project(m, *weights_.post_projection, act, rows, next_.floats(), weights_.backbone);
  runner_.project(m, first_head(), act, rows, logits_.floats(), ld);
  m.barrier();
  if (weights_.centroids) centroid_head(m, rows, token, confidence);
  else dense_head(m, rows, token, confidence);
  m.barrier();
}

void Drafter::dense_head(const Member& m, int64_t rows, int32_t* token, float* confidence) {
  const Kernels& kernels = target_->kernels();
  const int64_t ld = weights_.head->view().panels() * kPanel;
  LayerRunner::each(m, rows, [&](int64_t r) {
    token[r] = int32_t(kernels.arg_max(logits_.floats() + r * ld, weights_.vocab, &confidence[r]));
  });
}

// The best centroids (their scores are in logits_) select the rows of the head that are computed; the others cannot be
// drafted.
void Drafter::centroid_head(const Member& m, int64_t rows, int32_t* token, float* confidence) {
  const Kernels& kernels = target_->kernels();
  const MatrixView& head = weights_.head->view();
  const MatrixView& centroids = weights_.centroids->view();
  const int64_t ld = head.panels() * kPanel, top_k = weights_.centroid_top_k;
  const int64_t panels = head.panels() / centroids.rows, width = panels * kPanel;  // a centroid
  const ActView single = rows_.view(*weights_.head, 1);  // each row meets other rows of the head: tiles of one
  LayerRunner::each(m, rows, [&](int64_t r) {
    float* score = logits_.floats() + r * ld;
    for (int64_t i = 0; i < centroids.rows; ++i)
      if (std::isnan(score[i])) score[i] = -3e38f;  // damaged weights must not break the ordering below
    std::vector<int64_t>& chosen = clusters_[size_t(r)];
    chosen.resize(size_t(centroids.rows));
    std::iota(chosen.begin(), chosen.end(), int64_t(0));
    std::nth_element(chosen.begin(), chosen.begin() + top_k - 1, chosen.end(), [&](int64_t a, int64_t b) {
      return score[a] != score[b] ? score[a] > score[b] : a < b;
    });
    chosen.resize(size_t(top_k));
    std::sort(chosen.begin(), chosen.end());
    kernels.prepare(single, r, runner_.temporary(m, r), weights_.shape.hidden, 0, single.padded_cols / kGroup);
  });
  m.barrier();

  LayerRunner::each(m, rows * top_k, [&](int64_t i) {
    const int64_t r = i / top_k, cluster = clusters_[size_t(r)][size_t(i % top_k)];
    MatrixView part = head;
    part.rows = width;
    part.data = head.panel(cluster * panels);
    kernels.matmul(part, single.tile(r), 1, 0, part.units(), logits_.floats() + r * ld + i % top_k * width, ld);
  });
  m.barrier();

  LayerRunner::each(m, rows, [&](int64_t r) {
    float* logit = logits_.floats() + r * ld;
    const auto id = [&](int64_t i) {
      return weights_.tokens[size_t(clusters_[size_t(r)][size_t(i / width)] * width + i % width)];
    };
    int32_t best = -1;
    for (int64_t i = 0; i < top_k * width; ++i)
      if (id(i) < 0) logit[i] = -3e38f;
    const float top = logit[kernels.arg_max(logit, top_k * width, &confidence[r])];
    for (int64_t i = 0; i < top_k * width; ++i)  // of equal logits the lowest token
      if (logit[i] == top && id(i) >= 0 && (best < 0 || id(i) < best)) best = id(i);
    token[r] = std::max(best, 0);  // damaged weights may leave nothing to choose from; the target will not mind
  });
}

void Drafter::last_logits(int64_t row, float* out) const {
  const int64_t ld = weights_.head->view().panels() * kPanel;
  const float* logit = logits_.floats() + row * ld;
  if (!weights_.centroids) {
    std::copy_n(logit, weights_.vocab, out);
    return;
  }
  const int64_t width = ld / weights_.centroids->view().rows;
  std::fill_n(out, weights_.vocab, -3e38f);
  for (int64_t cluster : clusters_.at(size_t(row)))
    for (int64_t i = 0; i < width; ++i, ++logit)
      if (const int32_t token = weights_.tokens[size_t(cluster * width + i)]; token >= 0) out[token] = *logit;
}

}  // namespace paceline
