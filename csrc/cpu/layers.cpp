#include "layers.hpp"

#include <algorithm>
#include <cmath>

namespace paceline {
namespace {

int64_t padded(const MatrixPtr& matrix) { return matrix ? round_up(matrix->view().rows, kPanel) : 0; }

constexpr int64_t kAlike = 4096;  // floats of x that every member may keep for itself

// Units of a matrix that are dealt out together: a microsecond's work or more.
int64_t grain(const MatrixView& matrix) {
  return 1 + (int64_t(32) << 10) / (2 * matrix.stride);
}

// Deal out the units of several matrices, of one width, as if they were one.
template <class F>
void deal_units(const Member& m, const std::vector<const Matrix*>& matrices, F f) {
  int64_t total = 0;
  for (const Matrix* matrix : matrices) total += matrix->view().units();
  m.deal(total, grain(matrices[0]->view()), [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (size_t i = 0; i < matrices.size(); ++i) {
      const int64_t units = matrices[i]->view().units();
      const int64_t b = std::max(begin - first, int64_t(0)), e = std::min(end - first, units);
      if (b < e) f(i, b, e);
      first += units;
    }
  });
}

}  // namespace

void Prepared::reserve(int64_t lanes, int64_t padded_cols, int64_t copies) {
  copy_floats_ = lanes * padded_cols;
  copy_groups_ = round_up(lanes * padded_cols / kGroup, 16);
  data_.reserve(size_t(copies * copy_floats_ * 4));
  scale_.reserve(size_t(copies * copy_groups_ * 4));
  start_.reserve(size_t(copies * copy_groups_ * 4));
}

ActView Prepared::view(const Matrix& matrix, int lanes, int64_t copy) const {
  const MatrixView& v = matrix.view();
  return {v.format, lanes, v.padded_cols, data_.data() + copy * copy_floats_ * 4, scale_.floats() + copy * copy_groups_,
          reinterpret_cast<int32_t*>(start_.data()) + copy * copy_groups_};
}

void LayerRunner::reserve(const std::vector<Layer>& layers, int64_t rows, int64_t context, int threads,
                          bool all_wanted) {
  const int64_t whole = round_up(rows, kTile), hidden = round_up(shape_.hidden, kBlock);
  int64_t widest = hidden, inner = 0, picks = 0, expert_ld = 0, experts = 0, head_dim = 0;
  y_ld_ = hidden;
  alike_ = all_wanted && rows * hidden <= kAlike;
  for (const Layer& layer : layers) {
    qkv_ld_ = std::max(qkv_ld_, padded(layer.q) + padded(layer.k) + padded(layer.v));
    qkv_ld_ = std::max(qkv_ld_, padded(layer.ple_gate));  // it gathers per-layer inputs too
    attended_ld_ = std::max(attended_ld_, round_up(shape_.heads * layer.head_dim, 16));
    head_dim = std::max(head_dim, layer.head_dim);
    inner = std::max(inner, layer.down->view().padded_cols);
    if (layer.ple_projection) inner = std::max(inner, layer.ple_projection->view().padded_cols);
    if (layer.experts) {
      picks = rows * layer.experts->active;
      experts = std::min(picks, int64_t(layer.experts->gate.size()));
      router_ld_ = padded(layer.experts->router);
      alike_ = false;
      inner = std::max(inner, layer.experts->down[0]->view().padded_cols);
      expert_ld = hidden;
    }
  }
  widest = std::max({widest, round_up(attended_ld_, kBlock), inner});
  const int64_t expert_lanes = picks + experts * (kTile - 1), copies = alike_ ? threads : 1;
  rows_ = rows;
  act.reserve(std::max(whole, expert_lanes), widest, copies);
  inner_.reserve(std::max(whole, expert_lanes), inner);
  for (Buffer* buffer : {&x_, &t_}) buffer->reserve(size_t(copies * rows * hidden * 4));
  y_.reserve(size_t(rows * hidden * 4));
  qkv_.reserve(size_t(rows * qkv_ld_ * 4));
  attended_.reserve(size_t(rows * attended_ld_ * 4));
  score_floats_ = std::max(kQueryHeads * round_up(context + 32, 16), 2 * head_dim);
  scores_.reserve(size_t(threads * score_floats_ * 4));
  dense_.reserve(size_t(picks ? rows * hidden * 4 : 0));
  routed_.reserve(size_t(picks ? rows * hidden * 4 : 0));
  router_.reserve(size_t(picks ? rows * router_ld_ * 4 : 0));
  expert_out_.reserve(size_t(expert_lanes * expert_ld * 4));
}

void LayerRunner::project(const Member& m, const Matrix& matrix, const ActView& prepared, int64_t rows, float* y,
                          int64_t ld) const {
  m.deal(matrix.view().units(), grain(matrix.view()), [&](int64_t begin, int64_t end) {
    kernels_.matmul(matrix.view(), prepared, rows, begin, end, y, ld);
  });
}

void LayerRunner::norm_rows(const Member& m, int64_t rows, const Floats& weight) const {
  keep(m, rows, [&](int64_t r) {
    kernels_.rms_norm(x(m, r), weight.data(), shape_.hidden, shape_.eps, temporary(m, r));
  });
  gather(m);
}

// Rows lie side by side in a tile, so members take columns: two of them never write to one cache line.
ActView LayerRunner::prepare_rows(const Member& m, const Prepared& where, const Matrix& matrix, int64_t rows,
                                  const float* source, int64_t ld) const {
  const ActView view = where.view(matrix, lanes_for(rows), copy(m));
  int64_t begin = 0, end = view.padded_cols / kGroup;
  if (!alike_) m.share(end, begin, end);
  for (int64_t r = 0; r < rows; ++r) kernels_.prepare(view, r, source + r * ld, matrix.view().cols, begin, end);
  gather(m);
  return view;
}

void LayerRunner::run(const Member& m, const Call& call, std::vector<Row>& rows) {
  const Layer& layer = call.layer;
  attention(m, call, rows);
  const int64_t count = int64_t(rows.size());
  if (!count) return;  // all were dropped
  keep(m, count, [&](int64_t r) { add_normed(x(m, r), r, layer.post_attention_norm, 1.0f, temporary(m, r)); });
  feedforward(m, layer, count);
  if (layer.experts) mixture(m, layer, count);
  const float scalar = layer.ple_gate ? 1.0f : layer.scalar;
  keep(m, count, [&](int64_t r) { add_normed(x(m, r), r, layer.post_feedforward_norm, scalar, temporary(m, r)); });
  if (layer.ple_gate) per_layer_input(m, call, rows);
}

// x = (x + norm(y)) * scale, for one row.
void LayerRunner::add_normed(float* x, int64_t row, const Floats& weight, float scale, float* scratch) const {
  kernels_.rms_norm(y_.floats() + row * y_ld_, weight.data(), shape_.hidden, shape_.eps, scratch);
  kernels_.add_scaled(x, scratch, shape_.hidden, scale);
}

// Leaves the output projection of the attended rows in y_.
void LayerRunner::attention(const Member& m, const Call& call, std::vector<Row>& rows) {
  const Layer& layer = call.layer;
  const int64_t dim = layer.head_dim, heads = shape_.heads, own = layer.k ? layer.kv_heads : 0;
  int64_t count = int64_t(rows.size());
  norm_rows(m, count, layer.input_norm);
  const ActView prepared = prepare_rows(m, *layer.q, count, temporary(m, 0), shape_.hidden);

  std::vector<const Matrix*> parts = {layer.q.get()};
  int64_t at[3] = {0, padded(layer.q), padded(layer.q) + padded(layer.k)};
  if (layer.k) parts.push_back(layer.k.get());
  if (layer.v) parts.push_back(layer.v.get());
  deal_units(m, parts, [&](size_t i, int64_t begin, int64_t end) {
    kernels_.matmul(parts[i]->view(), prepared, count, begin, end, qkv_.floats() + at[i], qkv_ld_);
  });
  m.barrier();

  float* scratch = scores_.floats() + m.id * score_floats_;
  if (own) {
    each(m, count * own, [&](int64_t i) {
      const float* k = qkv_.floats() + i / own * qkv_ld_ + at[1] + i % own * dim;
      write_kv(call, rows[size_t(i / own)], k, layer.v ? k + at[2] - at[1] : k, i % own, scratch);
    });
    m.barrier();
  }

  if (call.keep_wanted) {
    if (m.id == 0) drop_unwanted(m, call, rows);
    m.barrier();
    count = int64_t(rows.size());
  }

  const int64_t shared = heads / layer.kv_heads;  // queries a K/V head
  const int64_t calls = (shared + kQueryHeads - 1) / kQueryHeads;
  m.deal(count * layer.kv_heads * calls, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / (layer.kv_heads * calls), h = i / calls % layer.kv_heads, part = i % calls;
      const int64_t first = h * shared + shared * part / calls, stop = h * shared + shared * (part + 1) / calls;
      const Row& row = rows[size_t(r)];
      float* q = qkv_.floats() + r * qkv_ld_ + first * dim;
      for (int64_t j = 0; j < stop - first; ++j) {
        kernels_.rms_norm(q + j * dim, layer.q_norm.data(), dim, shape_.eps, q + j * dim);
        kernels_.rope(q + j * dim, dim, call.rope.cos(row.position), call.rope.sin(row.position), call.rope.pairs());
      }
      kernels_.attend(call.views[size_t(row.slot)], h, q, int(stop - first), layer.sliding ? row.first_sliding : 0,
                      row.last, scratch, attended_.floats() + r * attended_ld_ + first * dim);
    }
  });
  m.barrier();
  const ActView gathered = prepare_rows(m, *layer.o, count, attended_.floats(), attended_ld_);
  project(m, *layer.o, gathered, count, y_.floats(), y_ld_);
  m.barrier();
}

