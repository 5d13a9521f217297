// The Python module paceline._cpu. No arithmetic here: types in, types out, the GIL released around the work.
//
// What the native code throws is translated by nanobind, and by translate() for what it knows no good words for:
// std::invalid_argument is ValueError, std::out_of_range IndexError, std::bad_alloc and std::length_error MemoryError,
// a value that cannot be converted TypeError, all else RuntimeError.
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "bind.hpp"
#include "model/round.hpp"

using namespace nanobind::literals;
using namespace paceline;

namespace {

void translate(const std::exception_ptr& exception, void*) {
  try {
    std::rethrow_exception(exception);
  } catch (const std::bad_alloc&) {
    PyErr_SetString(PyExc_MemoryError, "not enough memory for the model, its KV cache or this step");
  } catch (const std::length_error&) {
    PyErr_SetString(PyExc_MemoryError, "a size is more than memory can hold");
  } catch (const std::bad_cast&) {
    PyErr_SetString(PyExc_TypeError, "a value of a type or a size that the native code does not take");
  }
}

class GilHeld {
 public:
  GilHeld() : state_(waiting([] { return PyGILState_Ensure(); })) {}
  ~GilHeld() { PyGILState_Release(state_); }
  GilHeld(const GilHeld&) = delete;
  GilHeld& operator=(const GilHeld&) = delete;

 private:
  PyGILState_STATE state_;
};

// Call a function of a constraint.
void call(nb::handle function, nb::handle argument) {
  PyObject* result = waiting([&] { return PyObject_CallOneArg(function.ptr(), argument.ptr()); });
  if (!result) nb::raise_python_error();
  Py_DECREF(result);
}

int64_t integer_of(nb::handle value, const std::string& name) {
  const nb::object index = nb::steal(PyNumber_Index(value.ptr()));
  if (!index.is_valid()) nb::raise_python_error();
  int overflow = 0;
  const int64_t integer = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow) throw std::invalid_argument(name + " is too " + (overflow > 0 ? "large" : "small"));
  return integer;
}

double number_of(nb::handle value, const std::string& name) {
  const double number = PyFloat_AsDouble(value.ptr());
  if (number != -1 || !PyErr_Occurred()) return number;
  if (!PyErr_ExceptionMatches(PyExc_OverflowError)) nb::raise_python_error();
  PyErr_Clear();
  throw std::invalid_argument(name + " is too large");
}

std::vector<int32_t> tokens_of(nb::handle sequence) {
  std::vector<int32_t> tokens;
  for (nb::handle item : sequence) {
    const int64_t token = integer_of(item, "a token");
    if (token != int32_t(token)) throw std::invalid_argument("no token " + std::to_string(token));
    tokens.push_back(int32_t(token));
  }
  return tokens;
}

template <class T>
std::vector<T> copy_of(const Array<T, 1>& array) {
  std::vector<T> out(array.size());
  if (!out.empty()) std::memcpy(out.data(), array.data(), out.size() * sizeof(T));
  return out;
}

// The fields of a paceline.config.TargetConfig or DrafterConfig.
ModelConfig config_of(nb::handle c) {
  const auto integer = [](nb::handle from, const char* name) {
    return integer_of(nb::getattr(from, name, nb::int_(0)), name);  // 0: of the other kind of model
  };
  const auto number = [](nb::handle from, const char* name) { return number_of(from.attr(name), name); };
  const auto rope = [&](const char* name) {
    const nb::object rope = c.attr(name);
    return RopeConfig{number(rope, "theta"), number(rope, "rotary_factor"), number(rope, "scaling")};
  };
  ModelConfig out;
  out.vocab = integer(c, "vocab_size"), out.hidden = integer(c, "hidden_size"), out.heads = integer(c, "heads");
  out.window = integer(c, "sliding_window"), out.eps = float(number(c, "rms_eps"));
  out.rope_sliding = rope("rope_sliding"), out.rope_full = rope("rope_full");
  for (nb::handle layer : c.attr("layers"))
    out.layers.push_back({nb::cast<bool>(layer.attr("sliding")), integer(layer, "head_dim"), integer(layer, "kv_heads"),
                          integer(layer, "intermediate_size"), integer(layer, "kv_source"),
                          nb::cast<bool>(layer.attr("has_v_proj"))});
  out.attention_scale = number(c, "attention_scale");
  out.value_norm = nb::cast<bool>(c.attr("value_norm")), out.layer_scalar = nb::cast<bool>(c.attr("layer_scalar"));
  out.tied_head = nb::cast<bool>(nb::getattr(c, "tied_head", nb::bool_(true)));
  const nb::object softcap = nb::getattr(c, "softcap", nb::none()), experts = nb::getattr(c, "experts", nb::none());
  if (!softcap.is_none()) out.softcap = float(number_of(softcap, "softcap"));
  out.ple_size = integer(c, "ple_size"), out.ple_vocab = integer(c, "ple_vocab_size");
  if (!experts.is_none())
    out.experts = integer(experts, "count"), out.active_experts = integer(experts, "active"),
    out.expert_intermediate = integer(experts, "intermediate_size");
  out.backbone = integer(c, "backbone_hidden_size"), out.draft_vocab = integer(c, "draft_vocab_size");
  out.centroids = integer(c, "centroids");
  out.centroid_top_k = integer(c, "centroid_top_k");
  return out;
}

