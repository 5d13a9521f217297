// Sampling by the Gumbel-max trick: the largest of logit / temperature + noise among the tokens that top-k, top-p and
// min-p allow.
//
// Compiled once for each kind of registers, in a separate namespace and without contraction. Only single additions,
// multiplications, divisions and comparisons of floats are used, and probabilities are summed as integers, so that every
// instruction set samples the same token from the same logits, and so does the NumPy reference, decode/sampler.py.
// Tokens rank by logit, of equals the lowest id first; the allowed ones are a prefix of that ranking.
#include "kernels/sampler.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "kernels/vec.hpp"

namespace PACELINE_NAMESPACE {
namespace {

using paceline::Logits;
using paceline::Sampled;
using paceline::SamplingParams;

constexpr float kLowest = -3e38f;         // stands for NaN and minus infinity too; -kLowest stands for infinity
constexpr float kTopWeight = 1073741824;  // 2^30, weight of the most likely token
constexpr float kDeepest = 21.0f;         // e^-21 is less than one unit

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): sixteen counters
// (counter, position, 0, 0) under the key `seed`, to four words each.
inline void philox(u32x16 counter, const SamplingParams& params, uint32_t position, u32x16 word[4]) {
  u32x16 c0 = counter, c1 = fill<u32x16>(position), c2 = fill<u32x16>(0), c3 = fill<u32x16>(0);
  uint32_t k0 = uint32_t(params.seed), k1 = uint32_t(params.seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
    u32x16 low0, high0, low1, high1;
    multiply(c0, 0xd2511f53u, low0, high0);
    multiply(c2, 0xcd9e8d57u, low1, high1);
    c0 = (high1 ^ c1) ^ k0;
    c1 = low1;
    c2 = (high0 ^ c3) ^ k1;
    c3 = low0;
  }
  word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
}

// log(2^e (1 + t)) for t in [-0.293, 0.415] (Cephes' logf).
inline f32x16 log_of(f32x16 t, f32x16 e) {
  constexpr float p[] = {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                         -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
  const f32x16 z = t * t;
  f32x16 y = splat(7.0376836292e-2f);
  for (float c : p) y = y * t + splat(c);
  y = y * t * z;
  y = y + e * splat(-2.12194440e-4f);
  y = y - z * splat(0.5f);
  return (t + y) + e * splat(0.693359375f);
}

// x = 2^e (1 + t) with t in [-0.293, 0.415], for normal positive x.
inline void split(f32x16 x, f32x16& t, f32x16& e) {
  const u32x16 u = bits<u32x16>(x);
  const f32x16 m = bits<f32x16>((u & 0x007fffffu) | 0x3f000000u);  // in [0.5, 1)
  e = convert<f32x16>(convert<i32x16>(u >> 23) - 126);
  const f32x16 root = splat(0.70710678f);
  t = where_greater(root, m, m + m, m) - splat(1.0f);
  e = where_greater(root, m, e - splat(1.0f), e);
}

// In (0, 1) from 31 random bits, dense near 0, which gives the largest noise.
inline f32x16 uniform(u32x16 random) {
  const f32x16 u = (convert<f32x16>(convert<i32x16>(random >> 1)) + splat(0.5f)) * splat(4.656612873077393e-10f);
  const f32x16 most = splat(0.99999994f);
  return where_greater(u, most, most, u);
}

// -log(-log(1 - u)); it is at most -log(u).
inline f32x16 gumbel(f32x16 u) {
  f32x16 t, e;
  split(splat(1.0f) - u, t, e);
  const f32x16 near = splat(0.25f), zero = splat(0.0f);
  t = where_greater(near, u, zero - u, t);
  e = where_greater(near, u, zero, e);
  split(zero - log_of(t, e), t, e);
  return zero - log_of(t, e);
}

inline float clean(float x) { return x > kLowest ? std::min(x, -kLowest) : kLowest; }

constexpr float kNothing = -std::numeric_limits<float>::infinity();  // past the end of a row: no weight at all

// Sixteen logits from i on, cleaned.
inline f32x16 values(const Logits& logits, int64_t i) {
  if (i + 16 <= logits.n) {
    const f32x16 lowest = splat(kLowest), highest = splat(-kLowest);
    f32x16 v = load<f32x16>(logits.x + i);
    v = where_greater(v, lowest, v, lowest);
    return where_greater(v, highest, highest, v);
  }
  float t[16];
  for (int64_t j = 0; j < 16; ++j) t[j] = i + j < logits.n ? clean(logits.x[i + j]) : kNothing;
  return load<f32x16>(t);
}

inline int32_t id_at(const Logits& logits, int64_t i) { return logits.ids ? logits.ids[i] : int32_t(i); }

struct Entry {
  float x;
  int32_t id;
};

inline bool ahead(const Entry& a, const Entry& b) { return a.x != b.x ? a.x > b.x : a.id < b.id; }

// A row of logits with the maxima of its stretches.
class LogitsRow {
 public:
  LogitsRow(const Logits& logits, const SamplingParams& params)
      : stretch_(logits.n > 65536 ? 128 : 16), logits_(logits), params_(params) {
    for (int64_t i = 0; i < logits.n; i += stretch_) {
      f32x16 best = values(logits, i);
      for (int64_t j = i + 16; j < std::min(i + stretch_, logits.n); j += 16) best = max(values(logits, j), best);
      maxima_.push_back(max_lane(best));
    }
    top_ = *std::max_element(maxima_.begin(), maxima_.end());
  }

  // How far below the best, in nats.
  f32x16 depth(f32x16 x) const { return (x - splat(top_)) / splat(params_.temperature); }
  float depth(float x) const { return (x - top_) / params_.temperature; }
  i32x16 weight(f32x16 x) const { return convert<i32x16>(exp<false>(depth(x)) * splat(kTopWeight)); }

  // Call f(i, logits i..i+15) for stretches whose maximum reaches `least`.
  template <class F>
  void scan(float least, F f) const {
    for (size_t s = 0; s < maxima_.size(); ++s) {
      if (!(maxima_[s] >= least)) continue;
      const int64_t first = int64_t(s) * stretch_, last = std::min(first + stretch_, logits_.n);
      for (int64_t i = first; i < last; i += 16) f(i, values(logits_, i));
    }
  }

  // Entries for which `take(x)` holds, from stretches whose maximum reaches `least`.
  template <class F>
  std::vector<Entry> gather(float least, F take) const {
    std::vector<Entry> entries;
    scan(least, [&](int64_t i, f32x16 v) {
      float x[16];
      store(x, v);
      for (int64_t j = 0; j < std::min<int64_t>(16, logits_.n - i); ++j)
        if (take(x[j]) && id_at(logits_, i + j) >= 0) entries.push_back({x[j], id_at(logits_, i + j)});
    });
    return entries;
  }

  // The best k.
  std::vector<Entry> best(int64_t k) const {
    float least = kLowest;
    if (int64_t(maxima_.size()) >= k) {  // k stretches reach this, so k entries do
      std::vector<float> order = maxima_;
      std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), std::greater<float>());
      least = order[size_t(k - 1)];
    }
    std::vector<Entry> entries = gather(least, [&](float x) { return x >= least; });
    if (int64_t(entries.size()) > k) {
      std::nth_element(entries.begin(), entries.begin() + (k - 1), entries.end(), ahead);
      entries.resize(size_t(k));
    }
    return entries;
  }

