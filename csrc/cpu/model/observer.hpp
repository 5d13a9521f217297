// What matrices are multiplied with, for quantisation that knows which columns matter.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "runtime/memory.hpp"

namespace paceline {

// Sums of squares of the rows that each matrix was multiplied with. One thread calls it at a time.
class Observer {
 public:
  struct Seen {
    int64_t rows = 0;
    std::vector<double> squares;  // [cols]: the sum over rows
  };

  // Take in rows as they are packed for `matrix`: with the rounding of its activation format.
  void add(const Matrix& matrix, const ActView& act, int64_t rows);

  // Nothing, with zeros, for a matrix that was not used.
  Seen seen(const Matrix& matrix) const;

 private:
  std::map<const Matrix*, Seen> seen_;
};

}  // namespace paceline