std::vector<MatrixPtr> matrices_of(const nb::list& list, const std::string& name) {
  std::vector<MatrixPtr> matrices;
  for (nb::handle item : list) {
    if (!nb::isinstance<Matrix>(item))
      throw std::invalid_argument("the tensor " + name + " is a list of something else than matrices");
    matrices.push_back(nb::cast<MatrixPtr>(item));
  }
  return matrices;
}

// {name: Matrix, list of them, Table, float32 or int32 vector, or plain table [rows, cols]}. Tables are used in place.
Weights weights_of(const nb::dict& tensors) {
  Weights weights;
  for (const auto& [key, tensor] : tensors) {
    const std::string name = nb::cast<std::string>(key);
    Array<float, 1> floats;
    Array<int32_t, 1> integers;
    AnyRows rows;
    if (nb::isinstance<Matrix>(tensor)) weights.add(name, nb::cast<MatrixPtr>(tensor));
    else if (nb::isinstance<nb::list>(tensor)) weights.add(name, matrices_of(nb::cast<nb::list>(tensor), name));
    else if (nb::try_cast(tensor, floats, false)) weights.add(name, copy_of(floats));
    else if (nb::try_cast(tensor, integers, false)) weights.add(name, copy_of(integers));
    else if (nb::isinstance<Table>(tensor)) weights.add(name, nb::cast<Table>(tensor));
    else if (nb::try_cast(tensor, rows, false)) weights.add(name, table_of(rows, ""));
    else throw std::invalid_argument("the tensor " + name + " is of no known kind");
  }
  return weights;
}

// The sampling parameters of paceline.types; min-p becomes a distance from the best logit, in nats.
SamplingParams params_of(nb::handle params) {
  const auto number = [&](const char* name, double most) {
    const double value = number_of(params.attr(name), name);
    if (!(value >= 0 && value <= most)) throw std::invalid_argument(std::string(name) + " is out of range");
    return value;
  };
  constexpr float hottest = std::numeric_limits<float>::max();
  const double temperature = number("temperature", std::numeric_limits<double>::max());
  const double min_p = number("min_p", 1);
  const nb::object seed = params.attr("seed");
  return {temperature < hottest ? float(temperature) : hottest,
          check_range("top_k", integer_of(params.attr("top_k"), "top_k"), 0, std::numeric_limits<int64_t>::max()),
          number("top_p", 1), min_p > 0 ? float(-std::log(min_p)) : std::numeric_limits<float>::infinity(),
          seed.is_none() ? 0 : nb::cast<uint64_t>(seed)};
}

int32_t sample(const Array<float, 1>& logits, nb::handle params, uint32_t position, const std::string& isa) {
  check_range("the number of logits", int64_t(logits.size()), 1, std::numeric_limits<int32_t>::max());
  check_aligned(logits.data());
  const Kernels& kernels = select_kernels(isa);
  const SamplingParams native = params_of(params);
  const int64_t n = int64_t(logits.size());
  if (native.temperature == 0) return int32_t(kernels.arg_max(logits.data(), n, nullptr));
  return kernels.sample({logits.data(), nullptr, n}, native, position, false).token;
}

// A paceline.types.Work. Its constraint is called with the GIL, which a run does not hold otherwise.
Work work_of(nb::handle given, int64_t vocab) {
  const auto get = [&](const char* name) { return given.attr(name); };
  Work work{integer_of(get("slot"), "slot"), integer_of(get("position"), "position"), tokens_of(get("tokens"))};
  const nb::object params = get("params"), draft = get("draft"), constraint = get("constraint");
  work.samples = !params.is_none();
  if (!work.samples) return work;
  work.params = params_of(params);
  work.draft = tokens_of(draft.attr("tokens"));
  work.limit = {integer_of(draft.attr("length"), "length"), nb::cast<std::vector<float>>(draft.attr("floors")),
                nb::cast<std::vector<float>>(draft.attr("acceptance"))};
  const nb::object simulated = draft.attr("simulated");
  if (!simulated.is_none())
    work.simulated = check_range("simulated", integer_of(simulated, "simulated"), 0, kMostPositions);
  work.logits = nb::cast<bool>(get("logits"));
  if (!constraint.is_none()) {
    work.constrain = [apply = nb::object(constraint.attr("apply")), vocab](float* logits) {
      const GilHeld gil;
      call(apply, nb::cast(Numpy<float, 1>(logits, {size_t(vocab)}), nb::rv_policy::reference));
    };
    work.commit = [commit = nb::object(constraint.attr("commit"))](int32_t token) {
      const GilHeld gil;
      call(commit, nb::int_(token));
    };
  }
  return work;
}

