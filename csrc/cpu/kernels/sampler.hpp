// How a token is sampled from a row of logits.
#pragma once

#include <cstdint>
#include <limits>

namespace paceline {

// The noise is a pure function of seed, position and token.
struct SamplingParams {
  float temperature = 0;  // 0: the largest logit
  int64_t top_k = 0;      // 0: off
  double top_p = 1;       // 1: off
  // min-p as the largest (max - logit) / temperature; infinite: off
  float min_p_depth = std::numeric_limits<float>::infinity();
  uint64_t seed = 0;
};

// Logits [n] and the tokens they belong to, their indices if `ids` is null. Entries of negative ids must be at -3e38.
struct Logits {
  const float* x;
  const int32_t* ids;
  int64_t n;
};

struct Sampled {
  int32_t token;
  float probability;  // among the tokens that can be sampled
};

}  // namespace paceline
