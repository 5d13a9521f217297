// The bits that every instruction set must give: hashes of what random models of all shapes compute, with weights of every
// format. `tests/native/corpus.txt` is what this prints, and must print on every processor. Only AVX512-BF16 has other bits
// with bf16 weights.
//
//   corpus               print the lines for plain C++, or PACELINE_ISA
//   corpus EXPECTED      compare those of every instruction set this processor has, or PACELINE_ISA, with a file; exits with 1
//                        if any differ
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <stdexcept>

#include "model/round.hpp"

using namespace paceline;

namespace {

// Of bytes (FNV-1a).
class Hash {
 public:
  template <class T>
  void add(const std::vector<T>& values) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(values.data());
    for (size_t i = 0; i < values.size() * sizeof(T); ++i) value_ = (value_ ^ bytes[i]) * 0x100000001b3u;
  }
  uint64_t value() const { return value_; }

 private:
  uint64_t value_ = 0xcbf29ce484222325u;
};

struct Shape {
  const char* name;
  ModelConfig target, drafter;
};

constexpr int64_t kVocabulary = 320, kHidden = 192;

ModelConfig base_config() {
  ModelConfig c{};
  c.vocab = kVocabulary, c.hidden = kHidden, c.heads = 4, c.window = 24, c.eps = 1e-6f;
  c.rope_sliding = {1e4, 1, 1}, c.rope_full = {1e6, 0.25, 1};
  return c;
}

// Layers of a target: every third one attends to all positions; those from `own` on share the K/V of the last of their kind.
std::vector<LayerConfig> target_layers(int64_t count, int64_t own, int64_t kv_heads, bool full_has_v) {
  std::vector<LayerConfig> layers;
  int64_t last[2] = {-1, -1};
  for (int64_t i = 0; i < count; ++i) {
    const bool sliding = i % 3 != 2;
    if (i < own) last[sliding] = i;
    layers.push_back({sliding, sliding ? 32 : 64, kv_heads, i < own ? 208 : 416, last[sliding], sliding || full_has_v});
  }
  return layers;
}

ModelConfig drafter_for(const ModelConfig& target, int64_t centroids) {
  ModelConfig c = base_config();
  c.hidden = 64, c.backbone = kHidden, c.layer_scalar = target.layer_scalar;
  c.draft_vocab = c.vocab, c.centroids = centroids, c.centroid_top_k = centroids / 4;
  for (int64_t i = 0; i < 4; ++i) {
    const bool sliding = i != 3;
    c.layers.push_back({sliding, sliding ? 32 : 64, target.layers[0].kv_heads, 96, -1, false});
  }
  return c;
}

std::vector<Shape> shapes() {
  Shape e2b{"e2b", base_config(), {}}, dense{"dense", base_config(), {}}, experts{"experts", base_config(), {}};
  Shape gemma3{"gemma3", base_config(), {}};
  e2b.target.layers = target_layers(9, 6, 1, true);
  e2b.target.ple_size = 32, e2b.target.ple_vocab = kVocabulary, e2b.target.softcap = 30;
  e2b.drafter = drafter_for(e2b.target, 20);
  dense.target.layers = target_layers(6, 6, 2, false);
  dense.target.softcap = 30;
  dense.drafter = drafter_for(dense.target, 0);
  experts.target.layers = target_layers(6, 6, 2, false);
  experts.target.softcap = 30, experts.target.experts = 8, experts.target.active_experts = 3;
  experts.target.expert_intermediate = 48;
  experts.drafter = drafter_for(experts.target, 0);
  gemma3.target.layers = target_layers(6, 6, 1, true);
  gemma3.target.layer_scalar = gemma3.target.value_norm = false, gemma3.target.attention_scale = 0.0625;
  gemma3.target.rope_full = {1e6, 1, 8};
  gemma3.drafter = drafter_for(gemma3.target, 0);
  return {e2b, dense, experts, gemma3};
}

