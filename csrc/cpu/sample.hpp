// How a token is drawn from a row of logits.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

namespace paceline {

// Settings of a draw. The noise is a pure function of seed, position and token.
struct Draw {
  float temperature = 0;  // 0: the largest logit
  int64_t top_k = 0;      // 0: off
  double top_p = 1;       // 1: off
  float gap = std::numeric_limits<float>::infinity();  // min-p as the largest (max - logit) / temperature; infinite: off
  uint64_t seed = 0;
};

// Logits [n] and the tokens they belong to, their indices if `ids` is null. Entries of negative ids must be at -3e38.
struct Logits {
  const float* x;
  const int32_t* ids;
  int64_t n;
};

struct Drawn {
  int32_t token;
  float probability;  // among the tokens that could be drawn
};

struct Sampler {
  // The token at `position`. `probability` is computed only where wanted, else 0.
  Drawn (*draw)(const Logits& logits, const Draw& draw, uint32_t position, bool probability);
};

}  // namespace paceline
