// One step of a model pair: propose, run one pass of the target, sample and accept, roll back.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
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
  std::vector<int32_t> draft;             // tokens proposed by the engine
  DraftLimit limit;                       // how far the drafter goes, if there are none
  int64_t simulated = -1;                 // for benchmarks: accept that many tokens whatever is sampled; -1: no
  std::function<void(float*)> constrain;  // changes the logits [vocab] of the next token; empty: no constraint
  std::function<void(int32_t)> commit;    // tells the constraint what it was
  bool logits = false;                    // return logits
};

struct Result {
  std::vector<int32_t> sampled;  // accepted drafts and one token more; empty for a chunk that does not end a prompt
  std::vector<int32_t> drafted;
  std::vector<float> confidence;  // of each drafted token, if the drafter proposed them
  std::vector<float> logits;      // [sampled][vocab] before the constraint
};

class Decoder {
 public:
  // `drafter` may be null. All calls may come from any thread; one runs at a time. All throw std::runtime_error in a
  // process that was forked from the one that made the decoder, and when a constraint calls the decoder that calls it.
  // Slots that do not exist are std::out_of_range, but in `run`.
  Decoder(std::shared_ptr<Target> target, std::unique_ptr<Drafter> drafter);

  // Throws std::invalid_argument, before anything is run, when a work does not continue its slot or does not fit it. If
  // a constraint throws, or memory runs out, all slots and their hidden states are left as they were before the call.
  std::vector<Result> run(std::vector<Work>& works);

  int64_t length(int64_t slot) const;
  void truncate(int64_t slot, int64_t length);
  void clear(int64_t slot);
  KvCache::Snapshot save(int64_t slot) const;
  void restore(int64_t slot, const KvCache::Snapshot& snapshot);
  // For benchmarks: see Target::fill_random.
  void fill_random(int64_t slot, int64_t length);
  int threads() const;
  void set_threads(int threads);

  // [hidden] the target's state at the slot's last accepted row, which a drafter continues from. Throws
  // std::invalid_argument when there is none yet.
  Floats hidden(int64_t slot) const;
  // [rows][hidden] the target's states at the rows that the last step sampled after, in the order of its works.
  Floats states() const;
  // Tokens and logits [rows][count] of the same rows: the best ones, best first, of equal ones the first token. Throws
  // std::invalid_argument unless there are as many, all of them numbers.
  std::pair<std::vector<int32_t>, Floats> best(int64_t count);
  // Of the cache: see KvCache::numbers.
  Floats keys_values(int64_t layer, int64_t slot, int64_t first, int64_t count) const;
  // Of the last draft step: see Drafter::last_logits and last_hidden.
  std::pair<Floats, Floats> last_draft_step(int64_t row) const;
  // For benchmarks: send rows to the target's experts so that neighbours share about this many of them, 0 to 0.9.
  // Throws std::invalid_argument for other shares, and for models without experts.
  void simulate_routing(double overlap);
  // Observe what the matrices of both models are multiplied with, from now on and from zero.
  void observe();
  // What a matrix of either model was multiplied with; throws std::invalid_argument unless it is observed.
  Observer::Seen seen(const Matrix& matrix) const;
  const Target& target() const { return *target_; }  // what does not change: settings, sizes, kernels

 private:
  class Lock;
  void check(const std::vector<Work>& works) const;
  void check_draft(const Work& work) const;
  std::vector<Result> run_step(std::vector<Work>& works);
  void propose(std::vector<Work>& works, std::vector<Result>& results);
  void forward(const std::vector<Work>& works);
  void verify(Work& work, int64_t first_row, Result& result);
  void accept(const Work& work, int64_t first_row, const Result& result);
  int32_t sample(const Work& work, float* logits, int64_t position) const;

  HomeProcess home_;
  mutable std::mutex busy_;
  mutable std::atomic<std::thread::id> holder_;  // of busy_
  std::shared_ptr<Target> target_;
  std::unique_ptr<Drafter> drafter_;
  std::unique_ptr<Observer> observer_;  // null: nothing is observed
  int64_t sampled_rows_ = 0;            // of the last step
  Buffer hidden_;                       // [slots][hidden]: the target's state at each slot's last accepted row
  std::vector<uint8_t> has_hidden_;     // [slots]
};

}  // namespace paceline
