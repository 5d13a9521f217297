// One step of a model pair: propose, run one pass of the target, sample and accept, roll back.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "model/drafter.hpp"
#include "model/target.hpp"

namespace paceline {

// What one sequence runs in a step; see paceline.types.Work.
struct Work {
  int64_t slot, position;
  std::vector<int32_t> tokens;  // committed tokens that are not in the KV cache yet, from `position` on
  bool samples = true;          // false: a chunk of a prompt that does not end it
  SamplingParams params;
  std::vector<int32_t> draft;  // tokens proposed by the engine
  DraftLimit limit;            // how far the drafter goes, if there are none
  int64_t simulated = -1;      // for benchmarks: accept that many tokens whatever is sampled; -1: no
  std::function<void(float*)> constrain;  // changes the logits [vocab] of the next token; empty: no constraint
  std::function<void(int32_t)> commit;    // tells the constraint what it was
  bool logits = false;                    // return logits
};

struct Result {
  std::vector<int32_t> sampled;     // accepted drafts and one token more; empty for a chunk that does not end a prompt
  std::vector<int32_t> drafted;
  std::vector<float> confidence;    // of each drafted token, if the drafter proposed them
  std::vector<float> logits;        // [sampled][vocab] before the constraint
};

class Decoder {
 public:
  // `drafter` may be null. All calls may come from any thread; one runs at a time.
  Decoder(std::shared_ptr<Target> target, std::unique_ptr<Drafter> drafter);

  // Throws std::invalid_argument when a work does not continue its slot or does not fit it.
  std::vector<Result> run(std::vector<Work>& works);

  int64_t length(int64_t slot) const { return target_->cache().length(slot); }
  void truncate(int64_t slot, int64_t length);
  void clear(int64_t slot);
  KvCache::Snapshot save(int64_t slot);
  void restore(int64_t slot, const KvCache::Snapshot& snapshot);
  void set_threads(int threads);

  // [hidden] the target's state at the slot's last accepted row, which a drafter continues from.
  const float* hidden(int64_t slot) const { return hidden_.floats() + slot * target_->weights().config.hidden; }
  const Target& target() const { return *target_; }
  const Drafter* drafter() const { return drafter_.get(); }

 private:
  void propose(std::vector<Work>& works, std::vector<Result>& results);
  void forward(const std::vector<Work>& works);
  void verify(Work& work, int64_t first_row, Result& result);
  int32_t sample(const Work& work, float* logits, int64_t position) const;

  std::mutex busy_;
  std::shared_ptr<Target> target_;
  std::unique_ptr<Drafter> drafter_;
  Buffer hidden_;                     // [slots][hidden]: the target's state at each slot's last accepted row
  std::vector<uint8_t> has_hidden_;   // [slots]
};

}  // namespace paceline
