// The Python module paceline._cpu. No arithmetic here: types in, types out, the GIL released around the work.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>

#include "model/drafter.hpp"
#include "model/target.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using namespace paceline;

namespace {

template <class T, int N>
using Array = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using AnyRows = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T, int N>
using Result = nb::ndarray<nb::numpy, T, nb::ndim<N>>;

// bfloat16 has no NumPy type: its bits come as uint16.
Element element_of(const nb::dlpack::dtype& type) {
  if (type == nb::dtype<float>()) return Element::f32;
  if (type == nb::dtype<uint16_t>()) return Element::bf16;
  if (type.code == uint8_t(nb::dlpack::dtype_code::Float) && type.bits == 16) return Element::f16;
  throw std::invalid_argument("expected float32, float16, or uint16 with the bits of bfloat16");
}

void check_cols(int64_t got, int64_t want) {
  if (got != want)
    throw std::invalid_argument("rows of " + std::to_string(got) + " columns where " + std::to_string(want) + " belong");
}

// An array that frees `data` (from new[]) when Python drops it.
template <class T, int N>
Result<T, N> owned(T* data, const std::array<size_t, N>& shape) {
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return Result<T, N>(data, N, shape.data(), owner);
}

Result<float, 1> row_of(const Matrix& matrix, int64_t i) {
  if (i < 0 || i >= matrix.view().rows) throw std::out_of_range("no such row");
  const size_t cols = size_t(matrix.view().cols);
  float* out = new float[cols];
  matrix.row(i, out);
  return owned<float, 1>(out, {cols});
}

// matrix times rows of x [rows, cols] with `threads` threads: what tests and benchmarks of the kernels call.
void matmul(const Matrix& matrix, const Array<float, 2>& x, nb::ndarray<float, nb::ndim<2>, nb::c_contig> out,
            const std::string& isa, int threads) {
  const Kernels& kernels = select_kernels(isa);
  const int64_t rows = int64_t(x.shape(0)), ld = int64_t(out.shape(1));
  check_cols(int64_t(x.shape(1)), matrix.view().cols);
  check_cols(ld, matrix.view().padded_rows());
  PackedRows packed;
  packed.reserve(round_up(rows, kTile), matrix.view().padded_cols);
  const ActView act = packed.view(matrix, lanes_for(rows));
  nb::gil_scoped_release release;
  ThreadPool(threads).run([&](const Worker& w) {
    const int64_t cols = matrix.view().cols;
    w.for_share(rows, [&](int64_t r) {
      kernels.pack_activations(act, r, x.data() + r * cols, cols, 0, act.groups());
    });
    w.barrier();
    w.parallel_for(matrix.view().units(), 1, [&](int64_t begin, int64_t end) {
      kernels.matmul(matrix.view(), act, rows, begin, end, out.data(), ld);
    });
  });
}

constexpr int64_t kChunk = 1 << 20;  // bytes a check value covers before it is folded into the whole

uint64_t checksum(const Array<uint8_t, 1>& data, int threads) {
  const int64_t n = int64_t(data.size()), chunks = (n + kChunk - 1) / kChunk;
  if (n % 512) throw std::invalid_argument("a checksum takes a multiple of 512 bytes");
  const Kernels& kernels = select_kernels("");
  std::vector<uint32_t> parts(static_cast<size_t>(chunks));
  nb::gil_scoped_release release;
  ThreadPool(threads).run([&](const Worker& w) {
    w.parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        parts[size_t(i)] = kernels.checksum(data.data() + i * kChunk, std::min(kChunk, n - i * kChunk));
    });
  });
  uint64_t total = 0xcbf29ce484222325u;
  for (uint32_t part : parts) total = (total ^ part) * 0x100000001b3u;
  return total;
}

struct Snapshot {
  Cache::Snapshot rows;
  int64_t shortest;
};

