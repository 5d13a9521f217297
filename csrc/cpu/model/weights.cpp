#include "model/weights.hpp"

#include <cmath>
#include <cstdio>
#include <stdexcept>

namespace paceline {
namespace {

constexpr int64_t kMostWidth = int64_t(1)
                               << 24;  // of a row, heads, experts: the product of two fits what is addressable
constexpr int64_t kMostTokens = int64_t(1) << 30, kMostLayers = 4096;

void check_shape(const std::string& name, const std::vector<int64_t>& got, const std::vector<int64_t>& needed) {
  if (got == needed) return;
  const auto text = [](const std::vector<int64_t>& shape) {
    std::string out;
    for (int64_t n : shape) out += (out.empty() ? "[" : ", ") + std::to_string(n);
    return out + "]";
  };
  throw std::invalid_argument("the tensor " + name + " has shape " + text(got) + " where " + text(needed) +
                              " is needed");
}

void check_present(const std::string& name, const MatrixPtr& matrix) {
  if (!matrix) throw std::invalid_argument("the tensor " + name + " is empty");
}

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("the settings have " + what); }

std::string text(double value) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%g", value);
  return digits;
}

void check_positive(const std::string& name, double value) {
  if (!(value > 0) || !std::isfinite(value)) refuse(name + " " + text(value));
}

void check_rope(const std::string& name, const RopeConfig& rope) {
  check_positive(name + " theta", rope.theta);
  if (!(rope.rotary_factor > 0 && rope.rotary_factor <= 1))
    refuse(name + " rotary_factor " + text(rope.rotary_factor) + ", which is not in (0, 1]");
  check_positive(name + " scaling", rope.scaling);
}

bool same_kv(const LayerConfig& a, const LayerConfig& b) {
  return a.sliding == b.sliding && a.head_dim == b.head_dim && a.kv_heads == b.kv_heads;
}

void check_layer(const ModelConfig& c, size_t index) {
  const LayerConfig& layer = c.layers[index];
  const std::string prefix = "layer " + std::to_string(index) + ": ";
  check_range(prefix + "head_dim", layer.head_dim, 1, kMostWidth);
  check_range(prefix + "kv_heads", layer.kv_heads, 1, c.heads);
  check_range(prefix + "intermediate_size", layer.intermediate, 1, kMostWidth);
  check_range(prefix + "heads x head_dim", int64_t(product({c.heads, layer.head_dim})), 1, kMostWidth);
  if (c.heads % layer.kv_heads)
    refuse(prefix + std::to_string(c.heads) + " heads over " + std::to_string(layer.kv_heads) + " K/V heads");
  if (layer.head_dim % 2) refuse(prefix + "an odd head_dim, " + std::to_string(layer.head_dim));
  for (const LayerConfig& other : c.layers)  // one rotary table serves a kind
    if (other.sliding == layer.sliding && other.head_dim != layer.head_dim)
      refuse("layers of one kind with head_dim " + std::to_string(other.head_dim) + " and " +
             std::to_string(layer.head_dim));
}

void check_stack(const ModelConfig& c) {
  check_range("vocab_size", c.vocab, 1, kMostTokens);
  check_range("hidden_size", c.hidden, 1, kMostWidth);
  check_range("heads", c.heads, 1, kMostWidth);
  check_range("sliding_window", c.window, 1, kMostPositions);
  check_range("number of layers", int64_t(c.layers.size()), 1, kMostLayers);
  check_positive("rms_eps", c.eps);
  check_positive("attention_scale", c.attention_scale);
  check_rope("rope_sliding", c.rope_sliding);
  check_rope("rope_full", c.rope_full);
  for (size_t i = 0; i < c.layers.size(); ++i) check_layer(c, i);
}

}  // namespace

