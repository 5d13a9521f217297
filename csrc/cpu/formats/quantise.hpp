// Quantisation of rows of floats into the blocks of element types.
#pragma once

#include <cstdint>

#include "formats/elements.hpp"

namespace paceline {

// Blocks of a row x [cols]; cols is a multiple of the type's columns, and the type one that can be written.
//
// Scales, and minima where the type has them, are searched for the least sum of importance * error^2. `importance`
// [cols] says how much the error of a column matters: the mean square of the activations that it is multiplied with;
// null: all alike. Columns whose values lie on a grid of Q4_0 or Q5_0, as checkpoints trained for it hold them in
// bfloat16, get that grid. The same bits on every machine. NaN is taken for 0, and values that no fp16 scale reaches for
// the largest that one does; importance below 1e-6 of 1 for that.
void quantise(Element type, const float* x, int64_t cols, const float* importance, uint8_t* blocks);

}  // namespace paceline
