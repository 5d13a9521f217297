#include "model/round.hpp"

#include <algorithm>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

namespace paceline {

Decoder::Decoder(std::shared_ptr<Target> target, std::unique_ptr<Drafter> drafter)
    : target_(std::move(target)), drafter_(std::move(drafter)), has_hidden_(size_t(target_->cache().slots()), 0) {
  hidden_.reserve(product({target_->cache().slots(), target_->weights().config.hidden, 4}));
}

// Held during a call. Constraints are called inside `run`, so the same thread may come here again: it would wait for
// itself.
class Decoder::Lock {
 public:
  explicit Lock(const Decoder& decoder) : decoder_(decoder) {
    decoder.home_.check();
    if (decoder.holder_ == std::this_thread::get_id())
      throw std::runtime_error("a constraint has called the decoder that calls it");
    decoder.busy_.lock();
    decoder.holder_ = std::this_thread::get_id();
  }
  ~Lock() {
    decoder_.holder_ = std::thread::id();
    decoder_.busy_.unlock();
  }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

 private:
  const Decoder& decoder_;
};

std::vector<Result> Decoder::run(std::vector<Work>& works) {
  const Lock lock(*this);
  check(works);
  try {
    return run_step(works);
  } catch (...) {  // the rows are in the cache, perhaps; nothing else has changed
    for (const Work& work : works)
      if (target_->cache().length(work.slot) > work.position) target_->cache().truncate(work.slot, work.position);
    throw;
  }
}

void Decoder::check(const std::vector<Work>& works) const {
  const KvCache& cache = target_->cache();
  const auto refuse = [](const Work& work, const std::string& what) {
    throw std::invalid_argument("slot " + std::to_string(work.slot) + ": " + what);
  };
  const auto check_token = [&](const Work& work, int32_t token) {
    if (token < 0 || token >= target_->weights().config.vocab) refuse(work, "no token " + std::to_string(token));
  };
  std::vector<uint8_t> taken(size_t(cache.slots()), 0);
  for (const Work& work : works) {
    if (work.slot < 0 || work.slot >= cache.slots()) refuse(work, "there are " + std::to_string(cache.slots()));
    if (taken[size_t(work.slot)]++) refuse(work, "two works of one step");
    if (work.position != cache.length(work.slot))
      refuse(work, "row at position " + std::to_string(work.position) + " where it continues at " +
                       std::to_string(cache.length(work.slot)));
    if (work.tokens.empty()) refuse(work, "a work without tokens");
    const int64_t rows = int64_t(work.tokens.size() + work.draft.size()), most = cache.max_rows();
    if (rows > most || work.limit.length < 0 || work.limit.length > most - rows)
      refuse(work, "more rows than the " + std::to_string(most) + " of a pass");
    if (rows + work.limit.length > cache.context() - work.position) refuse(work, "position past the context");
    for (int32_t token : work.tokens) check_token(work, token);
    for (int32_t token : work.draft) check_token(work, token);
    if (work.limit.length || !work.limit.floors.empty()) check_draft(work);
  }
}

void Decoder::check_draft(const Work& work) const {
  if (!drafter_) throw std::invalid_argument("no drafter is loaded");
  if (!work.draft.empty()) throw std::invalid_argument("a draft with tokens and a length");
  if (work.tokens.size() != 1 || work.position < 1 || !has_hidden_[size_t(work.slot)])
    throw std::invalid_argument("slot " + std::to_string(work.slot) + " has no sampled token to draft after");
  const auto& [_, floors, acceptance] = work.limit;
  if (!floors.empty() && (int64_t(floors.size()) != work.limit.length || acceptance.size() != size_t(kConfidenceBins)))
    throw std::invalid_argument("a draft needs a floor for each token, and acceptance by confidence");
}

// Slots are extended by the pass, but what a step means for them is decided for all of them before any is changed.
std::vector<Result> Decoder::run_step(std::vector<Work>& works) {
  std::vector<Result> results(works.size());
  std::vector<int64_t> first_rows;  // of the target's output, which holds the rows that are sampled from
  propose(works, results);
  forward(works);
  int64_t row = 0;
  for (size_t i = 0; i < works.size(); ++i) {
    first_rows.push_back(row);
    if (!works[i].samples) continue;
    verify(works[i], row, results[i]);
    row += int64_t(results[i].drafted.size()) + 1;
  }
  for (size_t i = 0; i < works.size(); ++i)
    if (works[i].samples) accept(works[i], first_rows[i], results[i]);
  return results;
}

// All sequences that leave their draft to the drafter are drafted for at once.
void Decoder::propose(std::vector<Work>& works, std::vector<Result>& results) {
  std::vector<DraftRequest> requests;
  std::vector<size_t> owners;
  const int64_t hidden = target_->weights().config.hidden;
  for (size_t i = 0; i < works.size(); ++i) {
    const Work& work = works[i];
    if (!work.limit.length) continue;
    requests.push_back(
        {work.slot, work.position, work.tokens[0], hidden_.floats() + work.slot * hidden, work.params, work.limit});
    owners.push_back(i);
  }
  if (requests.empty()) return;
  std::vector<DraftResult> drafts = drafter_->draft(requests);
  for (size_t r = 0; r < owners.size(); ++r) {
    works[owners[r]].draft = std::move(drafts[r].tokens);
    results[owners[r]].confidence = std::move(drafts[r].confidence);
  }
}

void Decoder::forward(const std::vector<Work>& works) {
  std::vector<int64_t> slots, positions;
  std::vector<int32_t> tokens;
  std::vector<uint8_t> sampled;
  for (const Work& work : works) {
    const size_t committed = work.tokens.size(), rows = committed + work.draft.size();
    slots.insert(slots.end(), rows, work.slot);
    for (size_t i = 0; i < rows; ++i) positions.push_back(work.position + int64_t(i));
    tokens.insert(tokens.end(), work.tokens.begin(), work.tokens.end());
    tokens.insert(tokens.end(), work.draft.begin(), work.draft.end());
    for (size_t i = 0; i < rows; ++i) sampled.push_back(work.samples && i + 1 >= committed);
  }
  sampled_rows_ =
      target_->forward(slots.data(), positions.data(), tokens.data(), sampled.data(), int64_t(tokens.size()));
}

// Sample row after row until a token differs from the draft.
void Decoder::verify(Work& work, int64_t first_row, Result& result) {
  const int64_t vocab = target_->weights().config.vocab;
  const int64_t next = work.position + int64_t(work.tokens.size()), drafted = int64_t(work.draft.size());
  if (work.logits) result.logits.reserve(size_t((drafted + 1) * vocab));
  for (int64_t i = 0; i <= drafted; ++i) {
    float* logits = target_->logits() + (first_row + i) * target_->logits_ld();
    if (work.logits) result.logits.insert(result.logits.end(), logits, logits + vocab);
    if (work.constrain) work.constrain(logits);
    int32_t token = sample(work, logits, next + i);
    if (work.simulated >= 0 && i < drafted) {
      const int32_t proposed = work.draft[size_t(i)];
      token = i < work.simulated ? proposed : int32_t(proposed == 0);
    }
    if (work.commit) work.commit(token);
    result.sampled.push_back(token);
    if (i == drafted || token != work.draft[size_t(i)]) break;
  }
  result.drafted = std::move(work.draft);
  if (!work.limit.length) result.confidence.clear();
}

// Forget the rows after the last accepted one, and keep its hidden state.
void Decoder::accept(const Work& work, int64_t first_row, const Result& result) {
  const int64_t next = work.position + int64_t(work.tokens.size()), hidden = target_->weights().config.hidden;
  const int64_t accepted = int64_t(result.sampled.size()) - 1;
  if (accepted < int64_t(result.drafted.size())) target_->cache().truncate(work.slot, next + accepted);
  std::copy_n(target_->hidden() + (first_row + accepted) * hidden, hidden, hidden_.floats() + work.slot * hidden);
  has_hidden_[size_t(work.slot)] = 1;
}

int32_t Decoder::sample(const Work& work, float* logits, int64_t position) const {
  const Kernels& kernels = target_->kernels();
  const int64_t vocab = target_->weights().config.vocab;
  if (work.params.temperature == 0) return int32_t(kernels.arg_max(logits, vocab, nullptr));
  return kernels.sample({logits, nullptr, vocab}, work.params, uint32_t(position), false).token;
}

int64_t Decoder::length(int64_t slot) const {
  const Lock lock(*this);
  return target_->cache().length(slot);
}

void Decoder::truncate(int64_t slot, int64_t length) {
  const Lock lock(*this);
  target_->cache().truncate(slot, length);
}

void Decoder::clear(int64_t slot) {
  const Lock lock(*this);
  target_->cache().clear(slot);
  has_hidden_[size_t(slot)] = 0;
}

KvCache::Snapshot Decoder::save(int64_t slot) const {
  const Lock lock(*this);
  return target_->cache().save(slot);
}

void Decoder::restore(int64_t slot, const KvCache::Snapshot& snapshot) {
  const Lock lock(*this);
  target_->cache().restore(slot, snapshot);
}

int Decoder::threads() const {
  const Lock lock(*this);
  return target_->threads();
}

void Decoder::set_threads(int threads) {
  const Lock lock(*this);
  target_->set_threads(threads);
}

Floats Decoder::hidden(int64_t slot) const {
  const Lock lock(*this);
  target_->cache().check_slot(slot);
  if (!has_hidden_[size_t(slot)])
    throw std::invalid_argument("slot " + std::to_string(slot) + " has no hidden state: nothing was sampled in it");
  const int64_t size = target_->weights().config.hidden;
  return Floats(hidden_.floats() + slot * size, hidden_.floats() + (slot + 1) * size);
}

Floats Decoder::states() const {
  const Lock lock(*this);
  return Floats(target_->hidden(), target_->hidden() + sampled_rows_ * target_->weights().config.hidden);
}

// The largest of n numbers; NaNs are passed over.
static float largest(const float* x, int64_t n) {
  constexpr int lanes = 16;  // independent, so that compilers use vectors
  float tops[lanes];
  std::fill_n(tops, lanes, -std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int lane = 0; lane < lanes; ++lane) tops[lane] = x[i + lane] > tops[lane] ? x[i + lane] : tops[lane];
  for (; i < n; ++i) tops[0] = x[i] > tops[0] ? x[i] : tops[0];
  return *std::max_element(tops, tops + lanes);
}

// Of one row. The maxima of disjoint blocks are logits, too, so the best of all are no worse than the best of them: few
// are left to sort. Returns whether there were as many numbers.
static bool best_of(const float* logits, int64_t vocab, int64_t count, int32_t* ids, float* values) {
  constexpr int64_t blocks = 1024;
  const int64_t width = std::max(int64_t(1), vocab / std::max(blocks, count));
  std::vector<float> maxima;
  for (int64_t first = 0; first < vocab; first += width)
    maxima.push_back(largest(logits + first, std::min(width, vocab - first)));
  std::vector<float> sorted = maxima;
  std::nth_element(sorted.begin(), sorted.begin() + (count - 1), sorted.end(), std::greater<>());
  const float least = sorted[size_t(count - 1)];
  std::vector<int32_t> found;
  for (size_t block = 0; block < maxima.size(); ++block) {
    if (maxima[block] < least) continue;
    const int64_t first = int64_t(block) * width;
    for (int64_t t = first; t < std::min(first + width, vocab); ++t)
      if (logits[t] >= least) found.push_back(int32_t(t));
  }
  if (int64_t(found.size()) < count) return false;
  std::partial_sort(found.begin(), found.begin() + count, found.end(),
                    [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
  for (int64_t i = 0; i < count; ++i) values[i] = logits[ids[i] = found[size_t(i)]];
  return true;
}

std::pair<std::vector<int32_t>, Floats> Decoder::best(int64_t count) {
  const Lock lock(*this);
  const int64_t vocab = target_->weights().config.vocab;
  const size_t size = product({sampled_rows_, check_range("count", count, 1, vocab)});
  std::pair<std::vector<int32_t>, Floats> out;
  out.first.resize(size);
  out.second.resize(size);
  std::atomic<bool> whole = true;
  target_->pool().run([&](const Worker& w) {
    w.for_share(sampled_rows_, [&](int64_t row) {
      const float* logits = target_->logits() + row * target_->logits_ld();
      if (!best_of(logits, vocab, count, out.first.data() + row * count, out.second.data() + row * count))
        whole = false;
    });
  });
  if (!whole) throw std::invalid_argument("the model's logits are no numbers; its weights are damaged");
  return out;
}

Floats Decoder::keys_values(int64_t layer, int64_t slot, int64_t first, int64_t count) const {
  const Lock lock(*this);
  return target_->cache().numbers(layer, slot, first, count);
}

std::pair<Floats, Floats> Decoder::last_draft_step(int64_t row) const {
  const Lock lock(*this);
  if (!drafter_) throw std::invalid_argument("no drafter is loaded");
  return {drafter_->last_logits(row), drafter_->last_hidden(row)};
}

void Decoder::fill_random(int64_t slot, int64_t length) {
  const Lock lock(*this);
  target_->cache().check_slot(slot);
  target_->fill_random(slot, length);
}

void Decoder::simulate_routing(double overlap) {
  const Lock lock(*this);
  const ModelConfig& config = target_->weights().config;
  if (!config.experts) throw std::invalid_argument("this model has no experts");
  constexpr int most = SimulatedRouting::kMostPercent;
  if (!(overlap >= 0 && overlap <= most / 100.0))
    throw std::invalid_argument("neighbours can share from 0 to " + std::to_string(most) + " % of their experts");
  target_->simulate_routing({config.experts, config.active_experts, overlap});
}

void Decoder::observe() {
  const Lock lock(*this);
  observer_ = std::make_unique<Observer>();
  target_->set_observer(observer_.get());
  if (drafter_) drafter_->set_observer(observer_.get());
}

Observer::Seen Decoder::seen(const Matrix& matrix) const {
  const Lock lock(*this);
  if (!observer_) throw std::invalid_argument("nothing is observed");
  return observer_->seen(matrix);
}

}  // namespace paceline
