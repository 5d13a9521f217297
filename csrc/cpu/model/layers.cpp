#include "model/layers.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "runtime/elementary.hpp"

namespace paceline {
namespace {

int64_t padded(const MatrixPtr& matrix) { return matrix ? matrix->view().padded_rows() : 0; }

constexpr int64_t kReplicated = 4096;  // floats of x that every worker may keep for itself

// Units of a matrix that a worker takes at once: a microsecond's work or more.
int64_t grain(const MatrixView& matrix) { return 1 + (int64_t(32) << 10) / (kUnit / kPanel * matrix.stride); }

// f(i, begin, end) over the units of matrices i, as if they were one. They have one width, and some may be null.
template <class Matrices, class F>
void parallel_units(const Worker& w, const Matrices& matrices, F f) {
  const auto units = [&](size_t i) { return matrices[i] ? matrices[i]->view().units() : 0; };
  int64_t total = 0;
  for (size_t i = 0; i < matrices.size(); ++i) total += units(i);
  w.parallel_for(total, grain(matrices[0]->view()), [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (size_t i = 0; i < matrices.size(); ++i) {
      const int64_t b = std::max(begin - first, int64_t(0)), e = std::min(end - first, units(i));
      if (b < e) f(i, b, e);
      first += units(i);
    }
  });
}

// A norm without a weight, followed by the factors `scale` and hidden^-0.5.
Floats router_norm(const Floats& scale) {
  const float factor = float(1 / std::sqrt(double(scale.size())));
  Floats norm = scale;
  for (float& x : norm) x *= factor;
  return norm;
}

std::shared_ptr<Experts> find_experts(const ModelConfig& c, const std::string& prefix, const Weights& weights) {
  const auto norm = [&](const char* name) { return weights.vector(prefix + name, c.hidden); };
  const std::string experts = prefix + "experts.";
  const auto found = std::make_shared<Experts>(Experts{
      c.active_experts,
      weights.matrix(prefix + "router.proj.weight", c.experts, c.hidden),
      router_norm(norm("router.scale")),
      weights.vector(prefix + "router.per_expert_scale", c.experts),
      norm("post_feedforward_layernorm_1.weight"),
      norm("pre_feedforward_layernorm_2.weight"),
      norm("post_feedforward_layernorm_2.weight"),
      weights.matrices(experts + "gate_proj", c.experts, c.expert_intermediate, c.hidden),
      weights.matrices(experts + "up_proj", c.experts, c.expert_intermediate, c.hidden),
      weights.matrices(experts + "down_proj", c.experts, c.hidden, c.expert_intermediate),
  });
  if (act_formats({found->gate[0].get(), found->up[0].get()}) > 1)  // rows are packed once for both
    throw std::invalid_argument("the tensors " + experts +
                                "gate_proj and up_proj have formats that do not go together");
  return found;
}

}  // namespace

Layer::Layer(const ModelConfig& c, int64_t index, const Weights& weights) {
  const LayerConfig& layer = c.layers[size_t(index)];
  const std::string prefix = "layers." + std::to_string(index) + ".", attention = prefix + "self_attn.";
  const int64_t queries = c.heads * layer.head_dim, keys = layer.kv_heads * layer.head_dim;
  const auto norm = [&](const char* name) { return weights.vector(prefix + name, c.hidden); };
  sliding = layer.sliding, head_dim = layer.head_dim, kv_heads = layer.kv_heads, kv_source = layer.kv_source;
  value_norm = c.value_norm;
  if (c.layer_scalar) scalar = weights.vector(prefix + "layer_scalar", 1)[0];
  input_norm = norm("input_layernorm.weight");
  post_attention_norm = norm("post_attention_layernorm.weight");
  pre_feedforward_norm = norm("pre_feedforward_layernorm.weight");
  post_feedforward_norm = norm("post_feedforward_layernorm.weight");
  q = weights.matrix(attention + "q_proj.weight", queries, c.hidden);
  q_norm = weights.vector(attention + "q_norm.weight", head_dim);
  for (float& weight : q_norm) weight *= float(c.attention_scale);
  o = weights.matrix(attention + "o_proj.weight", c.hidden, queries);
  gate = weights.matrix(prefix + "mlp.gate_proj.weight", layer.intermediate, c.hidden);
  up = weights.matrix(prefix + "mlp.up_proj.weight", layer.intermediate, c.hidden);
  down = weights.matrix(prefix + "mlp.down_proj.weight", c.hidden, layer.intermediate);
  if (kv_source == index) {
    k = weights.matrix(attention + "k_proj.weight", keys, c.hidden);
    k_norm = weights.vector(attention + "k_norm.weight", head_dim);
    if (layer.has_v) v = weights.matrix(attention + "v_proj.weight", keys, c.hidden);
  }
  if (c.ple_size) {
    ple_gate = weights.matrix(prefix + "per_layer_input_gate.weight", c.ple_size, c.hidden);
    ple_projection = weights.matrix(prefix + "per_layer_projection.weight", c.hidden, c.ple_size);
    ple_norm = norm("post_per_layer_input_norm.weight");
  }
  if (c.experts) experts = find_experts(c, prefix, weights), experts->layer = index;
}

std::vector<Layer> find_layers(const ModelConfig& c, const Weights& weights) {
  constexpr int64_t lanes = 16;  // vectors are whole native registers
  std::vector<int64_t> widths = {c.hidden, c.ple_size, c.backbone};
  for (const LayerConfig& layer : c.layers) widths.push_back(layer.head_dim);
  for (int64_t width : widths)
    if (width % lanes)
      throw std::invalid_argument("the CPU backend takes widths that are multiples of " + std::to_string(lanes) +
                                  ", and this model has " + std::to_string(width));
  std::vector<Layer> layers;
  for (size_t i = 0; i < c.layers.size(); ++i) layers.emplace_back(c, int64_t(i), weights);
  return layers;
}

size_t act_formats(std::initializer_list<const Matrix*> matrices) {
  std::vector<ActFormat> seen;
  for (const Matrix* matrix : matrices) {
    if (!matrix) continue;
    const ActFormat act = traits(matrix->view().format).act();
    if (std::find(seen.begin(), seen.end(), act) == seen.end()) seen.push_back(act);
  }
  return seen.size();
}

void PackedRows::reserve(int64_t lanes, int64_t padded_cols, int64_t copies) {
  product({copies, lanes, padded_cols, 4});
  copy_bytes_ = round_up(lanes * padded_cols * 4, int64_t(kAlign));
  copy_words_ = round_up(lanes * padded_cols / kGroup * kGroupWords, int64_t(kAlign / 4));
  data_.reserve(product({copies, copy_bytes_}));
  words_.reserve(product({copies, copy_words_, 4}));
}

ActView PackedRows::view(const Matrix& matrix, int lanes, int64_t copy) const {
  const MatrixView& v = matrix.view();
  return {traits(v.format).act(), lanes, v.padded_cols, data_.data() + copy * copy_bytes_,
          reinterpret_cast<uint32_t*>(words_.data()) + copy * copy_words_};
}

void LayerRunner::reserve(const std::vector<Layer>& layers, int64_t rows, int64_t context, int threads,
                          bool all_selected, size_t formats) {
  const int64_t whole = round_up(rows, kTile), hidden = round_up(config_.hidden, kMaxBlock);
  int64_t widest = hidden, inner = 0, picks = 0, expert_ld = 0, experts = 0;
  y_ld_ = hidden;
  replicated_ = all_selected && rows * hidden <= kReplicated;
  for (const Layer& layer : layers) {
    qkv_ld_ = std::max(qkv_ld_, padded(layer.q) + padded(layer.k) + padded(layer.v));
    qkv_ld_ = std::max(qkv_ld_, padded(layer.ple_gate));  // it gathers per-layer inputs too
    attended_ld_ = std::max(attended_ld_, round_up(config_.heads * layer.head_dim, 16));
    inner = std::max(inner, layer.down->view().padded_cols);
    formats = std::max(formats, act_formats({layer.q.get(), layer.k.get(), layer.v.get()}));
    formats = std::max(formats, act_formats({layer.gate.get(), layer.up.get()}));
    if (layer.ple_projection) inner = std::max(inner, layer.ple_projection->view().padded_cols);
    if (layer.experts) {
      picks = rows * layer.experts->active;
      experts = std::min(picks, int64_t(layer.experts->gate.size()));
      router_ld_ = padded(layer.experts->router);
      formats = std::size(packed_);  // the router's rows go into the last
      replicated_ = false;
      inner = std::max(inner, layer.experts->down[0]->view().padded_cols);
      expert_ld = hidden;
    }
  }
  widest = std::max({widest, round_up(attended_ld_, kMaxBlock), inner});
  const int64_t expert_lanes = picks + experts * (kTile - 1), copies = replicated_ ? threads : 1;
  rows_ = rows;
  packed_[0].reserve(std::max(whole, expert_lanes), widest, copies);
  for (size_t i = 1; i < std::size(packed_); ++i) packed_[i].reserve(i < formats ? whole : 0, hidden, copies);
  inner_.reserve(std::max(whole, expert_lanes), inner);
  for (Buffer* buffer : {&x_, &t_}) buffer->reserve(product({copies, rows, hidden, 4}));
  y_.reserve(product({rows, hidden, 4}));
  qkv_.reserve(product({rows, qkv_ld_, 4}));
  attended_.reserve(product({rows, attended_ld_, 4}));
  attention_.reserve(layers, rows, context, threads);
  router_in_.reserve(picks ? product({rows, hidden, 4}) : 0);
  routed_.reserve(picks ? product({rows, hidden, 4}) : 0);
  router_.reserve(picks ? product({rows, router_ld_, 4}) : 0);
  expert_out_.reserve(product({expert_lanes, expert_ld, 4}));
}

void LayerRunner::run(const Worker& w, const Call& call, std::vector<Row>& rows) {
  const Layer& layer = call.layer;
  norm_rows(w, int64_t(rows.size()), layer.input_norm);
  project_qkv(w, layer, int64_t(rows.size()));
  if (layer.k) append_kv(w, call, rows);
  if (call.drop_others) drop_rows(w, call, rows);
  if (rows.empty()) return;
  const int64_t count = int64_t(rows.size());
  if (w.id == 0) places_ = rows.data();
  attend(w, call, rows);
  project_attended(w, layer, count);
  add_normed(w, count, layer.post_attention_norm, 1.0f);
  if (layer.experts) mix_experts(w, layer, count);
  else feed_forward(w, layer, count);
  add_normed(w, count, layer.post_feedforward_norm, layer.ple_gate ? 1.0f : layer.scalar);
  if (layer.ple_gate) add_per_layer_input(w, call, rows);
}

void LayerRunner::project(const Worker& w, const Matrix& matrix, const ActView& act, int64_t rows, float* y,
                          int64_t ld) const {
  observe(w, &matrix, act, rows);
  w.parallel_for(matrix.view().units(), grain(matrix.view()),
                 [&](int64_t begin, int64_t end) { kernels_.matmul(matrix.view(), act, rows, begin, end, y, ld); });
}

void LayerRunner::norm_rows(const Worker& w, int64_t rows, const Floats& weight) const {
  for_owned_rows(w, rows, [&](int64_t r) {
    kernels_.rms_norm(x(w, r), weight.data(), config_.hidden, config_.eps, temporary(w, r));
  });
  sync_rows(w);
}

// Rows are neighbours in a tile, so workers take columns: two of them never write to one cache line.
ActView LayerRunner::pack_columns(const Worker& w, const PackedRows& where, const Matrix& matrix, int64_t rows,
                                  const float* source, int64_t ld) const {
  const ActView view = where.view(matrix, lanes_for(rows), copy(w));
  int64_t begin = 0, end = view.groups();
  if (!replicated_) w.share(end, begin, end);
  for (int64_t r = 0; r < rows; ++r)
    kernels_.pack_activations(view, r, source + r * ld, matrix.view().cols, begin, end);
  return view;
}

// x = (x + norm(y)) * scale. Not synchronised: the worker that owns a row goes on with it.
void LayerRunner::add_normed(const Worker& w, int64_t rows, const Floats& weight, float scale) const {
  for_owned_rows(w, rows, [&](int64_t r) {
    kernels_.rms_norm(y_.floats() + r * y_ld_, weight.data(), config_.hidden, config_.eps, temporary(w, r));
    kernels_.add_scaled(x(w, r), temporary(w, r), config_.hidden, scale);
  });
}

// qkv = the projections of temporary, side by side.
void LayerRunner::project_qkv(const Worker& w, const Layer& layer, int64_t rows) const {
  const std::array<const Matrix*, 3> matrices = {layer.q.get(), layer.k.get(), layer.v.get()};
  const int64_t offsets[3] = {0, padded(layer.q), padded(layer.q) + padded(layer.k)};
  const auto acts = pack_activations(w, matrices, rows, temporary(w, 0), config_.hidden);
  for (size_t i = 0; i < matrices.size(); ++i) observe(w, matrices[i], acts[i], rows);
  parallel_units(w, matrices, [&](size_t i, int64_t begin, int64_t end) {
    kernels_.matmul(matrices[i]->view(), acts[i], rows, begin, end, qkv_.floats() + offsets[i], qkv_ld_);
  });
  w.barrier();
}

// Keys are normed and rotated; values are normed in Gemma 4.
void LayerRunner::append_kv(const Worker& w, const Call& call, const std::vector<Row>& rows) const {
  const Layer& layer = call.layer;
  const int64_t dim = layer.head_dim, heads = layer.kv_heads;
  float *key = attention_.scratch(w), *value = key + dim;
  w.for_share(int64_t(rows.size()) * heads, [&](int64_t i) {
    const Row& row = rows[size_t(i / heads)];
    const float* k = qkv_.floats() + i / heads * qkv_ld_ + padded(layer.q) + i % heads * dim;
    const float* v = layer.v ? k + padded(layer.k) : k;
    if (layer.value_norm) kernels_.rms_norm(v, nullptr, dim, config_.eps, value);
    else std::copy_n(v, dim, value);
    kernels_.rms_norm(k, layer.k_norm.data(), dim, config_.eps, key);
    kernels_.rope(key, dim, call.rope.cos(row.position), call.rope.sin(row.position), call.rope.pairs());
    kernels_.append(call.views[size_t(row.slot)], i % heads, row.position, key, value);
  });
  w.barrier();
}

// Only selected rows go on: move them together. One worker does it.
void LayerRunner::drop_rows(const Worker& w, const Call& call, std::vector<Row>& rows) const {
  if (w.id == 0) {
    size_t kept = 0;
    for (size_t r = 0; r < rows.size(); ++r) {
      if (!(*call.selected)[size_t(rows[r].origin)]) continue;
      std::copy_n(x(w, int64_t(r)), config_.hidden, x(w, int64_t(kept)));
      std::copy_n(qkv_.floats() + int64_t(r) * qkv_ld_, padded(call.layer.q), qkv_.floats() + int64_t(kept) * qkv_ld_);
      rows[kept++] = rows[r];
    }
    rows.resize(kept);
  }
  w.barrier();
}

// attended = attention of the queries.
void LayerRunner::attend(const Worker& w, const Call& call, const std::vector<Row>& rows) const {
  attention_.run(w,
                 {call.layer, call.views, call.rope, rows, qkv_.floats(), qkv_ld_, attended_.floats(), attended_ld_});
}

// y = output projection of attended.
void LayerRunner::project_attended(const Worker& w, const Layer& layer, int64_t rows) const {
  const ActView act = pack_activations(w, *layer.o, rows, attended_.floats(), attended_ld_);
  project(w, *layer.o, act, rows, y_.floats(), y_ld_);
  w.barrier();
}

// y = down(gelu(gate norm(x)) * up norm(x))
void LayerRunner::feed_forward(const Worker& w, const Layer& layer, int64_t rows) const {
  norm_rows(w, rows, layer.pre_feedforward_norm);
  const std::array<const Matrix*, 2> matrices = {layer.gate.get(), layer.up.get()};
  const auto acts = pack_activations(w, matrices, rows, temporary(w, 0), config_.hidden);
  observe(w, matrices[1], acts[1], rows);
  gate_and_project(w, *layer.gate, acts[0], {&layer.up->view(), acts[1]}, *layer.down, rows);
}

// y = down(gelu(gate act) * factor)
void LayerRunner::gate_and_project(const Worker& w, const Matrix& gate, const ActView& act, const GateFactor& factor,
                                   const Matrix& down, int64_t rows) const {
  const ActView inner = gated(w, gate, act, factor, down, rows);
  project(w, down, inner, rows, y_.floats(), y_ld_);
  w.barrier();
}

// gelu(gate act) * factor, packed for `down`.
ActView LayerRunner::gated(const Worker& w, const Matrix& gate, const ActView& act, const GateFactor& factor,
                           const Matrix& down, int64_t rows) const {
  const ActView inner = inner_.view(down, lanes_for(rows));
  observe(w, &gate, act, rows);
  w.parallel_for(gate.view().units(), grain(gate.view()), [&](int64_t begin, int64_t end) {
    kernels_.gated(gate.view(), act, factor, rows, begin, end, inner);
  });
  w.barrier();
  return inner;
}

// x = (x + norm(projection(gelu(gate x) * per-layer input))) * layer scalar
void LayerRunner::add_per_layer_input(const Worker& w, const Call& call, const std::vector<Row>& rows) const {
  const Layer& layer = call.layer;
  const int64_t count = int64_t(rows.size());
  GateFactor factor{nullptr, {}, call.ple, call.ple_stride};
  if (rows.back().origin + 1 != count) {  // rows were dropped: put the inputs of the others side by side
    factor.given = qkv_.floats();
    factor.ld = qkv_ld_;
    w.for_share(count, [&](int64_t r) {
      std::copy_n(call.ple + rows[size_t(r)].origin * call.ple_stride, layer.ple_gate->view().rows,
                  qkv_.floats() + r * qkv_ld_);
    });
  }
  sync_rows(w);
  const ActView act = pack_activations(w, *layer.ple_gate, count, x(w, 0), config_.hidden);
  gate_and_project(w, *layer.ple_gate, act, factor, *layer.ple_projection, count);
  add_normed(w, count, layer.ple_norm, layer.scalar);
}

// y = norm(dense MLP of norm(x)) + norm(experts of norm(x)). What is small, the router and its choice, is done beside the
// dense matrices, so that no worker waits for it.
void LayerRunner::mix_experts(const Worker& w, const Layer& layer, int64_t rows) {
  const Experts& e = *layer.experts;
  const int64_t hidden = config_.hidden;
  w.for_share(rows, [&](int64_t r) {
    const auto norm = [&](const Floats& weight, float* to) {
      kernels_.rms_norm(x(w, r), weight.data(), hidden, config_.eps, to);
    };
    norm(layer.pre_feedforward_norm, temporary(w, r));
    norm(e.router_norm, router_in_.floats() + r * hidden);
    norm(e.pre_norm, routed_.floats() + r * hidden);
  });
  sync_rows(w);
  const ActView router_act = pack_columns(w, packed_[2], *e.router, rows, router_in_.floats(), hidden);
  const std::array<const Matrix*, 2> matrices = {layer.gate.get(), layer.up.get()};
  const auto acts = pack_activations(w, matrices, rows, temporary(w, 0), hidden);
  project(w, *e.router, router_act, rows, router_.floats(), router_ld_);
  observe(w, matrices[1], acts[1], rows);
  const ActView dense = gated(w, *layer.gate, acts[0], {&layer.up->view(), acts[1]}, *layer.down, rows);
  if (w.id == 0) choose_experts(e, rows);
  project(w, *layer.down, dense, rows, y_.floats(), y_ld_);
  w.barrier();
  run_experts(w, e, rows);
  w.for_share(rows, [&](int64_t r) {
    float* total = temporary(w, r);
    std::fill_n(total, hidden, 0.0f);
    for (int64_t k = 0; k < e.active; ++k) {
      const Pick& pick = picks_[size_t(r * e.active + k)];
      kernels_.axpy(total, expert_out_.floats() + pick.slot * y_ld_, hidden, pick.weight);
    }
    kernels_.rms_norm(total, e.post_norm.data(), hidden, config_.eps, total);
    float* y = y_.floats() + r * y_ld_;
    kernels_.rms_norm(y, e.post_norm_dense.data(), hidden, config_.eps, y);
    kernels_.add_scaled(y, total, hidden, 1.0f);
  });
}

// expert_out = the chosen experts of `routed`, by slot. The weights of an expert are read once for all its rows.
void LayerRunner::run_experts(const Worker& w, const Experts& e, int64_t rows) {
  const int64_t hidden = config_.hidden;
  const ActView act = packed_[0].view(*e.gate[0], expert_lanes_), inner = inner_.view(*e.down[0], expert_lanes_);
  int64_t first, last;  // columns, as in pack_columns
  w.share(act.groups(), first, last);
  for (int64_t i = 0; i < rows * e.active; ++i) {
    const float* row = routed_.floats() + i / e.active * hidden;
    kernels_.pack_activations(act, picks_[size_t(i)].slot, row, hidden, first, last);
  }
  w.barrier();
  std::vector<const Matrix*> gates, downs;
  for (const Hit& hit : hits_) gates.push_back(e.gate[size_t(hit.expert)].get());
  for (const Hit& hit : hits_) downs.push_back(e.down[size_t(hit.expert)].get());
  for (const Hit& hit : hits_)
    for (const auto* matrices : {&e.gate, &e.up})
      observe(w, (*matrices)[size_t(hit.expert)].get(), act.tile(hit.tile), hit.rows);
  parallel_units(w, gates, [&](size_t i, int64_t begin, int64_t end) {
    const Hit& hit = hits_[i];
    const ActView tile = act.tile(hit.tile);
    kernels_.gated(gates[i]->view(), tile, {&e.up[size_t(hit.expert)]->view(), tile}, hit.rows, begin, end,
                   inner.tile(hit.tile));
  });
  w.barrier();
  for (const Hit& hit : hits_) observe(w, e.down[size_t(hit.expert)].get(), inner.tile(hit.tile), hit.rows);
  parallel_units(w, downs, [&](size_t i, int64_t begin, int64_t end) {
    const Hit& hit = hits_[i];
    kernels_.matmul(downs[i]->view(), inner.tile(hit.tile), hit.rows, begin, end,
                    expert_out_.floats() + hit.tile * expert_lanes_ * y_ld_, y_ld_);
  });
  w.barrier();
}

// Softmax over the router's scores, the best few (ties to the lowest expert) renormalised, rows grouped by expert.
void LayerRunner::choose_experts(const Experts& e, int64_t rows) {
  const int64_t count = int64_t(e.gate.size());
  std::vector<int64_t> order(static_cast<size_t>(count)), load(static_cast<size_t>(count), 0);
  picks_.clear();
  for (int64_t r = 0; r < rows; ++r) {
    float* score = router_.floats() + r * router_ld_;
    if (routing_) routing_->favour(score, e.layer, places_[r].position);
    for (int64_t i = 0; i < count; ++i)
      if (std::isnan(score[i])) score[i] = -3e38f;  // damaged weights must not break the ordering below
    for (int64_t i = 0; i < count; ++i) order[size_t(i)] = i;
    std::partial_sort(order.begin(), order.begin() + e.active, order.end(),
                      [&](int64_t a, int64_t b) { return score[a] != score[b] ? score[a] > score[b] : a < b; });
    std::sort(order.begin(), order.begin() + e.active);  // sum in the order of the experts' numbers
    float top = score[order[0]], total = 0;
    for (int64_t k = 0; k < e.active; ++k) top = std::max(top, score[order[size_t(k)]]);
    const auto raised = [&](int64_t expert) { return float(elementary::exp(std::max(score[expert] - top, -100.0f))); };
    for (int64_t k = 0; k < e.active; ++k) total += raised(order[size_t(k)]);
    for (int64_t k = 0; k < e.active; ++k) {
      const int64_t expert = order[size_t(k)];
      const float weight = raised(expert) / total * e.per_expert_scale[size_t(expert)];
      picks_.push_back({expert, load[size_t(expert)]++, weight});
    }
  }
  expert_lanes_ = lanes_for(*std::max_element(load.begin(), load.end()));
  hits_.clear();
  int64_t tile = 0;
  std::vector<int64_t> first(size_t(count), 0);
  for (int64_t i = 0; i < count; ++i) {
    if (!load[size_t(i)]) continue;
    hits_.push_back({i, load[size_t(i)], tile});
    first[size_t(i)] = tile * expert_lanes_;
    tile += (load[size_t(i)] + expert_lanes_ - 1) / expert_lanes_;
  }
  for (Pick& pick : picks_) pick.slot += first[size_t(pick.expert)];
}

}  // namespace paceline
