// A team of threads that runs one function at a time on every member, and meets at barriers inside it.
//
// A forward pass has hundreds of short parallel stretches, so members spin at first and sleep only when nothing comes.
#pragma once

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

  void barrier() const;

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

  // Run `work` on every member, the caller being member 0; returns when all are done.
  void run(const std::function<void(const Member&)>& work);

 private:
  friend struct Member;
  void serve(int id);
  void meet();

  int size_;
  const std::function<void(const Member&)>* work_ = nullptr;
  alignas(64) std::atomic<uint32_t> epoch_{0};   // counts calls of run
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};   // counts barriers
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
};

inline void Member::barrier() const {
  if (size > 1) team.meet();
}

}  // namespace paceline
