#include "runtime/threads.hpp"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <utility>

#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace paceline {
namespace {

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

using Clock = std::chrono::steady_clock;
constexpr int kSpins = 2000;                               // then yield at each check
constexpr auto kSpinning = std::chrono::microseconds(50);  // what that takes; longer waits count as stalled
constexpr auto kAwake = std::chrono::microseconds(2000);   // then sleep until the next run

struct Cancelled {};  // unwinds the other workers of a run that failed

}  // namespace

HomeProcess::HomeProcess() : id_(getpid()) {}

bool HomeProcess::is_current() const { return getpid() == id_; }

void HomeProcess::check() const {
  if (!is_current())
    throw std::runtime_error(
        "the process was forked after the model was loaded, and its threads did not come along; "
        "load the model in the child process, or start processes by spawning");
}

ThreadPool::ThreadPool(int size) : size_(std::min(size, 255)), active_(size_) {
  if (size < 1) throw std::invalid_argument("threads is " + std::to_string(size) + "; it must be at least 1");
  try {
    for (int id = 1; id < size_; ++id) threads_.emplace_back([this, id] { work_loop(id); });
  } catch (...) {  // the system has no more threads
    join();
    throw;
  }
}

ThreadPool::~ThreadPool() { join(); }

void ThreadPool::join() {
  if (!home_.is_current()) {  // there is nothing to join, and a std::thread that is not joined ends the process
    new std::vector<std::thread>(std::move(threads_));
    return;
  }
  stop_ = true;
  epoch_.fetch_add(256);
  epoch_.notify_all();
  set_active(0);  // wakes workers that are left out
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::set_active(int workers) {
  active_.store(workers, std::memory_order_release);
  active_.notify_all();
}

void ThreadPool::run(const std::function<void(const Worker&)>& work) {
  home_.check();
  if (backoff_ > 0 && --backoff_ == 0) grow();
  const int active = active_.load(std::memory_order_relaxed);
  if (active == 1) return work(Worker{*this, 0, 1});
  const auto start = Clock::now();
  work_ = &work;
  crowded_.store(contended_ > 0, std::memory_order_relaxed);
  stalled_.store(0, std::memory_order_relaxed);
  epoch_.store((epoch_.load(std::memory_order_relaxed) / 256 + 1) * 256 + uint64_t(active), std::memory_order_release);
  epoch_.notify_all();
  run_worker(work, Worker{*this, 0, active});
  if (failed_.load(std::memory_order_acquire)) end_failed_run();
  detect_contention(active, std::chrono::nanoseconds(Clock::now() - start).count());
}

// The last barrier opens only if no worker has thrown, so either all workers pass it or none does.
void ThreadPool::run_worker(const std::function<void(const Worker&)>& work, const Worker& worker) {
  try {
    work(worker);
    barrier(worker.size);
    return;
  } catch (const Cancelled&) {
  } catch (...) {
    const std::lock_guard lock(error_lock_);
    if (!error_) error_ = std::current_exception();
    failed_.store(true, std::memory_order_release);
  }
  ended_.fetch_add(1, std::memory_order_acq_rel);
}

// Once all workers have left, the pool is ready for the next run.
void ThreadPool::end_failed_run() {
  while (ended_.load(std::memory_order_acquire) < active_) std::this_thread::yield();
  arrived_.store(0, std::memory_order_relaxed);
  for (WorkQueue& queue : queues_) queue.next.store(0, std::memory_order_relaxed);
  ended_.store(0, std::memory_order_relaxed);
  failed_.store(false, std::memory_order_relaxed);
  std::rethrow_exception(std::exchange(error_, nullptr));
}

// If workers waited for a third of a run on average, and in more of the time than not, leave some out for some runs: each
// time more of them, and for more runs. Time counts, not runs: a container that has used up its share of the processors
// stands still for long in a single run.
void ThreadPool::detect_contention(int active, int64_t nanoseconds) {
  if (stalled_.load(std::memory_order_relaxed) / (active - 1) <= nanoseconds / 3) {
    contended_time_ -= nanoseconds;
    if (contended_time_ > 0) return;
    contended_time_ = contended_ = 0, next_left_out_ = 1;
    if (active == size_) next_backoff_ = kFirstBackoff;
    return;
  }
  contended_time_ = std::min(contended_time_ + nanoseconds, 4 * nanoseconds);
  if (++contended_ < 4) return;
  contended_ = 3;  // one more such run is enough
  set_active(std::max(active - next_left_out_, 1));
  next_left_out_ *= 2;
  backoff_ = next_backoff_;
  next_backoff_ = std::min<int64_t>(2 * next_backoff_, 1024);
}

// Not to full size at once, which many workers would take many slow runs to leave again.
void ThreadPool::grow() {
  const int before = active_.load(std::memory_order_relaxed), active = std::min(2 * before, size_);
  next_left_out_ = active - before;  // if that is too many
  if (active < size_) backoff_ = kFirstBackoff;
  set_active(active);
}

void ThreadPool::work_loop(int id) {
  uint64_t seen = 0;
  while (true) {
    const auto start = Clock::now();
    uint64_t epoch;
    for (int spins = 0; (epoch = epoch_.load(std::memory_order_acquire)) == seen; ++spins) {
      if (crowded_.load(std::memory_order_relaxed)) std::this_thread::yield();
      else pause();
      if (spins % 64 == 63 && Clock::now() - start > kAwake) epoch_.wait(seen);
    }
    seen = epoch;
    if (stop_) return;
    // A run does not end before its workers do, but one that this worker is not part of may be over already.
    const int workers = int(epoch % 256);
    if (id < workers) run_worker(*work_, Worker{*this, id, workers});
    else active_.wait(workers);  // left out: spinning would take time from the others
  }
}

// Sense-reversing barrier: the last to arrive opens the next phase. A worker that is slow to leave may see the failure of
// the next run, but then it sees that the phase has changed, too.
void ThreadPool::barrier(int workers) {
  if (failed_.load(std::memory_order_relaxed)) throw Cancelled{};
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  const auto opened = [&] {
    if (phase_.load(std::memory_order_acquire) != phase) return true;
    if (failed_.load(std::memory_order_acquire) && phase_.load(std::memory_order_acquire) == phase) throw Cancelled{};
    return false;
  };
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == workers - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    for (WorkQueue& queue : queues_) queue.next.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  const auto start = Clock::now();
  for (int spins = crowded_.load(std::memory_order_relaxed) ? kSpins : 0; spins < kSpins; ++spins) {
    if (opened()) return;
    pause();
  }
  while (!opened()) std::this_thread::yield();
  const auto stalled = Clock::now() - start - kSpinning;
  if (stalled.count() > 0) stalled_.fetch_add(std::chrono::nanoseconds(stalled).count(), std::memory_order_relaxed);
}

}  // namespace paceline
