// A team of threads that runs one function at a time on every member, and meets at barriers inside it.
//
// A forward pass has hundreds of short parallel stretches, so members spin at first and sleep only when nothing comes.
// Where other programs want the processors too, a member that is not running holds all others up at every barrier; a
// team that notices this goes on with fewer members for a while. Results do not depend on how many there are.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace paceline {

class Team;

// One thread's view of the team while it runs.
struct Member {
  Team& team;
  int id, size;
  mutable int bag = 0;  // bags opened since the last barrier; the same on every member

  void barrier() const;

  // Hand out n items among the members as they come: f(begin, end) until none are left. Shares start large and shrink
  // to `grain` items, so that a slower processor holds nobody up; where there are no more than that for each, all take
  // equal shares. All members call it in the same order, with a barrier at the latest after kBags calls.
  template <class F>
  void deal(int64_t n, int64_t grain, F f) const;

  // This member's share [begin, end) of n items, contiguous.
  void share(int64_t n, int64_t& begin, int64_t& end) const {
    begin = n * id / size;
    end = n * (id + 1) / size;
  }
};

class Team {
 public:
  explicit Team(int size);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Run `work` on every member taking part, the caller being member 0; returns when all are done.
  void run(const std::function<void(const Member&)>& work);

 private:
  friend struct Member;
  static constexpr int kBags = 4;
  void serve(int id);
  void meet(int members);
  void judge(int64_t nanoseconds);
  void dismiss();

  int size_;
  int active_;               // members taking part in the next run
  int64_t patience_ = 0;     // runs until all take part again
  int64_t next_patience_ = 16;
  int crowded_ = 0;          // held-up runs, less those that were not
  const std::function<void(const Member&)>* work_ = nullptr;
  alignas(64) std::atomic<uint64_t> epoch_{0};   // calls of run, times 256, plus the members taking part
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};   // counts barriers
  struct alignas(64) Bag {
    std::atomic<int64_t> dealt{0};
  };
  Bag bags_[kBags];  // emptied by the last to arrive at each barrier
  std::atomic<int64_t> stalled_{0};  // nanoseconds that members of this run waited without a processor to spin on
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
};

inline void Member::barrier() const {
  bag = 0;
  if (size > 1) team.meet(size);
}

template <class F>
void Member::deal(int64_t n, int64_t grain, F f) const {
  if (n <= grain * size || size == 1) {
    int64_t begin, end;
    share(n, begin, end);
    if (begin < end) f(begin, end);
    return;
  }
  std::atomic<int64_t>& dealt = team.bags_[bag++].dealt;
  int64_t begin = dealt.load(std::memory_order_relaxed);
  while (begin < n) {
    const int64_t end = std::min(n, begin + std::max(grain, (n - begin) / (2 * size)));
    if (!dealt.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
    f(begin, end);
    begin = dealt.load(std::memory_order_relaxed);
  }
}

}  // namespace paceline