void check_target(const ModelConfig& c) {
  check_stack(c);
  for (size_t i = 0; i < c.layers.size(); ++i) {
    const int64_t source = c.layers[i].kv_source;
    const std::string prefix = "layer " + std::to_string(i) + ": ";
    check_range(prefix + "kv_source", source, 0, int64_t(i));
    const LayerConfig& other = c.layers[size_t(source)];
    if (other.kv_source != source) refuse(prefix + "kv_source " + std::to_string(source) + ", which has no K/V itself");
    if (!same_kv(c.layers[i], other)) refuse(prefix + "kv_source " + std::to_string(source) + ", which has other K/V");
  }
  if (!(c.softcap >= 0) || !std::isfinite(c.softcap)) refuse("softcap " + text(c.softcap));
  check_range("ple_size", c.ple_size, 0, kMostWidth);
  if (c.ple_size) {
    check_range("ple_vocab_size", c.ple_vocab, c.vocab, kMostTokens);
    check_range("layers x ple_size", c.ple_size * int64_t(c.layers.size()), 1, kMostWidth);
  }
  check_range("number of experts", c.experts, 0, kMostWidth);
  if (c.experts) {
    check_range("active experts", c.active_experts, 1, c.experts);
    check_range("intermediate_size of experts", c.expert_intermediate, 1, kMostWidth);
  }
  check_range("backbone_hidden_size of a target", c.backbone, 0, 0);
}

void check_drafter(const ModelConfig& c) {
  check_stack(c);
  for (const LayerConfig& layer : c.layers) check_range("kv_source of a drafter's layer", layer.kv_source, -1, -1);
  check_range("backbone_hidden_size", c.backbone, 1, kMostWidth);
  check_range("draft_vocab_size", c.draft_vocab, c.centroids ? c.vocab : 1, c.vocab);
  check_range("centroids", c.centroids, 0, c.vocab);
  if (c.centroids) {
    if (c.vocab % c.centroids)
      refuse(std::to_string(c.centroids) + " centroids for a vocabulary of " + std::to_string(c.vocab));
    check_range("centroid_top_k", c.centroid_top_k, 1, c.centroids);
  }
  check_range("ple_size of a drafter", c.ple_size, 0, 0);
  check_range("experts of a drafter", c.experts, 0, 0);
}

template <class T>
const T& Weights::get(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) throw std::invalid_argument("the tensor " + name + " is missing");
  used_.insert(name);
  const T* tensor = std::get_if<T>(&found->second);
  if (!tensor) throw std::invalid_argument("the tensor " + name + " is of another kind");
  return *tensor;
}

MatrixPtr Weights::matrix(const std::string& name, int64_t rows, int64_t cols) const {
  const MatrixPtr& matrix = get<MatrixPtr>(name);
  check_present(name, matrix);
  check_shape(name, {matrix->view().rows, matrix->view().cols}, {rows, cols});
  return matrix;
}

std::vector<MatrixPtr> Weights::matrices(const std::string& name, int64_t count, int64_t rows, int64_t cols) const {
  const std::vector<MatrixPtr>& matrices = get<std::vector<MatrixPtr>>(name);
  check_range("the number of matrices of " + name, int64_t(matrices.size()), count, count);
  for (const MatrixPtr& matrix : matrices) {
    check_present(name, matrix);
    check_shape(name, {count, matrix->view().rows, matrix->view().cols}, {count, rows, cols});
    if (matrix->view().format != matrices[0]->view().format)
      throw std::invalid_argument("the tensor " + name + " has experts of different formats");
  }
  return matrices;
}

const Floats& Weights::vector(const std::string& name, int64_t size) const {
  const Floats& vector = get<Floats>(name);
  check_shape(name, {int64_t(vector.size())}, {size});
  return vector;
}

const Table& Weights::table(const std::string& name, int64_t rows, int64_t cols) const {
  const Table& table = get<Table>(name);
  check_shape(name, {table.rows, table.cols}, {rows, cols});
  return table;
}

const std::vector<int32_t>& Weights::integers(const std::string& name) const { return get<std::vector<int32_t>>(name); }

void Weights::check_all_used() const {
  for (const auto& [name, tensor] : tensors_)
    if (!used_.contains(name)) throw std::invalid_argument("the settings do not call for the tensor " + name);
}

}  // namespace paceline
