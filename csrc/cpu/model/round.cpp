#include "model/round.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace paceline {

Decoder::Decoder(std::shared_ptr<Target> target, std::unique_ptr<Drafter> drafter)
    : target_(std::move(target)), drafter_(std::move(drafter)), has_hidden_(size_t(target_->cache().slots()), 0) {
  hidden_.reserve(size_t(target_->cache().slots() * target_->weights().config.hidden) * 4);
}

std::vector<Result> Decoder::run(std::vector<Work>& works) {
  const std::lock_guard lock(busy_);
  std::vector<Result> results(works.size());
  propose(works, results);
  forward(works);
  int64_t row = 0;  // of the target's output, which holds the rows that are sampled from
  for (size_t i = 0; i < works.size(); ++i) {
    if (!works[i].samples) continue;
    verify(works[i], row, results[i]);
    row += int64_t(results[i].drafted.size()) + 1;
  }
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
    if (!drafter_) throw std::invalid_argument("no drafter is loaded");
    if (work.tokens.size() != 1 || work.slot < 0 || work.slot >= target_->cache().slots() || !has_hidden_[size_t(work.slot)])
      throw std::invalid_argument("slot " + std::to_string(work.slot) + " has no sampled token to draft after");
    requests.push_back({work.slot, work.position, work.tokens[0], hidden_.floats() + work.slot * hidden, work.params,
                        work.limit});
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
  std::vector<int32_t> slots, positions, tokens;
  std::vector<uint8_t> sampled;
  for (const Work& work : works) {
    const size_t committed = work.tokens.size(), rows = committed + work.draft.size();
    if (!committed) throw std::invalid_argument("a work without tokens");
    slots.insert(slots.end(), rows, int32_t(work.slot));
    for (size_t i = 0; i < rows; ++i) positions.push_back(int32_t(work.position + int64_t(i)));
    tokens.insert(tokens.end(), work.tokens.begin(), work.tokens.end());
    tokens.insert(tokens.end(), work.draft.begin(), work.draft.end());
    for (size_t i = 0; i < rows; ++i) sampled.push_back(work.samples && i + 1 >= committed);
  }
  target_->forward(slots.data(), positions.data(), tokens.data(), sampled.data(), int64_t(tokens.size()));
}

// Sample row after row until a token differs from the draft; forget the rows after it.
void Decoder::verify(Work& work, int64_t first_row, Result& result) {
  const int64_t vocab = target_->weights().config.vocab, hidden = target_->weights().config.hidden;
  const int64_t next = work.position + int64_t(work.tokens.size()), drafted = int64_t(work.draft.size());
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
  const int64_t accepted = int64_t(result.sampled.size()) - 1;
  if (accepted < drafted) target_->cache().truncate(work.slot, next + accepted);
  std::copy_n(target_->hidden() + (first_row + accepted) * hidden, hidden, hidden_.floats() + work.slot * hidden);
  has_hidden_[size_t(work.slot)] = 1;
  result.drafted = std::move(work.draft);
  if (!work.limit.length) result.confidence.clear();
}

int32_t Decoder::sample(const Work& work, float* logits, int64_t position) const {
  const Kernels& kernels = target_->kernels();
  const int64_t vocab = target_->weights().config.vocab;
  if (work.params.temperature == 0) return int32_t(kernels.arg_max(logits, vocab, nullptr));
  return kernels.sample({logits, nullptr, vocab}, work.params, uint32_t(position), false).token;
}

void Decoder::truncate(int64_t slot, int64_t length) {
  const std::lock_guard lock(busy_);
  target_->cache().truncate(slot, length);
}

void Decoder::clear(int64_t slot) {
  const std::lock_guard lock(busy_);
  target_->cache().clear(slot);
  has_hidden_[size_t(slot)] = 0;
}

KvCache::Snapshot Decoder::save(int64_t slot) {
  const std::lock_guard lock(busy_);
  return target_->cache().save(slot);
}

void Decoder::restore(int64_t slot, const KvCache::Snapshot& snapshot) {
  const std::lock_guard lock(busy_);
  target_->cache().restore(slot, snapshot);
}

void Decoder::set_threads(int threads) {
  const std::lock_guard lock(busy_);
  target_->set_threads(threads);
}

}  // namespace paceline
