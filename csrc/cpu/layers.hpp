// The decoder layer that targets and drafters share, run by all members of a team at once.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "kernels.hpp"
#include "memory.hpp"
#include "threads.hpp"

namespace paceline {

using Floats = std::vector<float>;

// A mixture of experts beside the dense MLP.
struct Experts {
  int64_t active = 0;
  MatrixPtr router;
  Floats router_norm;  // router.scale * hidden^-0.5, the weight of a norm without one
  Floats per_expert_scale;
  Floats post_norm_dense, pre_norm, post_norm;
  std::vector<MatrixPtr> gate, up, down;  // an expert
};

struct Layer {
  bool sliding = false;
  int64_t head_dim = 0, kv_heads = 0;
  int64_t kv_source = 0;  // the target layer whose cache the queries read
  float scalar = 1.0f;
  Floats input_norm, post_attention_norm, pre_feedforward_norm, post_feedforward_norm, q_norm;
  MatrixPtr q, o, gate, up, down;
  Floats k_norm;       // layers with K/V of their own
  MatrixPtr k, v;      // v is empty where values are the k projection
  MatrixPtr ple_gate, ple_projection;  // empty without per-layer embeddings
  Floats ple_norm;
  std::shared_ptr<Experts> experts;  // empty without
};

// Where one batch row stands.
struct Row {
  int64_t slot, position;
  int64_t last;           // last visible cache row
  int64_t first_sliding;  // first visible cache row of sliding layers; full layers see all from 0
  int64_t origin;         // index of the row in the batch
};

// What a stack of layers has in common.
struct Shape {
  int64_t hidden = 0, heads = 0;
  float eps = 1e-6f;
};

// Memory for activations prepared for a matrix. Reserve first, on one thread; views are free.
class Prepared {
 public:
  void reserve(int64_t lanes, int64_t padded_cols, int64_t copies = 1);  // lanes: rows rounded up to whole tiles
  ActView view(const Matrix& matrix, int lanes, int64_t copy = 0) const;

 private:
  int64_t copy_floats_ = 0, copy_groups_ = 0;
  Buffer data_, scale_, start_;
};

// Scratch memory and the layer itself. One instance serves one forward pass at a time.
//
// What is done to a row by itself (norms, residuals, preparing it for a matrix) is little work, but to pass its results
// from one processor to another takes half a microsecond where these share no cache. So few or short rows are kept
// alike: every member keeps all of them, in memory of its own, and members meet only behind matrices and attention.
// Many rows are kept apart: each member keeps its share, and all prepare a stretch of columns of every row.
class LayerRunner {
 public:
  LayerRunner(const Kernels& kernels, Shape shape) : kernels_(kernels), shape_(shape) {}

  // Make room for that many rows through these layers, over caches of that many positions; call before `run`.
  // `all_wanted`: no rows are dropped on the way.
  void reserve(const std::vector<Layer>& layers, int64_t rows, int64_t context, int threads, bool all_wanted);

  // Run one layer on the rows of x in place; all members call it, and each comes and goes with the rows that it keeps.
  // Layers with K/V of their own append them to the cache first; the others only read it.
  struct Call {
    const Layer& layer;
    const std::vector<CacheView>& views;  // a slot: the cache this layer's queries read
    const RopeTable& rope;
    const float* ple = nullptr;  // per-layer inputs of this layer, a row every ple_stride floats, by origin
    int64_t ple_stride = 0;
    bool keep_wanted = false;  // after K/V are written, only rows marked wanted go on
    const std::vector<uint8_t>* wanted = nullptr;
  };
  void run(const Member& m, const Call& call, std::vector<Row>& rows);

  // A member's copy of the rows, the only one unless rows are kept alike.
  int64_t copy(const Member& m) const { return alike_ ? m.id : 0; }
  float* x(const Member& m, int64_t row) const { return x_.floats() + (copy(m) * rows_ + row) * shape_.hidden; }
  float* temporary(const Member& m, int64_t row) const { return t_.floats() + (copy(m) * rows_ + row) * shape_.hidden; }

  // Call f(row) for the rows that this member keeps.
  template <class F>
  void keep(const Member& m, int64_t n, F f) const {
    if (!alike_) return each(m, n, f);
    for (int64_t i = 0; i < n; ++i) f(i);
  }

  // Wait until all kept rows are written.
  void gather(const Member& m) const {
    if (!alike_) m.barrier();
  }

  // temporary = norm(x)
  void norm_rows(const Member& m, int64_t rows, const Floats& weight) const;

  // Prepare `source` [rows][ld] for a matrix, in `act` unless told otherwise; all members may use it on return.
  ActView prepare_rows(const Member& m, const Matrix& matrix, int64_t rows, const float* source, int64_t ld) const {
    return prepare_rows(m, act, matrix, rows, source, ld);
  }
  ActView prepare_rows(const Member& m, const Prepared& where, const Matrix& matrix, int64_t rows, const float* source,
                       int64_t ld) const;

  // y [rows][ld] = matrix times the prepared rows, dealt out among the members. No barrier.
  void project(const Member& m, const Matrix& matrix, const ActView& act, int64_t rows, float* y, int64_t ld) const;

  Prepared act;  // activations for the next matrix

  // Call f(i) for this member's share of n items.
  template <class F>
  static void each(const Member& m, int64_t n, F f) {
    int64_t begin, end;
    m.share(n, begin, end);
    for (int64_t i = begin; i < end; ++i) f(i);
  }

 private:
  void attention(const Member& m, const Call& call, std::vector<Row>& rows);
  void drop_unwanted(const Member& m, const Call& call, std::vector<Row>& rows) const;
  void add_normed(float* x, int64_t row, const Floats& weight, float scale, float* scratch) const;
  void write_kv(const Call& call, const Row& row, const float* k, const float* v, int64_t head, float* scratch) const;
  void feedforward(const Member& m, const Layer& layer, int64_t rows);
  void mixture(const Member& m, const Layer& layer, int64_t rows);
  void per_layer_input(const Member& m, const Call& call, const std::vector<Row>& rows);
  void choose_experts(const Experts& experts, int64_t rows);

  const Kernels& kernels_;
  Shape shape_;
  bool alike_ = false;
  int64_t rows_ = 0;
  Buffer x_, t_, y_, qkv_, attended_, scores_;
  int64_t y_ld_ = 0, qkv_ld_ = 0, attended_ld_ = 0, score_floats_ = 0;
  Prepared inner_;            // activations between gate/up and down

  struct Pick {
    int64_t expert, slot;  // slot: its row within the expert's tiles
    float weight;
  };
  struct Hit {
    int64_t expert, rows, tile;
  };
  std::vector<Pick> picks_;  // [row][active]
  std::vector<Hit> hits_;
  int expert_lanes_ = 1;
  int64_t router_ld_ = 0;
  Buffer dense_, router_, routed_, expert_out_;
};

}  // namespace paceline
