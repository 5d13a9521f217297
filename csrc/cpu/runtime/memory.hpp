// Memory that kernels read and write: aligned buffers, packed matrices, tables that stay in a mapped file.
#pragma once

#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>
#include <string>

#include "formats/formats.hpp"

namespace paceline {

// Throws std::invalid_argument unless `value` is from `least` to `most`; returns it.
int64_t check_range(const std::string& name, int64_t value, int64_t least, int64_t most);

// The product of sizes, none of them negative. Throws std::invalid_argument when it is more than memory can hold.
size_t product(std::initializer_list<int64_t> sizes);

struct FreeMemory {
  size_t mapped = 0;  // bytes of a mapping; 0: from malloc
  void operator()(uint8_t* p) const;
};

// Bytes aligned for the widest loads; grows, never shrinks, and does not keep its contents when it grows. Untouched
// pages cost nothing. `huge` asks for huge pages, which suit memory that is written whole and then streamed; large
// buffers of that kind lie in mappings of their own, between which malloc cannot keep memory that others have freed.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes) { reserve(bytes); }
  void reserve(size_t bytes, bool huge = false);  // throws std::bad_alloc
  uint8_t* data() const { return memory_.get(); }
  float* floats() const { return reinterpret_cast<float*>(memory_.get()); }
  size_t bytes() const { return bytes_; }

 private:
  std::unique_ptr<uint8_t[], FreeMemory> memory_;
  size_t bytes_ = 0;
};

constexpr size_t kAlign = 64;  // of packed matrices: kernels load their panels 64 bytes at a time

// A packed weight matrix [rows, cols], in memory that it owns or that the caller keeps alive.
class Matrix {
 public:
  // Both throw std::invalid_argument for sizes that no matrix has; the second one also for other bytes than the shape
  // takes, or bytes that are not aligned to kAlign.
  Matrix(Format format, int64_t rows, int64_t cols);
  Matrix(Format format, int64_t rows, int64_t cols, const uint8_t* packed, size_t bytes);  // bytes() of them
  const MatrixView& view() const { return view_; }
  size_t bytes() const { return size_t(view_.bytes()); }

  // Pack source rows [count, cols] as matrix rows first, first + 1, ...
  void pack(Element type, const void* source, int64_t first, int64_t count, const float* importance = nullptr);

  // Weights for measurements: plausible values without meaning, the same for the same seed.
  void fill_random(uint64_t seed);
  void row(int64_t i, float* out) const { unpack_row(view_, i, out); }

 private:
  Buffer memory_;
  MatrixView view_;
};

using MatrixPtr = std::shared_ptr<Matrix>;

// A table in a mapped file, at any address, that is read a row at a time (per-layer embeddings).
struct Table {
  Element type = Element::f32;
  int64_t rows = 0, cols = 0;  // a row is whole blocks of the type
  const uint8_t* data = nullptr;
  std::shared_ptr<void> owner;  // keeps the mapping alive

  void row(int64_t i, float* out) const { decode(type, data + i * row_bytes(type, cols), 0, cols, out); }
};

}  // namespace paceline