template <class T>
nb::tuple tuple_of(const std::vector<T>& values) {
  return nb::tuple(nb::cast(values));
}

// [(sampled, drafted, confidence, logits or None)]
nb::list run(Decoder& decoder, const nb::typed<nb::sequence, nb::object>& given) {
  const int64_t vocab = decoder.target().weights().config.vocab;
  std::vector<Work> works;
  for (nb::handle work : given) works.push_back(work_of(work, vocab));
  std::vector<Result> results;
  {
    const GilReleased release;
    results = decoder.run(works);
  }
  nb::list out;
  for (size_t i = 0; i < results.size(); ++i) {
    Result& result = results[i];
    nb::object logits = nb::none();
    if (works[i].logits) {
      auto* rows = new Floats(std::move(result.logits));  // megabytes, which are not copied
      const nb::capsule owner(rows, [](void* p) noexcept { delete static_cast<Floats*>(p); });
      const size_t shape[] = {result.sampled.size(), size_t(vocab)};
      logits = nb::cast(Numpy<float, 2>(rows->data(), 2, shape, owner));
    }
    out.append(nb::make_tuple(tuple_of(result.sampled), tuple_of(result.drafted), tuple_of(result.confidence), logits));
  }
  return out;
}

void make_decoder(Decoder* self, nb::handle target_config, const nb::dict& target, nb::handle drafter_config,
                  const nb::dict& drafter, const std::string& isa, int threads, const nb::int_& slots,
                  const nb::int_& context, const nb::int_& max_rows, const std::string& kv) {
  auto model = std::make_shared<Target>(config_of(target_config), weights_of(target), select_kernels(isa), threads,
                                        integer_of(slots, "slots"), integer_of(context, "context"),
                                        integer_of(max_rows, "max_rows"), cache_format_from(kv));
  std::unique_ptr<Drafter> pair;
  if (!drafter_config.is_none())
    pair = std::make_unique<Drafter>(config_of(drafter_config), weights_of(drafter), model);
  new (self) Decoder(std::move(model), std::move(pair));
}

Numpy<float, 1> hidden(const Decoder& decoder, int64_t slot) {
  Floats state;
  {
    const GilReleased release;
    state = decoder.hidden(slot);
  }
  return array_of(state);
}

Numpy<float, 2> states(const Decoder& decoder) {
  Floats rows;
  {
    const GilReleased release;
    rows = decoder.states();
  }
  const size_t hidden = size_t(decoder.target().weights().config.hidden);
  return array_of<2>(rows, {rows.size() / hidden, hidden});
}

nb::tuple best(Decoder& decoder, int64_t count) {
  std::pair<std::vector<int32_t>, Floats> best;
  {
    const GilReleased release;
    best = decoder.best(count);
  }
  const std::array<size_t, 2> shape{best.first.size() / size_t(count), size_t(count)};
  int32_t* ids = new int32_t[best.first.size()];
  std::copy(best.first.begin(), best.first.end(), ids);
  return nb::make_tuple(owned<int32_t, 2>(ids, shape), array_of<2>(best.second, shape));
}

Numpy<float, 4> keys_values(const Decoder& decoder, int64_t layer, int64_t slot, int64_t first, int64_t count) {
  Floats numbers;
  {
    const GilReleased release;
    numbers = decoder.keys_values(layer, slot, first, count);
  }
  const LayerConfig& config = decoder.target().weights().config.layers[size_t(layer)];
  return array_of<4>(numbers, {2, size_t(config.kv_heads), size_t(count), size_t(config.head_dim)});
}

nb::tuple last_draft_step(const Decoder& decoder, int64_t row) {
  std::pair<Floats, Floats> step;
  {
    const GilReleased release;
    step = decoder.last_draft_step(row);
  }
  return nb::make_tuple(array_of(step.first), array_of(step.second));
}

nb::tuple seen(const Decoder& decoder, const Matrix& matrix) {
  Observer::Seen seen;
  {
    const GilReleased release;
    seen = decoder.seen(matrix);
  }
  double* squares = new double[seen.squares.size()];
  std::copy(seen.squares.begin(), seen.squares.end(), squares);
  return nb::make_tuple(seen.rows, owned<double, 1>(squares, {seen.squares.size()}));
}

