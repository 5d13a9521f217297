// The tokens of a dense draft head that are worth computing. What is left out cannot be drafted, which costs speed at
// most: the target has the last word.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <vector>

#include "formats/formats.hpp"

namespace paceline {

// The first tokens, which are the frequent ones in a vocabulary in the order of its merges, and those of recent texts:
// whole panels of both, because a head is read by panels.
class Shortlist {
 public:
  struct Run {
    int64_t panel, panels;  // neighbours in the head
    int64_t column;         // of their first token among all that are listed
  };

  // So many tokens at the beginning, and so many panels of others at most.
  Shortlist(int64_t vocab, int64_t frequent, int64_t recent)
      : vocab_(vocab), first_(std::min(panels_of(frequent), panels_of(vocab))), recent_(size_t(recent)),
        state_(size_t(panels_of(vocab)), kAbsent) {
    std::fill_n(state_.begin(), first_, kListed);
  }

  // A text has this token. Beyond the limit, a panel leaves that was not seen again for long (second chance).
  void see(int32_t token) {
    if (token < 0 || token >= vocab_ || token / kPanel < first_) return;
    const int32_t panel = token / int32_t(kPanel);
    if (state_[size_t(panel)] != kAbsent) {
      state_[size_t(panel)] = kAgain;
      return;
    }
    state_[size_t(panel)] = kListed;
    queue_.push_back(panel);
    changed_ = true;
    while (queue_.size() > recent_) {
      const int32_t oldest = queue_.front();
      queue_.pop_front();
      uint8_t& state = state_[size_t(oldest)];
      if (state == kAgain) state = kListed, queue_.push_back(oldest);
      else state = kAbsent;
    }
  }

  // To be called after tokens were seen, and before these two.
  void refresh() {
    if (!changed_) return;
    changed_ = false;
    runs_.clear();
    tokens_.clear();
    for (int64_t panel = 0; panel < int64_t(state_.size()); ++panel) {
      if (state_[size_t(panel)] == kAbsent) continue;
      const bool continues =
          !runs_.empty() && runs_.back().panels < kMostPanels && runs_.back().panel + runs_.back().panels == panel;
      if (continues) ++runs_.back().panels;
      else runs_.push_back({panel, 1, int64_t(tokens_.size())});
      for (int64_t token = panel * kPanel; token < std::min((panel + 1) * kPanel, vocab_); ++token)
        tokens_.push_back(int32_t(token));
    }
  }
  const std::vector<Run>& runs() const { return runs_; }
  const std::vector<int32_t>& tokens() const { return tokens_; }  // ascending

 private:
  enum State : uint8_t { kAbsent, kListed, kAgain };
  static constexpr int64_t kMostPanels = 8;  // of a run: what a thread takes at once
  static int64_t panels_of(int64_t tokens) { return round_up(tokens, kPanel) / kPanel; }

  int64_t vocab_, first_;  // first_: panels that are always listed
  size_t recent_;
  std::vector<uint8_t> state_;  // [panels]
  std::deque<int32_t> queue_;   // panels that were seen, the next to leave in front
  bool changed_ = true;
  std::vector<Run> runs_;
  std::vector<int32_t> tokens_;
};

}  // namespace paceline
