// The decoder layer that targets and drafters share, run by all workers of a thread pool at once.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <vector>

#include "kernels/kernels.hpp"
#include "model/attention.hpp"
#include "model/observer.hpp"
#include "model/simulated_routing.hpp"
#include "model/weights.hpp"
#include "runtime/kv_cache.hpp"
#include "runtime/memory.hpp"
#include "runtime/threads.hpp"

namespace paceline {

// A mixture of experts beside the dense MLP.
struct Experts {
  int64_t active = 0;
  MatrixPtr router;
  Floats router_norm;  // router.scale * hidden^-0.5, the weight of a norm without one
  Floats per_expert_scale;
  Floats post_norm_dense, pre_norm, post_norm;
  std::vector<MatrixPtr> gate, up, down;  // [expert]; one format each
  int64_t layer = 0;                      // where they are
};

struct Layer {
  bool sliding = false;
  int64_t head_dim = 0, kv_heads = 0;
  int64_t kv_source = 0;  // the target layer whose KV cache it attends to
  float scalar = 1.0f;
  bool value_norm = true;
  Floats input_norm, post_attention_norm, pre_feedforward_norm, post_feedforward_norm;
  Floats q_norm;  // times the scale of attention scores
  MatrixPtr q, o, gate, up, down;
  Floats k_norm;                       // layers with K/V of their own
  MatrixPtr k, v;                      // v is empty where values are the k projection
  MatrixPtr ple_gate, ple_projection;  // empty without per-layer embeddings
  Floats ple_norm;
  std::shared_ptr<Experts> experts;  // empty without

  // The tensors of layer `index`; a drafter's layers have no K/V of their own.
  Layer(const ModelConfig& config, int64_t index, const Weights& weights);
};

std::vector<Layer> find_layers(const ModelConfig& config, const Weights& weights);

// Memory for rows of activations packed for a matrix. Reserve first, on one thread; views are free.
class PackedRows {
 public:
  void reserve(int64_t lanes, int64_t padded_cols, int64_t copies = 1);  // lanes: rows rounded up to whole tiles
  ActView view(const Matrix& matrix, int lanes, int64_t copy = 0) const;

 private:
  int64_t copy_bytes_ = 0, copy_words_ = 0;
  Buffer data_, words_;
};

// How many activation formats these matrices (or null) take.
size_t act_formats(std::initializer_list<const Matrix*> matrices);

// Scratch memory and the layer itself. One instance serves one forward pass at a time.
//
// What is done to single rows (norms, residuals, packing) is little work, but handing a result from one processor to
// another takes half a microsecond where they share no cache. So few or short rows are replicated: every worker keeps
// all of them in memory of its own, and workers synchronise only after matrices and attention. Many rows are divided:
// each worker owns a share of them, and all workers pack a range of columns of every row.
class LayerRunner {
 public:
  LayerRunner(const Kernels& kernels, const ModelConfig& config)
      : kernels_(kernels), config_(config), attention_(kernels, config.heads, config.eps) {}

  // Make room for that many rows through these layers, over caches of that many positions; call before `run`.
  // `all_selected`: no rows are dropped on the way. `formats`: activation formats that rows are packed in at once,
  // beside the layers' own needs.
  void reserve(const std::vector<Layer>& layers, int64_t rows, int64_t context, int threads, bool all_selected,
               size_t formats = 1);

  // Run one layer on the rows of x in place; all workers call it, and each starts and ends with the rows it owns.
  // Layers with K/V of their own append them to the cache first; the others only read it.
  struct Call {
    const Layer& layer;
    const std::vector<CacheView>& views;  // [slot] the cache that this layer attends to
    const RopeTable& rope;
    const float* ple = nullptr;  // per-layer inputs of this layer, a row every ple_stride floats, by origin
    int64_t ple_stride = 0;
    bool drop_others = false;  // once K/V are in the cache, only selected rows go on
    const std::vector<uint8_t>* selected = nullptr;
  };
  void run(const Worker& w, const Call& call, std::vector<Row>& rows);

  // A worker's copy of the rows: the only one unless rows are replicated.
  int64_t copy(const Worker& w) const { return replicated_ ? w.id : 0; }
  float* x(const Worker& w, int64_t row) const { return x_.floats() + (copy(w) * rows_ + row) * config_.hidden; }
  float* temporary(const Worker& w, int64_t row) const {
    return t_.floats() + (copy(w) * rows_ + row) * config_.hidden;
  }

  // f(row) for the rows that this worker owns.
  template <class F>
  void for_owned_rows(const Worker& w, int64_t n, F f) const {
    if (!replicated_) return w.for_share(n, f);
    for (int64_t i = 0; i < n; ++i) f(i);
  }