void bind_decoder(nb::module_& module) {
  using Snapshot = KvCache::Snapshot;
  const auto no_gil = nb::call_guard<GilReleased>();
  nb::class_<Snapshot>(module, "Snapshot", "The rows of a slot, copied out of a cache.")
      .def_prop_ro("nbytes", [](const Snapshot& s) { return s.rows.bytes(); })
      .def_ro("length", &Snapshot::length, "Positions it holds.")
      .def_ro("shortest", &Snapshot::shortest, "The shortest length it can be cut back to.");

  nb::class_<Decoder>(module, "Decoder", "A loaded pair and its KV cache.")
      .def(
          "__init__", &make_decoder, "target_config"_a, "target"_a, "drafter_config"_a.none(), "drafter"_a,
          nb::kw_only(), "isa"_a, "threads"_a, "slots"_a, "context"_a, "max_rows"_a, "kv"_a,
          "Configs are paceline.config's, weights are tensors by name: see paceline.backends.cpu.weights. `kv` is the\n"
          "format of the KV cache: f32, bf16 or q8.\n\n"
          "ValueError: settings or sizes that no model has, or tensors that do not fit the settings or that they do\n"
          "not call for. MemoryError: not enough memory. RuntimeError: the system has no more threads.")
      .def("run", &run, "works"_a,
           "One step: see paceline.backends.base.Backend.run.\n\n"
           "ValueError: a work that does not continue its slot or does not fit it. RuntimeError: the process was "
           "forked\n"
           "after loading, here and in all methods. Whatever is raised, by a constraint too: no slot has changed.")
      .def("length", &Decoder::length, "slot"_a, no_gil)
      .def("truncate", &Decoder::truncate, "slot"_a, "length"_a, no_gil)
      .def("clear", &Decoder::clear, "slot"_a, no_gil)
      .def("save", &Decoder::save, "slot"_a, no_gil, "Copy a slot's rows out.")
      .def("restore", &Decoder::restore, "slot"_a, "snapshot"_a, no_gil, "Copy rows into an empty slot.")
      .def("fill_random", &Decoder::fill_random, "slot"_a, "length"_a, no_gil,
           "Continue a slot's cache with random rows up to a length: for measurements behind long contexts.\n\n"
           "ValueError: the slot is longer, or shorter than that at most.")
      .def_prop_rw("threads", &Decoder::threads, &Decoder::set_threads, no_gil)
      .def_prop_ro("isa", [](const Decoder& d) { return d.target().kernels().name; })
      .def_prop_ro("cache_bytes", [](const Decoder& d) { return d.target().cache().bytes(); })
      .def("hidden", &hidden, "slot"_a, "The target's state [hidden] at the slot's last accepted row.")
      .def(
          "states", &states,
          "The target's states [rows, hidden] at the rows that the last step sampled after, in the order of its works.")
      .def("best", &best, "count"_a,
           "Tokens and logits [rows, count] of the same rows: the best ones, best first, of equal ones the first "
           "token.\n\n"
           "ValueError: there are not as many, or they are no numbers.")
      .def("keys_values", &keys_values, "layer"_a, "slot"_a, "first"_a, "count"_a,
           "Keys, then values, of a layer that has its own: [2, kv_heads, count, head_dim].\n\n"
           "ValueError: positions that the cache does not hold (any more).")
      .def("simulate_routing", &Decoder::simulate_routing, "overlap"_a, no_gil,
           "From now on, send rows to the target's experts so that neighbours share about this many of them, as the "
           "rows\n"
           "of a text do: for measurements. ValueError: a share that cannot be had, or a model without experts.")
      .def("observe", &Decoder::observe, no_gil,
           "From now on, sum up the squares of what matrices are multiplied with.")
      .def("seen", &seen, "matrix"_a,
           "What a matrix of the pair was multiplied with since `observe`: rows, and float64 [cols], the sums of the\n"
           "squares of its columns. ValueError: nothing is observed.")
      .def("last_draft_step", &last_draft_step, "row"_a,
           "Logits [vocab] (-3e38 where the head did not look) and next hidden state of the last draft step.");
}

}  // namespace

NB_MODULE(_cpu, module) {
  module.doc() = "Native CPU backend: packed matrices, KV cache, target and drafter.";
  nb::register_exception_translator(&translate);
  // A process that ends while a thread still generates, or with two Ctrl-C, leaves objects behind. The system takes their
  // memory; a report of many lines would hide what the user is told.
  nb::set_leak_warnings(false);
  module.def("usable_isas", &usable_isas, "Instruction sets that work on this processor, best first.");
  module.def("sample", &sample, "logits"_a, "params"_a, "position"_a, "isa"_a = "",
             "The token sampled from logits [vocab] at an absolute position.");
  bind_matrices(module);
  bind_decoder(module);
}
