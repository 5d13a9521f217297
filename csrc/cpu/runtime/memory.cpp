#include "runtime/memory.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace paceline {

int64_t check_range(const std::string& name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return value;
  throw std::invalid_argument(name + " is " + std::to_string(value) + "; it must be from " + std::to_string(least) +
                              " to " + std::to_string(most));
}

size_t product(std::initializer_list<int64_t> sizes) {
  constexpr int64_t most = int64_t(1) << 47;  // what a processor can address
  int64_t total = 1;
  bool fits = true;
  for (int64_t size : sizes) fits = fits && !__builtin_mul_overflow(total, size, &total);
  if (fits && total >= 0 && total <= most) return size_t(total);
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "" : " x ") + std::to_string(size);
  throw std::invalid_argument("a size of " + text + " bytes is too large");
}

namespace {

constexpr size_t kPage = 4096;

#if defined(__linux__)
constexpr size_t kHugePage = size_t(2) << 20, kLeastHuge = 2 * kHugePage;

// Whole pages that begin at a multiple of kHugePage, and are huge if the system has some. Throws std::bad_alloc.
uint8_t* map_huge(size_t bytes) {
  void* whole = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (whole == MAP_FAILED) throw std::bad_alloc();
  auto* first = static_cast<uint8_t*>(whole);
  const size_t before = -reinterpret_cast<uintptr_t>(first) % kHugePage;
  if (before) munmap(first, before);
  munmap(first + before + bytes, kHugePage - before);
  madvise(first + before, bytes, MADV_HUGEPAGE);
  return first + before;
}
#endif

}  // namespace

void FreeMemory::operator()(uint8_t* p) const {
#if defined(__linux__)
  if (mapped) {
    munmap(p, mapped);
    return;
  }
#endif
  std::free(p);
}

void Buffer::reserve(size_t bytes, bool huge) {
  if (bytes <= bytes_) return;
  bytes = (bytes + kPage - 1) / kPage * kPage;
  memory_.reset();
  bytes_ = 0;
#if defined(__linux__)
  if (huge && bytes >= kLeastHuge) memory_ = {map_huge(bytes), FreeMemory{bytes}};
#endif
  if (!memory_) memory_ = {static_cast<uint8_t*>(std::aligned_alloc(kPage, bytes)), FreeMemory{}};
  if (!memory_) throw std::bad_alloc();
  bytes_ = bytes;
}

namespace {

MatrixView shape_of(Format format, int64_t rows, int64_t cols) {
  if (rows <= 0 || cols <= 0) throw std::invalid_argument("a matrix needs at least one row and one column");
  product({rows, cols, 4});
  product({rows, kMaxBlock, 4}), product({kPanel, cols, 4});  // padded
  return MatrixView(format, rows, cols);
}

}  // namespace

Matrix::Matrix(Format format, int64_t rows, int64_t cols) : view_(shape_of(format, rows, cols)) {
  memory_.reserve(bytes(), true);
  view_.data = memory_.data();
  if (rows % kPanel)  // the lanes past the end
    std::fill_n(memory_.data() + (view_.panels() - 1) * view_.stride, view_.stride, uint8_t(0));
}

Matrix::Matrix(Format format, int64_t rows, int64_t cols, const uint8_t* packed, size_t bytes)
    : view_(shape_of(format, rows, cols)) {
  if (bytes != this->bytes())
    throw std::invalid_argument(std::to_string(bytes) + " packed bytes where " + std::to_string(this->bytes()) +
                                " are needed");
  if (reinterpret_cast<uintptr_t>(packed) % kAlign)
    throw std::invalid_argument("packed bytes at an address that is not a multiple of " + std::to_string(kAlign));
  view_.data = packed;
}

void Matrix::pack(Element type, const void* source, int64_t first, int64_t count, const float* importance) {
  if (!memory_.data()) throw std::invalid_argument("a mapped matrix cannot be packed");
  if (first < 0 || count < 0 || first > view_.rows - count)
    throw std::invalid_argument(std::to_string(count) + " rows from row " + std::to_string(first) + " of a matrix of " +
                                std::to_string(view_.rows));
  pack_rows(view_, memory_.data(), type, source, first, count, importance);
}

void Matrix::fill_random(uint64_t seed) {
  if (!memory_.data()) throw std::invalid_argument("a mapped matrix cannot be filled");
  randomise(view_, memory_.data(), seed);
}

}  // namespace paceline
