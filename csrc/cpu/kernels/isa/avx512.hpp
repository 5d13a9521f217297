// AVX-512 with VNNI: products of bfloat16 are floats', as with every set but avx512bf16.
#pragma once

#include "kernels/isa/avx512_lanes.hpp"
#include "kernels/isa/portable.hpp"

namespace PACELINE_NAMESPACE { using portable::dot2; }  // namespace PACELINE_NAMESPACE