// Random tensors by name. A format named "mixed" takes the formats that hold integers in turn.
class RandomWeights {
 public:
  RandomWeights(std::string format, bool has_layer_scalar) : format_(std::move(format)), scalar_(has_layer_scalar) {}

  MatrixPtr matrix(int64_t rows, int64_t cols) {
    constexpr Format turns[] = {Format::q4_k, Format::q8_0, Format::q6_k, Format::q4_0, Format::q5_k};
    const Format format = format_ == "mixed" ? turns[seed_ % std::size(turns)] : format_from(format_);
    const MatrixPtr made = std::make_shared<Matrix>(format, rows, cols);
    made->fill_random(++seed_);
    return made;
  }
  std::vector<MatrixPtr> matrices(int64_t count, int64_t rows, int64_t cols) {
    Format format = format_ == "mixed" ? Format::q5_1 : format_from(format_);
    std::vector<MatrixPtr> made;
    for (int64_t i = 0; i < count; ++i) {
      made.push_back(std::make_shared<Matrix>(format, rows, cols));
      made.back()->fill_random(++seed_);
    }
    return made;
  }
  Floats vector(int64_t size) {
    Floats x;
    for (int64_t i = 0; i < size; ++i) x.push_back(0.75f + float(next() >> 24) / 512);
    return x;
  }
  uint32_t next() { return state_ = state_ * 1664525u + 1013904223u; }

  // The tensors that targets and drafters have alike.
  void add_layers(Weights& w, const ModelConfig& c) {
    for (size_t i = 0; i < c.layers.size(); ++i) {
      const LayerConfig& layer = c.layers[i];
      const std::string prefix = "layers." + std::to_string(i) + ".", attention = prefix + "self_attn.";
      const int64_t queries = c.heads * layer.head_dim, keys = layer.kv_heads * layer.head_dim;
      for (const char* name :
           {"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"})
        w.add(prefix + name + ".weight", vector(c.hidden));
      if (scalar_) w.add(prefix + "layer_scalar", vector(1));
      w.add(attention + "q_proj.weight", matrix(queries, c.hidden));
      w.add(attention + "q_norm.weight", vector(layer.head_dim));
      w.add(attention + "o_proj.weight", matrix(c.hidden, queries));
      w.add(prefix + "mlp.gate_proj.weight", matrix(layer.intermediate, c.hidden));
      w.add(prefix + "mlp.up_proj.weight", matrix(layer.intermediate, c.hidden));
      w.add(prefix + "mlp.down_proj.weight", matrix(c.hidden, layer.intermediate));
      if (layer.kv_source == int64_t(i)) {
        w.add(attention + "k_proj.weight", matrix(keys, c.hidden));
        w.add(attention + "k_norm.weight", vector(layer.head_dim));
        if (layer.has_v) w.add(attention + "v_proj.weight", matrix(keys, c.hidden));
      }
    }
    w.add("norm.weight", vector(c.hidden));
  }

 private:
  std::string format_;
  bool scalar_;
  uint64_t seed_ = 0;
  uint32_t state_ = 1;
};

