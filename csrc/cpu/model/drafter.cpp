#include "model/drafter.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <stdexcept>

namespace paceline {

namespace {

constexpr int64_t kStart = 4096;  // bytes of a panel that are requested while the lists before it are computed
constexpr int64_t kLists = 16;    // of a head with centroids, that a worker takes at least

// The numbers of the `count` best of n scores, ascending; of equal scores the first.
void choose_lists(float* score, int64_t n, int64_t count, std::vector<int64_t>& chosen) {
  for (int64_t i = 0; i < n; ++i)
    if (std::isnan(score[i])) score[i] = -3e38f;  // damaged weights must not break the ordering below
  std::vector<float> order(score, score + n);
  std::nth_element(order.begin(), order.begin() + count - 1, order.end(), std::greater<float>());
  const float least = order[size_t(count - 1)];
  int64_t equal = count - std::count_if(score, score + n, [&](float s) { return s > least; });
  chosen.clear();
  for (int64_t i = 0; i < n; ++i)
    if (score[i] > least || (score[i] == least && equal-- > 0)) chosen.push_back(i);
}

ModelConfig checked(const ModelConfig& c) {
  check_drafter(c);
  return c;
}

}  // namespace

DrafterWeights::DrafterWeights(const ModelConfig& c, const Weights& weights)
    : config(checked(c)), pre_projection(weights.matrix("pre_projection.weight", c.hidden, 2 * c.backbone)),
      post_projection(weights.matrix("post_projection.weight", c.backbone, c.hidden)),
      final_norm(weights.vector("norm.weight", c.hidden)), layers(find_layers(c, weights)) {
  if (!c.centroids) {
    head = weights.matrix("embed_tokens.weight", c.draft_vocab, c.hidden);
    if (c.draft_vocab < c.vocab) {
      tokens = weights.integers("draft_token_ids");
      check_range("the size of the tensor draft_token_ids", int64_t(tokens.size()), c.draft_vocab, c.draft_vocab);
      for (int32_t token : tokens) check_range("a token of draft_token_ids", token, 0, c.vocab - 1);
    }
  } else {
    const int64_t rows = c.centroids * round_up(c.vocab / c.centroids, kPanel);
    head = weights.matrix("ordered_head.weight", rows, c.hidden);
    centroids = weights.matrix("masked_embedding.centroids.weight", c.centroids, c.hidden);
    tokens = weights.integers("ordered_head.tokens");
    check_range("the size of the tensor ordered_head.tokens", int64_t(tokens.size()), rows, rows);
    for (int32_t token : tokens) check_range("a token of ordered_head.tokens", token, -1, c.vocab - 1);
  }
  weights.check_all_used();
}

Drafter::Drafter(const ModelConfig& config, const Weights& weights, std::shared_ptr<Target> target)
    : weights_(config, weights), target_(std::move(target)), runner_(target_->kernels(), weights_.config) {
  check_pair();
  for (const Layer& layer : weights_.layers) views_.push_back(&target_->views(target_->last_layer(layer.sliding)));
}

// What is read of the target: embeddings, hidden states, K/V, rotary tables.
void Drafter::check_pair() const {
  const ModelConfig &ours = weights_.config, &theirs = target_->weights().config;
  const auto check = [](const std::string& what, int64_t of_drafter, int64_t of_target) {
    if (of_drafter != of_target)
      throw std::invalid_argument("the drafter does not fit the target: its " + what + " is " +
                                  std::to_string(of_drafter) + ", the target's " + std::to_string(of_target));
  };
  check("backbone_hidden_size", ours.backbone, theirs.hidden);
  check("vocab_size", ours.vocab, theirs.vocab);
  for (const Layer& layer : weights_.layers) {
    const int64_t source = target_->last_layer(layer.sliding);
    if (source < 0) throw std::invalid_argument("the target has no cache for one of the drafter's layers");
    const Layer& cached = target_->weights().layers[size_t(source)];
    check("head_dim", layer.head_dim, cached.head_dim);
    check("number of K/V heads", layer.kv_heads, cached.kv_heads);
  }
}

void Drafter::reserve(int64_t rows) {
  const int64_t backbone = weights_.config.backbone, width = weights_.head->view().padded_rows();
  const int threads = target_->pool().size();
  runner_.reserve(weights_.layers, rows, target_->cache().context(), threads, true,
                  act_formats({weights_.post_projection.get(), &first_head()}));
  inputs_.reserve(round_up(rows, kTile), round_up(2 * backbone, kMaxBlock), threads);
  rows_.reserve(rows, round_up(weights_.config.hidden, kMaxBlock));
  both_.reserve(product({threads, rows, 2, backbone, 4}));
  next_.reserve(product({rows, round_up(backbone, kPanel), 4}));
  x_.reserve(product({rows, round_up(weights_.config.hidden, kPanel), 4}));
  logits_.reserve(product({rows, width, 4}));
  clusters_.resize(size_t(rows));
  ids_.resize(size_t(rows));
}

// All sequences take their steps together until the last one stops; what a stopped one computes is void.
std::vector<DraftResult> Drafter::draft(const std::vector<DraftRequest>& requests) {
  const int64_t count = int64_t(requests.size());
  std::vector<Row> rows;
  for (const DraftRequest& r : requests) {  // the newest token is not cached; sliding layers see the rows before it
    const int64_t first = std::max(int64_t(0), r.position - target_->weights().config.window);
    rows.push_back({r.slot, r.position, r.position - 1, first, int64_t(rows.size())});
  }
  drafted_ = 0;
  reserve(count);
  std::vector<Sampled> sampled;
  for (int64_t r = 0; r < count; ++r) {
    for (bool sliding : {true, false}) target_->rope(sliding).cover(requests[size_t(r)].position + 1);
    std::copy_n(requests[size_t(r)].hidden, weights_.config.backbone, next_.floats() + r * weights_.config.backbone);
    sampled.push_back({requests[size_t(r)].newest, 1.0f});
  }
  std::vector<DraftResult> results(requests.size());
  target_->pool().run([&](const Worker& w) {
    std::vector<float> chance(requests.size(),
                              1.0f);  // of each draft so far, -1 once it has stopped; equal on all workers
    for (int64_t step = 0, going = count; going > 0; ++step) {
      enter(w, sampled, count);
      for (size_t i = 0; i < weights_.layers.size(); ++i) {
        const Layer& layer = weights_.layers[i];
        runner_.run(w, LayerRunner::Call{layer, *views_[i], target_->rope(layer.sliding)}, rows);
      }
      choose(w, requests, step, sampled);
      for (size_t r = 0; r < requests.size(); ++r) {
        if (chance[r] < 0) continue;
        const DraftLimit& limit = requests[r].limit;
        const float confidence = sampled[r].probability;
        if (w.id == 0) results[r].tokens.push_back(sampled[r].token), results[r].confidence.push_back(confidence);
        if (!limit.floors.empty())
          chance[r] *= limit.acceptance[size_t(std::min(kConfidenceBins - 1, int(confidence * kConfidenceBins)))];
        const bool hopeless = !limit.floors.empty() && chance[r] < limit.floors[size_t(step)];
        if (hopeless || step + 1 >= limit.length) chance[r] = -1.0f, --going;
      }
    }
  });
  drafted_ = count;
  return results;
}

// x = pre_projection(concat(target embedding of the newest token, hidden)).
void Drafter::enter(const Worker& w, const std::vector<Sampled>& newest, int64_t rows) {
  const int64_t backbone = weights_.config.backbone, width = weights_.config.hidden;
  float* both = both_.floats() + runner_.copy(w) * rows * 2 * backbone;
  runner_.for_owned_rows(w, rows, [&](int64_t r) {
    target_->embed(newest[size_t(r)].token, both + r * 2 * backbone);
    std::copy_n(next_.floats() + r * backbone, backbone, both + r * 2 * backbone + backbone);
  });
  runner_.sync_rows(w);
  const ActView act = runner_.pack_activations(w, inputs_, *weights_.pre_projection, rows, both, 2 * backbone);
  runner_.project(w, *weights_.pre_projection, act, rows, x_.floats(), round_up(width, kPanel));
  w.barrier();
  runner_.for_owned_rows(
      w, rows, [&](int64_t r) { std::copy_n(x_.floats() + r * round_up(width, kPanel), width, runner_.x(w, r)); });
}

// Final norm, the hidden state of the next step, and the token sampled from the head. Ends with a barrier.
void Drafter::choose(const Worker& w, const std::vector<DraftRequest>& requests, int64_t step,
                     std::vector<Sampled>& sampled) {
  const int64_t rows = int64_t(requests.size()), ld = weights_.head->view().padded_rows();
  runner_.norm_rows(w, rows, weights_.final_norm);
  const std::array<const Matrix*, 2> matrices = {weights_.post_projection.get(), &first_head()};
  const auto acts = runner_.pack_activations(w, matrices, rows, runner_.temporary(w, 0), weights_.config.hidden);
  runner_.project(w, *matrices[0], acts[0], rows, next_.floats(), weights_.config.backbone);
  runner_.project(w, *matrices[1], acts[1], rows, logits_.floats(), ld);
  w.barrier();
  if (weights_.centroids) centroid_head(w, rows);
  w.for_share(rows, [&](int64_t r) {
    const std::vector<int32_t>* tokens = ids(r);
    const int64_t n = tokens ? int64_t(tokens->size()) : weights_.config.vocab;
    sampled[size_t(r)] =
        sample({logits_.floats() + r * ld, tokens ? tokens->data() : nullptr, n}, requests[size_t(r)], step);
  });
  w.barrier();
}

// Damaged weights may leave nothing to choose from, or no probability; a bad draft is rejected by verification.
Sampled Drafter::sample(const Logits& logits, const DraftRequest& request, int64_t step) const {
  const Kernels& kernels = target_->kernels();
  const SamplingParams& params = request.params;
  Sampled sampled{0, 0.0f};
  if (params.temperature > 0) {
    sampled = kernels.sample(logits, params, uint32_t(request.position + 1 + step), true);
  } else {
    const int64_t best = kernels.arg_max(logits.x, logits.n, &sampled.probability);
    sampled.token = logits.ids ? -1 : int32_t(best);
    for (int64_t i = 0; logits.ids && i < logits.n; ++i) {  // of equal logits the lowest token, wherever it stands
      const int32_t id = logits.ids[i];
      if (logits.x[i] == logits.x[best] && id >= 0 && (sampled.token < 0 || id < sampled.token)) sampled.token = id;
    }
  }
  if (sampled.token < 0 || sampled.token >= weights_.config.vocab) sampled.token = 0;
  if (std::isnan(sampled.probability)) sampled.probability = 0.0f;
  return sampled;
}

// The tokens of a row's logits; null: all of them.
const std::vector<int32_t>* Drafter::ids(int64_t row) const {
  if (weights_.centroids) return &ids_[size_t(row)];
  return weights_.tokens.empty() ? nullptr : &weights_.tokens;
}

// The best centroids (their scores are in logits_) select the rows of the head that are computed; the others cannot be
// drafted. Workers go on with the rows that they would share.
void Drafter::centroid_head(const Worker& w, int64_t rows) {
  const Kernels& kernels = target_->kernels();
  const MatrixView& head = weights_.head->view();
  const MatrixView& centroids = weights_.centroids->view();
  const int64_t ld = head.padded_rows(), top_k = weights_.config.centroid_top_k;
  const int64_t panels = head.panels() / centroids.rows, width = panels * kPanel;  // a centroid
  const ActView single = rows_.view(*weights_.head, 1);  // each row has its own rows of the head: tiles of one
  w.for_share(rows, [&](int64_t r) {
    choose_lists(logits_.floats() + r * ld, centroids.rows, top_k, clusters_[size_t(r)]);
    kernels.pack_activations(single, r, runner_.temporary(w, r), weights_.config.hidden, 0, single.groups());
  });
  w.barrier();

  runner_.observe(w, weights_.head.get(), single, rows);
  w.parallel_for(rows * top_k, kLists, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin, next; i < end; i = next) {
      const auto list = [&](int64_t at) { return clusters_[size_t(at / top_k)][size_t(at % top_k)]; };
      const int64_t stop = std::min(end, round_up(i + 1, top_k));
      for (next = i + 1; next < stop && list(next) == list(next - 1) + 1;) ++next;  // neighbours in one go
      for (int64_t p = 0; next < end && p < panels; ++p)  // where the kernels do not look ahead to
        for (int64_t at = 0; at < std::min(kStart, head.stride); at += 64)
          __builtin_prefetch(head.panel(list(next) * panels + p) + at);
      MatrixView part = head;
      part.rows = (next - i) * width;
      part.data = head.panel(list(i) * panels);
      float* out = logits_.floats() + i / top_k * ld + i % top_k * width;
      kernels.matmul(part, single.tile(i / top_k), 1, 0, part.units(), out, ld);
    }
  });
  w.barrier();

  w.for_share(rows, [&](int64_t r) {
    float* logit = logits_.floats() + r * ld;
    std::vector<int32_t>& ids = ids_[size_t(r)];
    ids.clear();
    for (const int64_t cluster : clusters_[size_t(r)])
      ids.insert(ids.end(), &weights_.tokens[size_t(cluster * width)],
                 &weights_.tokens[size_t(cluster * width)] + width);
    for (size_t i = 0; i < ids.size(); ++i)
      if (ids[i] < 0) logit[i] = -3e38f;
  });
}

void Drafter::check_row(int64_t row) const {
  if (row < 0 || row >= drafted_)
    throw std::out_of_range("no row " + std::to_string(row) + " in the last draft, which had " +
                            std::to_string(drafted_));
}

Floats Drafter::last_logits(int64_t row) const {
  check_row(row);
  const float* logit = logits_.floats() + row * weights_.head->view().padded_rows();
  const std::vector<int32_t>* tokens = ids(row);
  if (!tokens) return Floats(logit, logit + weights_.config.vocab);
  Floats out(size_t(weights_.config.vocab), -3e38f);
  for (size_t i = 0; i < tokens->size(); ++i)
    if ((*tokens)[i] >= 0) out[size_t((*tokens)[i])] = logit[i];
  return out;
}

Floats Drafter::last_hidden(int64_t row) const {
  check_row(row);
  const float* hidden = next_.floats() + row * weights_.config.backbone;
  return Floats(hidden, hidden + weights_.config.backbone);
}

}  // namespace paceline
