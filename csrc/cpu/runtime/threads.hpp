// A thread pool that runs one function at a time on every worker, with barriers and work queues inside it.
//
// A forward pass has hundreds of short parallel stretches, so workers spin at first and sleep only when no run follows.
// When other programs use the processors too, a worker that is not scheduled delays all others at every barrier; a pool
// that detects this leaves workers out for some runs. Results do not depend on the number of workers.
//
// An exception that the function throws on any worker ends the run on all of them, and `run` throws it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace paceline {

class ThreadPool;

// The process that made an object. A child of fork() has the object's memory but none of its threads, and locks as they
// were at that moment: to wait for either would be for ever.
class HomeProcess {
 public:
  HomeProcess();
  bool is_current() const;
  void check() const;  // throws std::runtime_error in another process

 private:
  int64_t id_;
};

// What the function of a run sees of the pool on one thread.
struct Worker {
  ThreadPool& pool;
  int id, size;
  mutable int queue = 0;  // work queues used since the last barrier; the same on every worker

  void barrier() const;

  // f(begin, end) over n items: workers take stretches until none are left. Stretches start large and shrink to `grain`
  // items, so that a slower processor delays nobody; with no more than that for each worker all take equal shares.
  // All workers call it in the same order, with a barrier at the latest after kQueues calls.
  template <class F>
  void parallel_for(int64_t n, int64_t grain, F f) const;

  // This worker's equal share [begin, end) of n items.
  void share(int64_t n, int64_t& begin, int64_t& end) const {
    begin = n * id / size;
    end = n * (id + 1) / size;
  }

  // f(i) for this worker's equal share of n items.
  template <class F>
  void for_share(int64_t n, F f) const {
    int64_t begin, end;
    share(n, begin, end);
    for (int64_t i = begin; i < end; ++i) f(i);
  }
};

class ThreadPool {
 public:
  explicit ThreadPool(int size);  // throws std::invalid_argument below 1; more than 255 are 255
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }

  // Run `work` on every active worker, the caller being worker 0; returns when all are done. Throws what `work` throws
  // (of several exceptions the first), and std::runtime_error in another process than the pool's own.
  void run(const std::function<void(const Worker&)>& work);

 private:
  friend struct Worker;
  static constexpr int kQueues = 4;
  static constexpr int64_t kFirstBackoff = 16;
  void work_loop(int id);
  void run_worker(const std::function<void(const Worker&)>& work, const Worker& worker);
  void barrier(int workers);
  void end_failed_run();
  void detect_contention(int active, int64_t nanoseconds);
  void grow();
  void set_active(int workers);
  void join();

  HomeProcess home_;
  int size_;
  std::atomic<int> active_;  // workers of the next run
  int64_t backoff_ = 0;      // runs until more workers are active again
  int64_t next_backoff_ = kFirstBackoff;
  int next_left_out_ = 1;
  int contended_ = 0;           // delayed runs
  int64_t contended_time_ = 0;  // nanoseconds of such runs, less those of others; the count begins anew at 0
  const std::function<void(const Worker&)>* work_ = nullptr;
  alignas(64) std::atomic<uint64_t> epoch_{0};  // calls of run, times 256, plus the active workers
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};  // counts barriers
  std::atomic<bool> failed_{false};             // a worker of this run threw: no barrier will open again
  std::atomic<int> ended_{0};                   // workers that have left a failed run
  std::mutex error_lock_;
  std::exception_ptr error_;  // the first
  struct alignas(64) WorkQueue {
    std::atomic<int64_t> next{0};  // the first item not taken
  };
  WorkQueue queues_[kQueues];         // reset by the last worker to arrive at each barrier
  std::atomic<int64_t> stalled_{0};   // nanoseconds that workers of this run waited after they had given up spinning
  std::atomic<bool> crowded_{false};  // runs were delayed of late: who waits leaves its processor to others
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
};

inline void Worker::barrier() const {
  queue = 0;
  if (size > 1) pool.barrier(size);
}

template <class F>
void Worker::parallel_for(int64_t n, int64_t grain, F f) const {
  if (n <= grain * size || size == 1) {
    int64_t begin, end;
    share(n, begin, end);
    if (begin < end) f(begin, end);
    return;
  }
  std::atomic<int64_t>& next = pool.queues_[queue++].next;
  int64_t begin = next.load(std::memory_order_relaxed);
  while (begin < n) {
    const int64_t end = std::min(n, begin + std::max(grain, (n - begin) / (2 * size)));
    if (!next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
    f(begin, end);
    begin = next.load(std::memory_order_relaxed);
  }
}

}  // namespace paceline