void LayerRunner::write_kv(const Call& call, const Row& row, const float* k, const float* v, int64_t head,
                           float* scratch) const {
  const int64_t dim = call.layer.head_dim;
  float *key = scratch, *value = scratch + dim;
  kernels_.rms_norm(v, nullptr, dim, shape_.eps, value);
  kernels_.rms_norm(k, call.layer.k_norm.data(), dim, shape_.eps, key);
  kernels_.rope(key, dim, call.rope.cos(row.position), call.rope.sin(row.position), call.rope.pairs());
  kernels_.append(call.views[size_t(row.slot)], head, row.position, key, value);
}

// Only rows that are wanted go on: move them together. One member does it.
void LayerRunner::drop_unwanted(const Member& m, const Call& call, std::vector<Row>& rows) const {
  size_t kept = 0;
  for (size_t r = 0; r < rows.size(); ++r) {
    if (!(*call.wanted)[size_t(rows[r].origin)]) continue;
    std::copy_n(x(m, int64_t(r)), shape_.hidden, x(m, int64_t(kept)));
    std::copy_n(qkv_.floats() + int64_t(r) * qkv_ld_, padded(call.layer.q), qkv_.floats() + int64_t(kept) * qkv_ld_);
    rows[kept++] = rows[r];
  }
  rows.resize(kept);
}