Weights target_weights(const ModelConfig& c, RandomWeights& random, std::vector<float>& table) {
  Weights w;
  random.add_layers(w, c);
  w.add("embed_tokens.weight", random.matrix(c.vocab, c.hidden));
  w.add("embed_tokens.scale", Floats{std::sqrt(float(c.hidden))});
  for (size_t i = 0; i < c.layers.size(); ++i) {
    const std::string prefix = "layers." + std::to_string(i) + ".";
    if (c.ple_size) {
      w.add(prefix + "per_layer_input_gate.weight", random.matrix(c.ple_size, c.hidden));
      w.add(prefix + "per_layer_projection.weight", random.matrix(c.hidden, c.ple_size));
      w.add(prefix + "post_per_layer_input_norm.weight", random.vector(c.hidden));
    }
    if (c.experts) {
      w.add(prefix + "router.proj.weight", random.matrix(c.experts, c.hidden));
      w.add(prefix + "router.scale", random.vector(c.hidden));
      w.add(prefix + "router.per_expert_scale", random.vector(c.experts));
      for (const char* name :
           {"post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"})
        w.add(prefix + name + ".weight", random.vector(c.hidden));
      for (const char* name : {"gate_proj", "up_proj"})
        w.add(prefix + "experts." + name, random.matrices(c.experts, c.expert_intermediate, c.hidden));
      w.add(prefix + "experts.down_proj", random.matrices(c.experts, c.hidden, c.expert_intermediate));
    }
  }
  if (c.ple_size) {
    const int64_t width = c.ple_size * int64_t(c.layers.size());
    table = random.vector(c.ple_vocab * width);
    w.add("embed_tokens_per_layer.scale", Floats{std::sqrt(float(c.ple_size))});
    w.add("embed_tokens_per_layer.weight",
          Table{Element::f32, c.ple_vocab, width, reinterpret_cast<const uint8_t*>(table.data()), nullptr});
    w.add("per_layer_model_projection.weight", random.matrix(width, c.hidden));
    w.add("per_layer_projection_norm.weight", random.vector(c.ple_size));
  }
  return w;
}

Weights drafter_weights(const ModelConfig& c, RandomWeights& random) {
  Weights w;
  random.add_layers(w, c);
  w.add("pre_projection.weight", random.matrix(c.hidden, 2 * c.backbone));
  w.add("post_projection.weight", random.matrix(c.backbone, c.hidden));
  if (!c.centroids) {
    w.add("embed_tokens.weight", random.matrix(c.vocab, c.hidden));
    return w;
  }
  const int64_t list = c.vocab / c.centroids, padded = round_up(list, kPanel);
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < c.centroids; ++i)
    for (int64_t j = 0; j < padded; ++j) tokens.push_back(j < list ? int32_t(j * c.centroids + i) : -1);
  w.add("ordered_head.weight", random.matrix(c.centroids * padded, c.hidden));
  w.add("ordered_head.tokens", tokens);
  w.add("masked_embedding.centroids.weight", random.matrix(c.centroids, c.hidden));
  return w;
}

// Two sequences, one sampled and one greedy: a prompt longer than the window in two chunks, then rounds of three drafts.
void run_model(const Shape& shape, const std::string& format, const std::string& kv, const Kernels& kernels,
               std::map<std::string, uint64_t>& hashes) {
  RandomWeights random(format, shape.target.layer_scalar);
  std::vector<float> table;
  const Weights weights = target_weights(shape.target, random, table),
                drafting = drafter_weights(shape.drafter, random);
  const auto target = std::make_shared<Target>(shape.target, weights, kernels, 1, 2, 128, 32, cache_format_from(kv));
  Decoder decoder(target, std::make_unique<Drafter>(shape.drafter, drafting, target));
  Hash prefill, decode, drafts;
  const SamplingParams params[] = {{1.0f, 40, 0.95, INFINITY, 7}, {0.0f, 0, 1.0, INFINITY, 0}};
  std::vector<int32_t> prompt[2], newest(2);
  for (int length = 0; length < 45; ++length)
    for (auto& tokens : prompt) tokens.push_back(int32_t(random.next() >> 8) % kVocabulary);
  int64_t position[2] = {0, 0};
  const auto step = [&](bool samples, const DraftLimit& limit, const std::vector<std::vector<int32_t>>& tokens) {
    std::vector<Work> works;
    for (int64_t slot = 0; slot < 2; ++slot) {
      Work work;
      work.slot = slot, work.position = position[slot], work.tokens = tokens[size_t(slot)], work.samples = samples;
      work.params = params[slot], work.limit = limit, work.logits = true;
      works.push_back(work);
    }
    const std::vector<Result> results = decoder.run(works);
    for (const Result& r : results)
      for (float logit : r.logits)
        if (!std::isfinite(logit)) throw std::runtime_error("a random model has logits that are not finite");
    for (size_t slot = 0; slot < 2; ++slot) {
      position[slot] += int64_t(tokens[slot].size()) + std::max<int64_t>(0, int64_t(results[slot].sampled.size()) - 1);
      if (!results[slot].sampled.empty()) newest[slot] = results[slot].sampled.back();
    }
    return results;
  };
  for (int chunk = 0; chunk < 2; ++chunk) {
    const int begin = chunk ? 29 : 0, end = chunk ? 45 : 29;
    std::vector<std::vector<int32_t>> tokens;
    for (const auto& all : prompt) tokens.emplace_back(all.begin() + begin, all.begin() + end);
    for (const Result& r : step(chunk == 1, {}, tokens)) prefill.add(r.logits), prefill.add(r.sampled);
  }
  const DraftLimit three{3, {}, {}};
  for (int round = 0; round < 6; ++round)
    for (const Result& r : step(true, three, {{newest[0]}, {newest[1]}})) {
      decode.add(r.logits), decode.add(r.sampled);
      drafts.add(r.drafted), drafts.add(r.confidence);
    }
  const std::string name = std::string(shape.name) + " " + format + (kv == "q8" ? " kv-q8 " : " ");
  hashes[name + "prefill"] = prefill.value();
  hashes[name + "decode"] = decode.value();
  hashes[name + "drafts"] = drafts.value();
}

