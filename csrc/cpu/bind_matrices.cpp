// Bindings of packed matrices, tables and the kernels on them.
#include "bind.hpp"

#include <atomic>

#include "formats/quantise.hpp"
#include "kernels/kernels.hpp"
#include "model/layers.hpp"

namespace paceline {

using namespace nb::literals;

namespace {

// The element type of rows: bfloat16 has no NumPy type, so its bits come as uint16; blocks come as bytes, their type named.
Element element_of(const nb::dlpack::dtype& type, const std::string& named) {
  if (type == nb::dtype<uint8_t>()) {
    if (named.empty()) throw std::invalid_argument("bytes of blocks without the type of their elements");
    const Element element = element_from(named);
    if (!traits(element).plain()) return element;
  } else if (named.empty()) {
    if (type == nb::dtype<float>()) return Element::f32;
    if (type == nb::dtype<uint16_t>()) return Element::bf16;
    if (type.code == uint8_t(nb::dlpack::dtype_code::Float) && type.bits == 16) return Element::f16;
  }
  throw std::invalid_argument(
      "expected float32, float16, uint16 with the bits of bfloat16, or uint8 with blocks and their type");
}

// Columns of rows, which are whole blocks.
int64_t cols_of(const AnyRows& rows, Element type) {
  const ElementTraits& t = traits(type);
  const int64_t width = int64_t(rows.shape(1));
  if (t.plain()) return width;
  if (width % t.bytes)
    throw std::invalid_argument("rows of " + std::to_string(width) + " bytes are no whole " + t.name + " blocks of " +
                                std::to_string(t.bytes));
  return width / t.bytes * t.columns;
}

void check_cols(int64_t got, int64_t expected) {
  if (got != expected)
    throw std::invalid_argument("rows of " + std::to_string(got) + " columns where " + std::to_string(expected) +
                                " belong");
}

// Row i of `rows` of a matrix or table.
template <class T>
Numpy<float, 1> row_of(const T& from, int64_t i, int64_t rows, int64_t cols) {
  if (i < 0 || i >= rows) throw std::out_of_range("no row " + std::to_string(i) + " of " + std::to_string(rows));
  Floats row(static_cast<size_t>(cols));
  from.row(i, row.data());
  return array_of(row);
}

Numpy<float, 1> matrix_row(const Matrix& m, int64_t i) { return row_of(m, i, m.view().rows, m.view().cols); }

Numpy<float, 1> table_row(const Table& t, int64_t i) { return row_of(t, i, t.rows, t.cols); }

// matrix times rows of x [rows, cols] with `threads` threads: what tests and benchmarks of the kernels call.
void matmul(const Matrix& matrix, const Array<float, 2>& x, nb::ndarray<float, nb::ndim<2>, nb::c_contig> out,
            const std::string& isa, int threads) {
  const Kernels& kernels = select_kernels(isa);
  const int64_t rows = int64_t(x.shape(0)), ld = int64_t(out.shape(1));
  check_cols(int64_t(x.shape(1)), matrix.view().cols);
  check_cols(ld, matrix.view().padded_rows());
  if (int64_t(out.shape(0)) != rows)
    throw std::invalid_argument(std::to_string(out.shape(0)) + " rows of out for " + std::to_string(rows) + " of x");
  check_aligned(x.data()), check_aligned(out.data());
  PackedRows packed;
  packed.reserve(round_up(rows, kTile), matrix.view().padded_cols);
  const ActView act = packed.view(matrix, lanes_for(rows));
  const GilReleased release;
  ThreadPool(threads).run([&](const Worker& w) {
    const int64_t cols = matrix.view().cols;
    w.for_share(rows, [&](int64_t r) { kernels.pack_activations(act, r, x.data() + r * cols, cols, 0, act.groups()); });
    w.barrier();
    w.parallel_for(matrix.view().units(), 1, [&](int64_t begin, int64_t end) {
      kernels.matmul(matrix.view(), act, rows, begin, end, out.data(), ld);
    });
  });
}

int64_t dot_peak(const std::string& format, int64_t steps, const std::string& isa, int threads) {
  const Kernels& kernels = select_kernels(isa);
  const Format known = format_from(format);
  std::atomic<int64_t> total{0};
  const GilReleased release;
  ThreadPool(threads).run([&](const Worker&) { total += kernels.dot_peak(known, steps); });
  return total;
}

constexpr int64_t kChunk = 1 << 20;  // bytes a check value covers before it is folded into the whole
constexpr int64_t kStep = 512;       // bytes that kernels check at once

uint32_t checksum_of(const Kernels& kernels, const uint8_t* data, int64_t n) {
  const int64_t whole = n / kStep * kStep;
  const uint32_t value = kernels.checksum(data, whole);
  if (whole == n) return value;
  uint8_t tail[kStep] = {};
  std::copy(data + whole, data + n, tail);
  return (value ^ uint32_t(n)) * 0x01000193u ^ kernels.checksum(tail, kStep);
}

uint64_t checksum(const std::vector<Array<uint8_t, 1>>& parts, int threads) {
  std::vector<std::pair<const uint8_t*, int64_t>> chunks;
  for (const auto& part : parts)
    for (int64_t at = 0, n = int64_t(part.size()); at < n; at += kChunk)
      chunks.emplace_back(part.data() + at, std::min(kChunk, n - at));
  const Kernels& kernels = select_kernels("");
  std::vector<uint32_t> values(chunks.size());
  const GilReleased release;
  ThreadPool(threads).run([&](const Worker& w) {
    w.parallel_for(int64_t(chunks.size()), 1, [&](int64_t begin, int64_t end) {
      for (auto i = size_t(begin); i < size_t(end); ++i)
        values[i] = checksum_of(kernels, chunks[i].first, chunks[i].second);
    });
  });
  uint64_t total = 0xcbf29ce484222325u;
  for (uint32_t value : values) total = (total ^ value) * 0x100000001b3u;
  return total;
}

// Importance of columns, or null.
const float* importance_of(const std::optional<Array<float, 1>>& importance, int64_t cols) {
  if (importance) check_cols(int64_t(importance->shape(0)), cols);
  return importance ? importance->data() : nullptr;
}

void pack_matrix(Matrix& matrix, const AnyRows& source, int64_t first, const std::string& named,
                 const std::optional<Array<float, 1>>& importance) {
  const Element type = element_of(source.dtype(), named);
  check_cols(cols_of(source, type), matrix.view().cols);
  const float* weights = importance_of(importance, matrix.view().cols);
  const GilReleased release;
  matrix.pack(type, source.data(), first, int64_t(source.shape(0)), weights);
}

Numpy<float, 2> dequantise(const AnyRows& rows, const std::string& named, int64_t cols) {
  const Table table = table_of(rows, named);
  check_cols(table.cols, cols);
  float* out = new float[product({table.rows, table.cols})];
  const Numpy<float, 2> array = owned<float, 2>(out, {size_t(table.rows), size_t(table.cols)});
  const GilReleased release;
  for (int64_t i = 0; i < table.rows; ++i) table.row(i, out + i * table.cols);
  return array;
}

Numpy<uint8_t, 2> quantise_rows(const Array<float, 2>& x, const std::string& named,
                                const std::optional<Array<float, 1>>& importance) {
  const Element type = element_from(named);
  if (!traits(type).write) throw std::invalid_argument("nothing is quantised to " + named);
  const int64_t rows = int64_t(x.shape(0)), cols = int64_t(x.shape(1)), bytes = row_bytes(type, cols);
  const float* weights = importance_of(importance, cols);
  uint8_t* out = new uint8_t[product({rows, bytes})];
  const Numpy<uint8_t, 2> array = owned<uint8_t, 2>(out, {size_t(rows), size_t(bytes)});
  const GilReleased release;
  for (int64_t i = 0; i < rows; ++i) quantise(type, x.data() + i * cols, cols, weights, out + i * bytes);
  return array;
}

}  // namespace

Table table_of(const AnyRows& rows, const std::string& named) {
  const Element type = element_of(rows.dtype(), named);
  return {type, int64_t(rows.shape(0)), cols_of(rows, type), static_cast<const uint8_t*>(rows.data()),
          std::make_shared<AnyRows>(rows)};
}

void bind_matrices(nb::module_& module) {
  nb::class_<Table>(module, "Table", "Rows of any element type, used in place.")
      .def(
          "__init__",
          [](Table* self, const AnyRows& rows, const std::string& type) { new (self) Table(table_of(rows, type)); },
          "rows"_a, "type"_a = "", "Rows are given as to Matrix.pack.")
      .def("row", &table_row, "index"_a, "One row as float32 [cols].")
      .def(
          "data",
          [](const Table& t) { return Numpy<const uint8_t, 1>(t.data, {size_t(t.rows * row_bytes(t.type, t.cols))}); },
          nb::rv_policy::reference_internal, "Its bytes, in place.")
      .def_prop_ro("shape", [](const Table& t) { return nb::make_tuple(t.rows, t.cols); })
      .def_prop_ro("type", [](const Table& t) { return traits(t.type).name; });
  module.def("dequantise", &dequantise, "rows"_a, "type"_a, "cols"_a,
             "Values float32 [n, cols] of rows uint8 [n, bytes of a row] of the blocks of a GGUF type.");
  module.def(
      "quantise", &quantise_rows, "x"_a, "type"_a, "importance"_a = nb::none(),
      "Rows float32 [n, cols] as blocks of a GGUF type, uint8 [n, bytes of a row]. Importance: see Matrix.pack.");
  nb::class_<Matrix>(module, "Matrix", "A packed weight matrix.")
      .def(
          "__init__",
          [](Matrix* self, const std::string& format, int64_t rows, int64_t cols) {
            new (self) Matrix(format_from(format), rows, cols);
          },
          "format"_a, "rows"_a, "cols"_a)
      .def_static(
          "mapped",
          [](const std::string& format, int64_t rows, int64_t cols, const Array<uint8_t, 1>& packed) {
            return std::make_shared<Matrix>(format_from(format), rows, cols, packed.data(), packed.size());
          },
          "format"_a, "rows"_a, "cols"_a, "packed"_a, nb::keep_alive<0, 4>(), "A matrix over packed bytes, in place.")
      .def(
          "pack", &pack_matrix, "rows"_a, "first"_a = 0, "type"_a = "", "importance"_a = nb::none(),
          "Pack rows of a checkpoint tensor from matrix row `first` on: float32, float16 or uint16 (bits of bfloat16)\n"
          "[count, cols], or uint8 [count, bytes of a row] with the blocks of the GGUF type named. What has to be\n"
          "quantised has the least sum of importance float32 [cols] * error^2; without importance all columns are "
          "alike.")
      .def("fill_random", &Matrix::fill_random, "seed"_a, nb::call_guard<GilReleased>(),
           "Fill with plausible values without meaning, for measurements.")
      .def("row", &matrix_row, "index"_a, "One row, unpacked to float32 [cols].")
      .def(
          "packed", [](const Matrix& m) { return Numpy<const uint8_t, 1>(m.view().data, {m.bytes()}); },
          nb::rv_policy::reference_internal, "The packed bytes, in place.")
      .def_prop_ro("shape", [](const Matrix& m) { return nb::make_tuple(m.view().rows, m.view().cols); })
      .def_prop_ro("format", [](const Matrix& m) { return traits(m.view().format).name; })
      .def_prop_ro("nbytes", &Matrix::bytes);
  module.def("matmul", &matmul, "matrix"_a, "x"_a, "out"_a, "isa"_a = "", "threads"_a = 1,
             "out [rows, padded matrix rows] = x [rows, cols] times the matrix transposed.");
  module.def("dot_peak", &dot_peak, "format"_a, "steps"_a, "isa"_a = "", "threads"_a = 1,
             "Do the dot products of a format in registers for a while. Returns how many multiply-adds that were.");
  module.def("checksum", &checksum, "parts"_a, "threads"_a,
             "Check value of the bytes of several arrays, read at the speed of memory.");
}

}  // namespace paceline