// Leaves the MLP's output in y_.
void LayerRunner::feedforward(const Member& m, const Layer& layer, int64_t rows) {
  norm_rows(m, rows, layer.pre_feedforward_norm);
  const ActView prepared = prepare_rows(m, *layer.gate, rows, temporary(m, 0), shape_.hidden);
  const ActView inner = inner_.view(*layer.down, lanes_for(rows));
  m.deal(layer.gate->view().units(), grain(layer.gate->view()), [&](int64_t begin, int64_t end) {
    kernels_.gated(layer.gate->view(), &layer.up->view(), nullptr, 0, prepared, rows, begin, end, inner);
  });
  m.barrier();
  project(m, *layer.down, inner, rows, y_.floats(), y_ld_);
  m.barrier();
}

// x = (x + norm(projection(gelu(gate x) * per-layer input))) * layer scalar
void LayerRunner::per_layer_input(const Member& m, const Call& call, const std::vector<Row>& rows) {
  const Layer& layer = call.layer;
  const int64_t count = int64_t(rows.size());
  const float* factor = call.ple;
  int64_t factor_ld = call.ple_stride;
  if (rows.back().origin + 1 != count) {  // rows were dropped: put the inputs of those that are left side by side
    factor = qkv_.floats();
    factor_ld = qkv_ld_;
    each(m, count, [&](int64_t r) {
      std::copy_n(call.ple + rows[size_t(r)].origin * call.ple_stride, layer.ple_gate->view().rows,
                  qkv_.floats() + r * qkv_ld_);
    });
  }
  gather(m);
  const ActView prepared = prepare_rows(m, *layer.ple_gate, count, x(m, 0), shape_.hidden);
  const ActView inner = inner_.view(*layer.ple_projection, lanes_for(count));
  m.deal(layer.ple_gate->view().units(), grain(layer.ple_gate->view()), [&](int64_t begin, int64_t end) {
    kernels_.gated(layer.ple_gate->view(), nullptr, factor, factor_ld, prepared, count, begin, end, inner);
  });
  m.barrier();
  project(m, *layer.ple_projection, inner, count, y_.floats(), y_ld_);
  m.barrier();
  keep(m, count, [&](int64_t r) { add_normed(x(m, r), r, layer.ple_norm, layer.scalar, temporary(m, r)); });
}

