#include "model/weights.hpp"

#include <stdexcept>

namespace paceline {
namespace {

void check_shape(const std::string& name, const std::vector<int64_t>& got, const std::vector<int64_t>& needed) {
  if (got == needed) return;
  const auto text = [](const std::vector<int64_t>& shape) {
    std::string out;
    for (int64_t n : shape) out += (out.empty() ? "[" : ", ") + std::to_string(n);
    return out + "]";
  };
  throw std::invalid_argument("the tensor " + name + " has shape " + text(got) + " where " + text(needed) + " is needed");
}

}  // namespace

template <class T>
const T& Weights::get(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) throw std::invalid_argument("the tensor " + name + " is missing");
  const T* tensor = std::get_if<T>(&found->second);
  if (!tensor) throw std::invalid_argument("the tensor " + name + " is of another kind");
  return *tensor;
}

MatrixPtr Weights::matrix(const std::string& name, int64_t rows, int64_t cols) const {
  const MatrixPtr& matrix = get<MatrixPtr>(name);
  check_shape(name, {matrix->view().rows, matrix->view().cols}, {rows, cols});
  return matrix;
}

std::vector<MatrixPtr> Weights::matrices(const std::string& name, int64_t count, int64_t rows, int64_t cols) const {
  const std::vector<MatrixPtr>& matrices = get<std::vector<MatrixPtr>>(name);
  for (const MatrixPtr& matrix : matrices) {
    check_shape(name, {int64_t(matrices.size()), matrix->view().rows, matrix->view().cols}, {count, rows, cols});
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

const std::vector<int32_t>& Weights::integers(const std::string& name) const {
  return get<std::vector<int32_t>>(name);
}

}  // namespace paceline