  // Logits at which weights begin to be less than one unit, or a little lower.
  float floor() const { return top_ - kDeepest * params_.temperature * 1.0001f; }

  // The last entry of the smallest prefix of the ranking that holds top-p of the weight, over the whole row.
  Entry nucleus_end() const {
    constexpr int kBins = 64 * int(kDeepest) + 64;            // of 1/64 nat
    std::vector<int64_t> part(4 * kBins, 0), mass(kBins, 0);  // in parts: neighbours often fall into one bin
    const auto bin_of = [&](f32x16 x) {
      const f32x16 bin = (splat(0.0f) - depth(x)) * splat(64.0f), last = splat(float(kBins - 1));
      return convert<i32x16>(where_greater(bin, last, last, bin));
    };
    scan(floor(), [&](int64_t, f32x16 v) {
      int32_t bin[16], weight_of[16];
      store(bin, bin_of(v));
      store(weight_of, weight(v));
      for (int j = 0; j < 16; ++j) part[size_t(j % 4 * kBins + bin[j])] += weight_of[j];
    });
    int64_t total = 0, sum = 0;
    for (int bin = 0; bin < kBins; ++bin) {
      for (int i = 0; i < 4; ++i) mass[size_t(bin)] += part[size_t(i * kBins + bin)];
      total += mass[size_t(bin)];
    }
    const double enough = params_.top_p * double(total);
    int bin = 0;
    while (double(sum + mass[size_t(bin)]) < enough) sum += mass[size_t(bin++)];
    std::vector<Entry> entries;
    scan(floor(), [&](int64_t i, f32x16 v) {
      int32_t bins[16];
      float x[16];
      store(bins, bin_of(v));
      store(x, v);
      for (int64_t j = 0; j < std::min<int64_t>(16, logits_.n - i); ++j)
        if (bins[j] == bin && id_at(logits_, i + j) >= 0) entries.push_back({x[j], id_at(logits_, i + j)});
    });
    if (entries.empty()) return {kLowest, std::numeric_limits<int32_t>::max()};
    std::sort(entries.begin(), entries.end(), ahead);
    return *prefix_end(entries, sum, enough);
  }