nb::tuple forward(nb::handle self, const Array<int32_t, 1>& slots, const Array<int32_t, 1>& positions,
                  const Array<int32_t, 1>& tokens, const Array<bool, 1>& wanted) {
  Target& target = nb::cast<Target&>(self);
  check_cols(int64_t(slots.size()), int64_t(tokens.size()));
  check_cols(int64_t(positions.size()), int64_t(tokens.size()));
  check_cols(int64_t(wanted.size()), int64_t(tokens.size()));
  int64_t rows;
  {
    nb::gil_scoped_release release;
    rows = target.forward(slots.data(), positions.data(), tokens.data(),
                          reinterpret_cast<const uint8_t*>(wanted.data()), int64_t(tokens.size()));
  }
  const auto& w = target.weights();
  const auto view = [&](const float* data, int64_t cols, int64_t ld) {
    return Result<const float, 2>(data, {size_t(rows), size_t(cols)}, self, {ld, 1});
  };
  return nb::make_tuple(view(target.logits(), w.vocab, target.logits_ld()),
                        view(target.hidden(), w.shape.hidden, w.shape.hidden));
}

int32_t draw(const Array<float, 1>& logits, const Draw& draw, uint32_t position, const std::string& isa) {
  if (logits.size() == 0) throw std::invalid_argument("no logits");
  const Sampler& sampler = *select_kernels(isa).sampler;
  return sampler.draw({logits.data(), nullptr, int64_t(logits.size())}, draw, position, false).token;
}

nb::tuple allowed(const Array<float, 1>& logits, const Draw& draw, const std::string& isa) {
  if (logits.size() == 0) throw std::invalid_argument("no logits");
  const auto list = select_kernels(isa).sampler->allowed({logits.data(), nullptr, int64_t(logits.size())}, draw);
  auto* ids = new int32_t[list.size()];
  auto* weights = new int64_t[list.size()];
  const auto id_array = owned<int32_t, 1>(ids, {list.size()});
  const auto weight_array = owned<int64_t, 1>(weights, {list.size()});
  for (size_t i = 0; i < list.size(); ++i) ids[i] = list[i].id, weights[i] = list[i].weight;
  return nb::make_tuple(id_array, weight_array);
}

nb::tuple draft(Drafter& drafter, const Array<int32_t, 1>& slots, const Array<int32_t, 1>& positions,
                const Array<int32_t, 1>& newest, const Array<float, 2>& hidden, int64_t depth,
                const std::vector<Draw>& draws, const std::optional<Array<float, 2>>& floors,
                const std::optional<Array<float, 2>>& acceptance, bool with_logits) {
  const size_t anchors = newest.size();
  check_cols(int64_t(draws.size()), int64_t(anchors));
  if (floors.has_value() != acceptance.has_value()) throw std::invalid_argument("floors come with acceptance");
  if (floors) {
    check_cols(int64_t(floors->shape(0)), int64_t(anchors));
    check_cols(int64_t(floors->shape(1)), depth);
    check_cols(int64_t(acceptance->shape(0)), int64_t(anchors));
    check_cols(int64_t(acceptance->shape(1)), kConfidenceBins);
  }
  check_cols(int64_t(slots.size()), int64_t(anchors));
  check_cols(int64_t(positions.size()), int64_t(anchors));
  check_cols(int64_t(hidden.shape(0)), int64_t(anchors));
  check_cols(int64_t(hidden.shape(1)), drafter.backbone());
  if (depth < 1) throw std::invalid_argument("a draft needs at least one step");
  const size_t count = anchors * size_t(depth);
  auto* tokens = new int32_t[count];
  auto* confidence = new float[count];
  const auto token_array = owned<int32_t, 2>(tokens, {anchors, size_t(depth)});
  const auto confidence_array = owned<float, 2>(confidence, {anchors, size_t(depth)});
  auto* lengths = new int32_t[anchors];
  const auto length_array = owned<int32_t, 1>(lengths, {anchors});
  const size_t vocab = with_logits ? size_t(drafter.vocab()) : 0;
  auto* logits = new float[count * vocab];
  const auto logit_array = owned<float, 3>(logits, {anchors, size_t(depth), vocab});
  {
    nb::gil_scoped_release release;
    drafter.draft({slots.data(), positions.data(), newest.data(), hidden.data(), int64_t(anchors), depth, draws.data(),
                   floors ? floors->data() : nullptr, acceptance ? acceptance->data() : nullptr},
                  {tokens, confidence, lengths, with_logits ? logits : nullptr});
  }
  return nb::make_tuple(token_array, confidence_array, length_array, logit_array);
}

}  // namespace

