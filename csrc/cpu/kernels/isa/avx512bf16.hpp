// AVX-512 with VNNI and BF16, whose dot product of bfloat16 rounds otherwise than fused multiply-adds.
#pragma once

#include "kernels/isa/avx512_lanes.hpp"

namespace PACELINE_NAMESPACE {

inline f32x16 dot2(f32x16 acc, u32x16 w, const uint8_t* a) {
  int32_t lane;
  std::memcpy(&lane, a, 4);
  return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(lane));
}

}  // namespace PACELINE_NAMESPACE
