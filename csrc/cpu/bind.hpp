// What the parts of the Python module share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <unistd.h>
#include <vector>

#include "runtime/memory.hpp"

namespace paceline {

namespace nb = nanobind;

template <class T, int N>
using Array = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using AnyRows = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T, int N>
using Numpy = nb::ndarray<nb::numpy, T, nb::ndim<N>>;

// f(), a function of Python's C interface that waits for the GIL. While the interpreter ends, CPython before 3.14 ends a
// thread that does so by unwinding it, and in the first noexcept function on the way that is std::terminate. The thread
// sleeps here until the process is gone instead, as CPython 3.14 has it sleep. C functions throw nothing else.
template <class F>
auto waiting(F f) {
  try {
    return f();
  } catch (...) {
    while (true) pause();
  }
}

class GilReleased {
 public:
  GilReleased() : state_(PyEval_SaveThread()) {}
  ~GilReleased() {
    waiting([&] { PyEval_RestoreThread(state_); });
  }
  GilReleased(const GilReleased&) = delete;
  GilReleased& operator=(const GilReleased&) = delete;

 private:
  PyThreadState* state_;
};

// NumPy arrays may lie at any address; the arrays used in place must not.
template <class T>
void check_aligned(const T* data) {
  if (reinterpret_cast<uintptr_t>(data) % alignof(T))
    throw std::invalid_argument("an array that is not aligned to its elements");
}

// An array that frees `data` (from new[]) when Python drops it.
template <class T, int N>
Numpy<T, N> owned(T* data, const std::array<size_t, N>& shape) {
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return Numpy<T, N>(data, N, shape.data(), owner);
}

template <size_t N>
Numpy<float, N> array_of(const std::vector<float>& values, const std::array<size_t, N>& shape) {
  float* out = new float[values.size()];
  std::copy(values.begin(), values.end(), out);
  return owned<float, N>(out, shape);
}

inline Numpy<float, 1> array_of(const std::vector<float>& values) { return array_of<1>(values, {values.size()}); }

// A table over rows, in place. Blocks come as bytes with the name of their type.
Table table_of(const AnyRows& rows, const std::string& type);

// Matrix, Table, and what works on them alone.
void bind_matrices(nb::module_& module);

}  // namespace paceline