NB_MODULE(_cpu, module) {
  module.doc() = "Native CPU backend: packed matrices, KV cache, target and drafter.";
  module.def("usable_isas", &usable_isas, "Instruction sets that work on this processor, best first.");
  module.def("matmul", &matmul, "matrix"_a, "x"_a, "out"_a, "isa"_a = "", "threads"_a = 1,
             "out [rows, padded matrix rows] = x [rows, cols] times the matrix transposed.");

  module.def("checksum", &checksum, "data"_a, "threads"_a,
             "Check value of a multiple of 512 bytes, read at the speed of memory.");

  nb::class_<Matrix>(module, "Matrix", "A packed weight matrix.")
      .def("__init__", [](Matrix* self, const std::string& format, int64_t rows, int64_t cols) {
        new (self) Matrix(format_from(format), rows, cols);
      }, "format"_a, "rows"_a, "cols"_a)
      .def("pack", [](Matrix& self, const AnyRows& source, int64_t first) {
        check_cols(int64_t(source.shape(1)), self.view().cols);
        const Element type = element_of(source.dtype());
        nb::gil_scoped_release release;
        self.pack(type, source.data(), first, int64_t(source.shape(0)));
      }, "source"_a, "first"_a = 0, "Pack rows [count, cols] of a checkpoint tensor from matrix row `first` on.")
      .def_static("mapped", [](const std::string& format, int64_t rows, int64_t cols, const Array<uint8_t, 1>& packed) {
        return std::make_shared<Matrix>(format_from(format), rows, cols, packed.data(), packed.size());
      }, "format"_a, "rows"_a, "cols"_a, "packed"_a, nb::keep_alive<0, 4>(), "A matrix over packed bytes, in place.")
      .def("fill_random", &Matrix::fill_random, "seed"_a, nb::call_guard<nb::gil_scoped_release>(),
           "Fill with plausible values without meaning, for measurements.")
      .def("row", &row_of, "index"_a, "One row, unpacked to float32 [cols].")
      .def_prop_ro("shape", [](const Matrix& self) { return nb::make_tuple(self.view().rows, self.view().cols); })
      .def_prop_ro("format", [](const Matrix& self) { return traits(self.view().format).name; })
      .def_prop_ro("nbytes", &Matrix::bytes)
      .def("packed", [](const Matrix& self) {
        return Result<const uint8_t, 1>(self.view().data, {self.bytes()});
      }, nb::rv_policy::reference_internal, "The packed bytes, in place.");

  nb::class_<Draw>(module, "Draw", "How a token is drawn from logits.")
      .def("__init__", [](Draw* self, float temperature, int64_t top_k, double top_p, float gap, uint64_t seed,
                          uint32_t stream) { new (self) Draw{temperature, top_k, top_p, gap, seed, stream}; },
           nb::kw_only(), "temperature"_a, "top_k"_a, "top_p"_a, "gap"_a, "seed"_a, "stream"_a);
  module.def("draw", &draw, "logits"_a, "draw"_a, "position"_a, "isa"_a = "",
             "The token drawn from logits [vocab], temperature above 0.");
  module.def("allowed", &allowed, "logits"_a, "draw"_a, "isa"_a = "",
             "Tokens [n] that can be drawn and their weights [n], in units of 2^-30 of the largest.");

  nb::class_<Experts>(module, "Experts").def(nb::init<>())
      .def_rw("active", &Experts::active).def_rw("router", &Experts::router)
      .def_rw("router_norm", &Experts::router_norm).def_rw("per_expert_scale", &Experts::per_expert_scale)
      .def_rw("post_norm_dense", &Experts::post_norm_dense).def_rw("pre_norm", &Experts::pre_norm)
      .def_rw("post_norm", &Experts::post_norm).def_rw("gate", &Experts::gate).def_rw("up", &Experts::up)
      .def_rw("down", &Experts::down);

  nb::class_<Layer>(module, "Layer").def(nb::init<>())
      .def_rw("sliding", &Layer::sliding).def_rw("head_dim", &Layer::head_dim).def_rw("kv_heads", &Layer::kv_heads)
      .def_rw("kv_source", &Layer::kv_source).def_rw("scalar", &Layer::scalar)
      .def_rw("input_norm", &Layer::input_norm).def_rw("post_attention_norm", &Layer::post_attention_norm)
      .def_rw("pre_feedforward_norm", &Layer::pre_feedforward_norm)
      .def_rw("post_feedforward_norm", &Layer::post_feedforward_norm)
      .def_rw("q_norm", &Layer::q_norm).def_rw("k_norm", &Layer::k_norm)
      .def_rw("q", &Layer::q).def_rw("k", &Layer::k).def_rw("v", &Layer::v).def_rw("o", &Layer::o)
      .def_rw("gate", &Layer::gate).def_rw("up", &Layer::up).def_rw("down", &Layer::down)
      .def_rw("ple_gate", &Layer::ple_gate).def_rw("ple_projection", &Layer::ple_projection)
      .def_rw("ple_norm", &Layer::ple_norm).def_rw("experts", &Layer::experts);

  nb::class_<TargetWeights>(module, "TargetWeights").def(nb::init<>())
      .def_rw("vocab", &TargetWeights::vocab).def_rw("window", &TargetWeights::window)
      .def_prop_rw("hidden", [](const TargetWeights& w) { return w.shape.hidden; },
                   [](TargetWeights& w, int64_t n) { w.shape.hidden = n; })
      .def_prop_rw("heads", [](const TargetWeights& w) { return w.shape.heads; },
                   [](TargetWeights& w, int64_t n) { w.shape.heads = n; })
      .def_prop_rw("eps", [](const TargetWeights& w) { return w.shape.eps; },
                   [](TargetWeights& w, float eps) { w.shape.eps = eps; })
      .def_rw("embed_scale", &TargetWeights::embed_scale).def_rw("softcap", &TargetWeights::softcap)
      .def_rw("rope_sliding", &TargetWeights::rope_sliding).def_rw("rope_full", &TargetWeights::rope_full)
      .def_rw("embedding", &TargetWeights::embedding).def_rw("final_norm", &TargetWeights::final_norm)
      .def_rw("layers", &TargetWeights::layers)
      .def_rw("ple_size", &TargetWeights::ple_size).def_rw("ple_scale", &TargetWeights::ple_scale)
      .def_rw("ple_projection", &TargetWeights::ple_projection).def_rw("ple_norm", &TargetWeights::ple_norm)
      .def("set_ple_table", [](TargetWeights& w, const AnyRows& table) {
        w.ple_table = {element_of(table.dtype()), int64_t(table.shape(0)), int64_t(table.shape(1)), table.data()};
      }, "table"_a, nb::keep_alive<1, 2>(), "Use a mapped table [vocab, layers * ple_size] in place.");

  nb::class_<Snapshot>(module, "Snapshot", "The rows of a slot, copied out of a cache.")
      .def_prop_ro("nbytes", [](const Snapshot& s) { return s.rows.rows.bytes(); })
      .def_prop_ro("length", [](const Snapshot& s) { return s.rows.length; }, "Positions it holds.")
      .def_ro("shortest", &Snapshot::shortest, "The shortest length it can be cut back to.");

  nb::class_<Target>(module, "Target", "A loaded target and its KV cache.")
      .def("__init__", [](Target* self, const TargetWeights& weights, const std::string& isa, int threads,
                          int64_t slots, int64_t context, int64_t max_rows, bool bf16_cache) {
        new (self) Target(weights, select_kernels(isa), threads, slots, context, max_rows, bf16_cache);
      }, "weights"_a, nb::kw_only(), "isa"_a, "threads"_a, "slots"_a, "context"_a, "max_rows"_a, "bf16_cache"_a,
         nb::keep_alive<1, 2>())
      .def("forward", &forward, "slots"_a, "positions"_a, "tokens"_a, "wanted"_a,
           "Logits [wanted, vocab] and hidden states [wanted, hidden], valid until the next call.")
      .def("length", [](Target& t, int64_t slot) { return t.cache().length(slot); }, "slot"_a)
      .def("truncate", [](Target& t, int64_t slot, int64_t n) { t.cache().truncate(slot, n); }, "slot"_a, "length"_a)
      .def("clear", [](Target& t, int64_t slot) { t.cache().clear(slot); }, "slot"_a)
      .def("save", [](Target& t, int64_t slot) {
        const nb::gil_scoped_release release;
        Cache::Snapshot rows = t.cache().save(slot);
        const int64_t shortest = t.cache().shortest(rows);
        return Snapshot{std::move(rows), shortest};
      }, "slot"_a, "Copy a slot's rows out.")
      .def("restore", [](Target& t, int64_t slot, const Snapshot& snapshot) {
        const nb::gil_scoped_release release;
        t.cache().restore(slot, snapshot.rows);
      }, "slot"_a, "snapshot"_a, "Copy rows into an empty slot.")
      .def_prop_rw("threads", &Target::threads, &Target::set_threads)
      .def_prop_ro("isa", [](const Target& t) { return t.kernels().name; })
      .def_prop_ro("cache_bytes", [](Target& t) { return t.cache().bytes(); });

  nb::class_<DrafterWeights>(module, "DrafterWeights").def(nb::init<>())
      .def_rw("vocab", &DrafterWeights::vocab).def_rw("backbone", &DrafterWeights::backbone)
      .def_prop_rw("hidden", [](const DrafterWeights& w) { return w.shape.hidden; },
                   [](DrafterWeights& w, int64_t n) { w.shape.hidden = n; })
      .def_prop_rw("heads", [](const DrafterWeights& w) { return w.shape.heads; },
                   [](DrafterWeights& w, int64_t n) { w.shape.heads = n; })
      .def_prop_rw("eps", [](const DrafterWeights& w) { return w.shape.eps; },
                   [](DrafterWeights& w, float eps) { w.shape.eps = eps; })
      .def_rw("pre_projection", &DrafterWeights::pre_projection)
      .def_rw("post_projection", &DrafterWeights::post_projection)
      .def_rw("final_norm", &DrafterWeights::final_norm).def_rw("layers", &DrafterWeights::layers)
      .def_rw("head", &DrafterWeights::head).def_rw("centroids", &DrafterWeights::centroids)
      .def_rw("centroid_top_k", &DrafterWeights::centroid_top_k).def_rw("tokens", &DrafterWeights::tokens);

  nb::class_<Drafter>(module, "Drafter", "A loaded drafter over a target's cache.")
      .def(nb::init<DrafterWeights, std::shared_ptr<Target>>(), "weights"_a, "target"_a)
      .def("draft", &draft, "slots"_a, "positions"_a, "newest"_a, "hidden"_a, "depth"_a, "draws"_a,
           "floors"_a = nb::none(), "acceptance"_a = nb::none(), "with_logits"_a = false,
           "Tokens and confidence [anchors, depth], lengths [anchors], logits [anchors, depth, vocab] if wanted.")
      .def("last_step", [](const Drafter& self, int64_t row) {
        auto logits = std::make_unique<float[]>(size_t(self.vocab()));
        auto hidden = std::make_unique<float[]>(size_t(self.backbone()));
        self.last_logits(row, logits.get());
        std::copy_n(self.last_hidden(row), self.backbone(), hidden.get());
        return nb::make_tuple(owned<float, 1>(logits.release(), {size_t(self.vocab())}),
                              owned<float, 1>(hidden.release(), {size_t(self.backbone())}));
      }, "row"_a, "Logits [vocab] (-3e38 where the head did not look) and next hidden state of the last draft step.");
}