  // Cut a list, sorted by rank, to the smallest prefix that holds top-p of its weight.
  void cut_nucleus(std::vector<Entry>& entries) const {
    if (entries.empty()) return;
    std::sort(entries.begin(), entries.end(), ahead);
    int64_t total = 0;
    for (const Entry& e : entries) total += weight_of(e.x);
    entries.erase(prefix_end(entries, 0, params_.top_p * double(total)) + 1, entries.end());
  }

  int32_t weight_of(float x) const {
    int32_t w[16];
    store(w, weight(splat(x)));
    return w[0];
  }

  float least_depth() const { return -params_.min_p_depth; }  // by min-p
  bool near_enough(float x) const { return depth(x) >= least_depth(); }

  float top() const { return top_; }

  // A number that none of the 64 logits from i on exceeds.
  float highest(int64_t i) const {
    const auto begin = maxima_.begin() + i / stretch_;
    return *std::max_element(begin, std::min(begin + std::max<int64_t>(1, 64 / stretch_), maxima_.end()));
  }

 private:
  std::vector<Entry>::const_iterator prefix_end(const std::vector<Entry>& entries, int64_t sum, double enough) const {
    auto e = entries.begin();
    for (sum += weight_of(e->x); double(sum) < enough && e + 1 != entries.end(); sum += weight_of(e->x)) ++e;
    return e;
  }

  const int64_t stretch_;  // logits with a common maximum, so that most can be skipped
  const Logits& logits_;
  const SamplingParams& params_;
  std::vector<float> maxima_;  // [stretch]
  float top_ = kLowest;
};

// The allowed tokens: a list if there is one, else those of the row that rank no lower than `last`.
struct Choice {
  bool listed = false;
  std::vector<Entry> list;
  Entry last{kLowest, std::numeric_limits<int32_t>::max()};
};

Choice choose(const LogitsRow& row, const Logits& logits, const SamplingParams& params) {
  Choice choice;
  if (params.top_k > 0 && params.top_k < logits.n) {
    choice.listed = true;
    choice.list = row.best(params.top_k);
    if (params.top_p < 1) row.cut_nucleus(choice.list);
  } else if (params.top_p < 1) {
    choice.last = row.nucleus_end();
  }
  if (!choice.listed && logits.ids) {  // ids in any order: make a list
    choice.listed = true;
    choice.list = row.gather(choice.last.x, [&](float x) { return x >= choice.last.x; });
    std::erase_if(choice.list, [&](const Entry& e) { return ahead(choice.last, e); });
  }
  std::erase_if(choice.list, [&](const Entry& e) { return !row.near_enough(e.x); });
  return choice;
}

// Scores of up to sixteen entries, and the best so far.
struct Best {
  float score = -std::numeric_limits<float>::infinity();
  int32_t id = std::numeric_limits<int32_t>::max();

  void offer(float s, int32_t i) {
    if (s > score || (s == score && i < id)) score = s, id = i;
  }
};

