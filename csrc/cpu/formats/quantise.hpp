// Quantisation of rows of floats into the blocks of element types.
#pragma once

#include <cstdint>

#include "formats/elements.hpp"

namespace paceline {

// Blocks of a row x [cols]; cols is a multiple of the type's columns, and the type one that can be written.
void quantise(Element type, const float* x, int64_t cols, uint8_t* blocks);

}  // namespace paceline