  // Wait until all owned rows are written.
  void sync_rows(const Worker& w) const {
    if (!replicated_) w.barrier();
  }

  // temporary = norm(x); synchronised.
  void norm_rows(const Worker& w, int64_t rows, const Floats& weight) const;

  // Rows `source` [rows][ld], packed for each of the matrices: once for each activation format among them.
  // Synchronised. Matrices may be null.
  template <size_t N>
  std::array<ActView, N> pack_activations(const Worker& w, const std::array<const Matrix*, N>& matrices, int64_t rows,
                                          const float* source, int64_t ld) const {
    std::array<ActView, N> views;
    size_t used = 0;
    for (size_t i = 0; i < N; ++i) {
      if (!matrices[i]) continue;
      size_t j = 0;
      while (j < i && !(matrices[j] && views[j].fits(matrices[i]->view()))) ++j;
      views[i] = j < i ? views[j] : pack_columns(w, packed_[used++], *matrices[i], rows, source, ld);
    }
    sync_rows(w);
    return views;
  }
  ActView pack_activations(const Worker& w, const Matrix& matrix, int64_t rows, const float* source, int64_t ld) const {
    return pack_activations(w, packed_[0], matrix, rows, source, ld);
  }
  ActView pack_activations(const Worker& w, const PackedRows& where, const Matrix& matrix, int64_t rows,
                           const float* source, int64_t ld) const {
    const ActView view = pack_columns(w, where, matrix, rows, source, ld);
    sync_rows(w);
    return view;
  }

  // For benchmarks: rows are sent to experts as this says, from now on.
  void simulate_routing(const SimulatedRouting& routing) { routing_ = routing; }

  // What is told of all rows that matrices are multiplied with from now on; null: nothing.
  void set_observer(Observer* observer) { observer_ = observer; }

  // Matrices (or null) are about to be multiplied with these rows, which are packed and stay until the next barrier.
  void observe(const Worker& w, const Matrix* matrix, const ActView& act, int64_t rows) const {
    if (observer_ && w.id == 0 && matrix) observer_->add(*matrix, act, rows);
  }

  // y [rows][ld] = matrix times the packed rows, divided among the workers. Not synchronised.
  void project(const Worker& w, const Matrix& matrix, const ActView& act, int64_t rows, float* y, int64_t ld) const;

 private:
  ActView pack_columns(const Worker& w, const PackedRows& where, const Matrix& matrix, int64_t rows,
                       const float* source, int64_t ld) const;
  void project_qkv(const Worker& w, const Layer& layer, int64_t rows) const;
  void append_kv(const Worker& w, const Call& call, const std::vector<Row>& rows) const;
  void drop_rows(const Worker& w, const Call& call, std::vector<Row>& rows) const;
  void attend(const Worker& w, const Call& call, const std::vector<Row>& rows) const;
  void project_attended(const Worker& w, const Layer& layer, int64_t rows) const;
  void add_normed(const Worker& w, int64_t rows, const Floats& weight, float scale) const;
  void feed_forward(const Worker& w, const Layer& layer, int64_t rows) const;
  void gate_and_project(const Worker& w, const Matrix& gate, const ActView& act, const GateFactor& factor,
                        const Matrix& down, int64_t rows) const;
  ActView gated(const Worker& w, const Matrix& gate, const ActView& act, const GateFactor& factor, const Matrix& down,
                int64_t rows) const;
  void mix_experts(const Worker& w, const Layer& layer, int64_t rows);
  void run_experts(const Worker& w, const Experts& experts, int64_t rows);
  void choose_experts(const Experts& experts, int64_t rows);
  void add_per_layer_input(const Worker& w, const Call& call, const std::vector<Row>& rows) const;

  const Kernels& kernels_;
  const ModelConfig& config_;
  Attention attention_;
  Observer* observer_ = nullptr;
  bool replicated_ = false;
  int64_t rows_ = 0;
  Buffer x_, t_, y_, qkv_, attended_;
  int64_t y_ld_ = 0, qkv_ld_ = 0, attended_ld_ = 0;
  PackedRows packed_[3];  // for the next matrices, in up to three activation formats
  PackedRows inner_;      // between gate and down

  struct Pick {
    int64_t expert, slot;  // slot: its row within the expert's tiles
    float weight;
  };
  struct Hit {
    int64_t expert, rows, tile;
  };
  std::optional<SimulatedRouting> routing_;
  const Row* places_ = nullptr;  // of the rows that experts are chosen for
  std::vector<Pick> picks_;      // [row][active]
  std::vector<Hit> hits_;        // the experts that rows were sent to
  int expert_lanes_ = 1;
  int64_t router_ld_ = 0;
  Buffer router_in_, router_, routed_, expert_out_;
};

}  // namespace paceline