std::map<std::string, uint64_t> corpus(const Kernels& kernels) {
  std::map<std::string, uint64_t> hashes;
  for (const Shape& shape : shapes()) {
    for (const FormatTraits& format : kFormats)
      run_model(shape, format.name, format.name == std::string("f32") ? "f32" : "bf16", kernels, hashes);
    run_model(shape, "mixed", "bf16", kernels, hashes);
    run_model(shape, "q8_0", "q8", kernels, hashes);
  }
  return hashes;
}

// Lines of a name and a hash.
std::map<std::string, uint64_t> read_corpus(const char* path) {
  std::ifstream file(path);
  std::map<std::string, uint64_t> hashes;
  for (std::string line; std::getline(file, line);) {
    const size_t at = line.rfind(' ');
    if (at != std::string::npos) hashes[line.substr(0, at)] = std::stoull(line.substr(at + 1), nullptr, 16);
  }
  if (hashes.empty()) throw std::runtime_error(std::string("no corpus in ") + path);
  return hashes;
}

int compare(std::map<std::string, uint64_t> expected, const std::string& isa) {
  std::map<std::string, uint64_t> got = corpus(select_kernels(isa));
  if (isa == "avx512bf16")
    for (auto* hashes : {&expected, &got})
      std::erase_if(*hashes, [](const auto& line) { return line.first.find(" bf16 ") != std::string::npos; });
  int differences = got.size() == expected.size() ? 0 : 1;
  for (const auto& [name, hash] : got) {
    const auto found = expected.find(name);
    if (found != expected.end() && found->second == hash) continue;
    if (++differences <= 20) std::fprintf(stderr, "%s: other bits: %s\n", isa.c_str(), name.c_str());
  }
  if (differences) std::printf("%s: %d of %zu hashes DIFFER\n", isa.c_str(), differences, expected.size());
  else std::printf("%s: %zu hashes equal\n", isa.c_str(), expected.size());
  return differences != 0;
}

}  // namespace

int main(int argc, char** argv) {
  const char* isa = std::getenv("PACELINE_ISA");
  if (argc > 1) {
    int failed = 0;
    const std::map<std::string, uint64_t> expected = read_corpus(argv[1]);
    for (const std::string& name : isa ? std::vector<std::string>{isa} : usable_isas())
      failed += compare(expected, name);
    return failed ? 1 : 0;
  }
  for (const auto& [name, hash] : corpus(select_kernels(isa ? isa : "generic")))
    std::printf("%s %016llx\n", name.c_str(), static_cast<unsigned long long>(hash));
  return 0;
}
