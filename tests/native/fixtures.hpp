// What the tests of kernels share: numbers and memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "formats/formats.hpp"

namespace paceline {

using Floats = std::vector<float>;

inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

inline bool same(const float* a, const float* b, size_t n) { return std::memcmp(a, b, n * sizeof(float)) == 0; }

inline bool near(double a, double b, double tolerance) { return std::fabs(a - b) <= tolerance; }  // false for NaN

class Random {
 public:
  explicit Random(unsigned seed) : state_(seed) {}
  int integer(int low, int high) { return low + int(state_() % unsigned(high - low + 1)); }
  float uniform() { return float(integer(-32768, 32767)) / 32768; }
  Floats floats(int64_t n, float size = 1) {
    Floats x(static_cast<size_t>(n));
    for (float& v : x) v = uniform() * size;
    return x;
  }

 private:
  std::mt19937 state_;  // its numbers, unlike the distributions', are the same everywhere
};

// Memory aligned as the kernels expect weights, filled with a byte that makes floats NaN.
class Memory {
 public:
  explicit Memory(int64_t bytes)
      : p_(static_cast<uint8_t*>(std::aligned_alloc(64, size_t(round_up(std::max<int64_t>(bytes, 64), 64))))) {
    std::memset(p_.get(), 0xff, size_t(bytes));
  }
  uint8_t* get() const { return p_.get(); }

 private:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t[], Free> p_;
};

}  // namespace paceline