// y = norm(y) + norm(experts(norm(x))): the dense output is in y_ already.
void LayerRunner::mixture(const Member& m, const Layer& layer, int64_t rows) {
  const Experts& e = *layer.experts;
  const int64_t hidden = shape_.hidden;
  each(m, rows, [&](int64_t r) {
    kernels_.rms_norm(y_.floats() + r * y_ld_, e.post_norm_dense.data(), hidden, shape_.eps,
                      dense_.floats() + r * hidden);
    kernels_.rms_norm(x(m, r), e.pre_norm.data(), hidden, shape_.eps, routed_.floats() + r * hidden);
    kernels_.rms_norm(x(m, r), e.router_norm.data(), hidden, shape_.eps, temporary(m, r));
  });
  gather(m);
  const ActView prepared = prepare_rows(m, *e.router, rows, temporary(m, 0), hidden);
  project(m, *e.router, prepared, rows, router_.floats(), router_ld_);
  m.barrier();
  if (m.id == 0) choose_experts(e, rows);
  m.barrier();

  // Each expert hit is read once for all its rows.
  const ActView expert_act = act.view(*e.gate[0], expert_lanes_), inner = inner_.view(*e.down[0], expert_lanes_);
  each(m, rows * e.active, [&](int64_t i) {
    const Pick& pick = picks_[size_t(i)];
    kernels_.prepare(expert_act, pick.slot, routed_.floats() + i / e.active * hidden, hidden, 0,
                     expert_act.padded_cols / kGroup);
  });
  m.barrier();
  std::vector<const Matrix*> gates, downs;
  for (const Hit& hit : hits_) gates.push_back(e.gate[size_t(hit.expert)].get());
  for (const Hit& hit : hits_) downs.push_back(e.down[size_t(hit.expert)].get());
  deal_units(m, gates, [&](size_t i, int64_t begin, int64_t end) {
    const Hit& hit = hits_[i];
    kernels_.gated(gates[i]->view(), &e.up[size_t(hit.expert)]->view(), nullptr, 0, expert_act.tile(hit.tile),
                   hit.rows, begin, end, inner.tile(hit.tile));
  });
  m.barrier();
  deal_units(m, downs, [&](size_t i, int64_t begin, int64_t end) {
    const Hit& hit = hits_[i];
    kernels_.matmul(downs[i]->view(), inner.tile(hit.tile), hit.rows, begin, end,
                    expert_out_.floats() + hit.tile * expert_lanes_ * y_ld_, y_ld_);
  });
  m.barrier();
  each(m, rows, [&](int64_t r) {
    float* total = temporary(m, r);
    std::fill_n(total, hidden, 0.0f);
    for (int64_t k = 0; k < e.active; ++k) {
      const Pick& pick = picks_[size_t(r * e.active + k)];
      kernels_.axpy(total, expert_out_.floats() + pick.slot * y_ld_, hidden, pick.weight);
    }
    kernels_.rms_norm(total, e.post_norm.data(), hidden, shape_.eps, total);
    std::copy_n(dense_.floats() + r * hidden, hidden, y_.floats() + r * y_ld_);
    kernels_.add_scaled(y_.floats() + r * y_ld_, total, hidden, 1.0f);
  });
}

// Softmax over the router's scores, the best few (ties to the lowest expert) renormalised, rows grouped by expert.
void LayerRunner::choose_experts(const Experts& e, int64_t rows) {
  const int64_t count = int64_t(e.gate.size());
  std::vector<int64_t> order(static_cast<size_t>(count)), load(static_cast<size_t>(count), 0);
  picks_.clear();
  for (int64_t r = 0; r < rows; ++r) {
    float* score = router_.floats() + r * router_ld_;
    for (int64_t i = 0; i < count; ++i)
      if (std::isnan(score[i])) score[i] = -3e38f;  // damaged weights must not break the ordering below
    for (int64_t i = 0; i < count; ++i) order[size_t(i)] = i;
    std::partial_sort(order.begin(), order.begin() + e.active, order.end(), [&](int64_t a, int64_t b) {
      return score[a] != score[b] ? score[a] > score[b] : a < b;
    });
    std::sort(order.begin(), order.begin() + e.active);  // sum in the order of the experts' numbers
    float top = score[order[0]], total = 0;
    for (int64_t k = 0; k < e.active; ++k) top = std::max(top, score[order[size_t(k)]]);
    for (int64_t k = 0; k < e.active; ++k) total += std::exp(score[order[size_t(k)]] - top);
    for (int64_t k = 0; k < e.active; ++k) {
      const int64_t expert = order[size_t(k)];
      const float weight = std::exp(score[expert] - top) / total * e.per_expert_scale[size_t(expert)];
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