Entry sample_list(const LogitsRow& row, const std::vector<Entry>& list, const SamplingParams& params,
                  uint32_t position) {
  Best best;
  float x_of_best = row.top();
  for (size_t at = 0; at < list.size(); at += 16) {
    float x[16];
    uint32_t id[16];
    const size_t count = std::min<size_t>(16, list.size() - at);
    for (size_t j = 0; j < 16; ++j)
      x[j] = list[at + std::min(j, count - 1)].x, id[j] = uint32_t(list[at + std::min(j, count - 1)].id);
    const u32x16 ids = load<u32x16>(id);
    u32x16 word[4];
    philox(((ids >> 6) << 4) + (ids & 15), params, position, word);
    float score[4][16];
    for (int w = 0; w < 4; ++w) store(score[w], row.depth(load<f32x16>(x)) + gumbel(uniform(word[w])));
    for (size_t j = 0; j < count; ++j) {
      const Best before = best;
      best.offer(score[id[j] >> 4 & 3][j], int32_t(id[j]));
      if (best.id != before.id) x_of_best = x[j];
    }
  }
  return {x_of_best, best.id};
}

// The same over a whole row. Most stretches cannot hold the best, or would need more noise than is there: of noise
// g <= -log(u), one that lifts a logit from `depth` above `best` has u <= e^(depth - best).
Entry sample_row(const LogitsRow& row, const Logits& logits, const Entry& last, const SamplingParams& params,
                 uint32_t position) {
  Best best;
  const f32x16 none = splat(kNothing);
  for (int64_t i = 0; i < logits.n; i += 64) {
    const float highest = row.highest(i);
    if (highest < last.x || !row.near_enough(highest)) continue;
    uint32_t counter[16];
    for (int64_t j = 0; j < 16; ++j) counter[j] = uint32_t(i / 4 + j);
    u32x16 word[4];
    philox(load<u32x16>(counter), params, position, word);
    f32x16 u[4], least = splat(1.0f);
    for (int w = 0; w < 4; ++w) {
      u[w] = uniform(word[w]);
      least = where_greater(least, u[w], u[w], least);
    }
    const float enough = std::exp(row.depth(highest) - best.score + 0.01f);  // 0.01: more than all roundings
    if (-max_lane(splat(0.0f) - least) > enough) continue;
    for (int64_t w = 0; w < 4 && i + 16 * w < logits.n; ++w) {
      const int64_t first = i + 16 * w;
      const f32x16 x = values(logits, first), depth = row.depth(x);
      f32x16 score = depth + gumbel(u[w]);
      score = where_greater(splat(last.x), x, none, score);
      score = where_greater(splat(-params.min_p_depth), depth, none, score);
      if (max_lane(score) < best.score) continue;
      float scores[16], xs[16];
      store(scores, score);
      store(xs, x);
      for (int64_t j = 0; j < std::min<int64_t>(16, logits.n - first); ++j)
        if (xs[j] != last.x || first + j <= last.id) best.offer(scores[j], int32_t(first + j));
    }
  }
  if (best.id >= logits.n) best.id = 0;  // no score is a number: not with cleaned logits
  return {clean(logits.x[best.id]), best.id};
}

// The weight of all tokens that can be sampled, without a list of them where there is none.
int64_t weight_of_all(const LogitsRow& row, const Logits& logits, const Choice& choice) {
  int64_t total = 0;
  for (const Entry& e : choice.list) total += row.weight_of(e.x);
  if (choice.listed) return total;
  row.scan(std::max(choice.last.x, row.floor()), [&](int64_t i, f32x16 v) {
    float x[16], depth[16];
    int32_t weights[16];
    store(x, v);
    store(depth, row.depth(v));
    store(weights, row.weight(v));
    for (int64_t j = 0; j < std::min<int64_t>(16, logits.n - i); ++j)
      if (depth[j] >= row.least_depth() && !ahead(choice.last, {x[j], int32_t(i + j)})) total += weights[j];
  });
  return total;
}

}  // namespace

Sampled sample(const Logits& logits, const SamplingParams& params, uint32_t position, bool probability) {
  const LogitsRow row(logits, params);
  const Choice choice = choose(row, logits, params);
  const Entry best = choice.listed ? sample_list(row, choice.list, params, position)
                                   : sample_row(row, logits, choice.last, params, position);
  if (!probability) return {best.id, 0.0f};
  const int64_t total = weight_of_all(row, logits, choice);
  return {best.id, total > 0 ? float(double(row.weight_of(best.x)) / double(total)) : 0.0f};
}

}  // namespace PACELINE_NAMESPACE
