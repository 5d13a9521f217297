// Which experts rows are sent to when benchmarks run random weights, whose routers know nothing of text: neighbours
// share some. A function of layer and position alone, so that a row's experts do not depend on its batch.
#pragma once

#include <cstdint>

namespace paceline {

// Each of the `active` places of a row is for one expert of its own share of all, those of the same remainder. From one
// position to the next a place keeps its expert or draws again, so often that neighbours have `overlap` of their experts
// in common; by chance it is active / count, and no overlap is below that.
class SimulatedRouting {
 public:
  static constexpr int kMostPercent = 90;  // of overlap, so that the walk back in `expert` is short

  SimulatedRouting(int64_t count, int64_t active, double overlap)
      : active_(active), share_(count / active),
        renewal_(share_ > 1 ? (1 - overlap) * double(share_) / double(share_ - 1) : 0) {}

  // The expert in a place of the row at `position`.
  int64_t expert(int64_t layer, int64_t place, int64_t position) const {
    if (renewal_ <= 0) return place;
    while (position > 0 && uniform(layer, place, 2 * position) >= renewal_) --position;
    return place + active_ * int64_t(uniform(layer, place, 2 * position + 1) * double(share_));
  }

  // Add to the router's scores [count] of a row what makes it choose these experts. How it weighs them is its own.
  void favour(float* scores, int64_t layer, int64_t position) const {
    for (int64_t place = 0; place < active_; ++place) scores[expert(layer, place, position)] += 1000.0f;
  }

 private:
  // In [0, 1): splitmix64 of the three.
  static double uniform(int64_t layer, int64_t place, int64_t n) {
    uint64_t x = (uint64_t(layer) << 48) ^ (uint64_t(place) << 40) ^ uint64_t(n);
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return double((x ^ (x >> 31)) >> 11) * 0x1p-53;
  }

  int64_t active_, share_;
  double renewal_;  // chance that a place draws again
};

}  // namespace paceline
