#include "threads.hpp"

#include <algorithm>
#include <chrono>

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
constexpr int kSpins = 2000;                                    // then give the processor away at each look
constexpr auto kAwake = std::chrono::microseconds(2000);        // then sleep until the next run

}  // namespace

Team::Team(int size) : size_(std::clamp(size, 1, 255)), active_(size_) {
  try {
    for (int id = 1; id < size_; ++id) threads_.emplace_back([this, id] { serve(id); });
  } catch (...) {  // the system has no more threads to give
    dismiss();
    throw;
  }
}

Team::~Team() { dismiss(); }

void Team::dismiss() {
  stop_ = true;
  epoch_.fetch_add(256);
  epoch_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void Team::run(const std::function<void(const Member&)>& work) {
  if (patience_ > 0 && --patience_ == 0) active_ = size_;
  if (active_ == 1) return work(Member{*this, 0, 1});
  const auto start = Clock::now();
  work_ = &work;
  stalled_.store(0, std::memory_order_relaxed);
  epoch_.store((epoch_.load(std::memory_order_relaxed) / 256 + 1) * 256 + uint64_t(active_), std::memory_order_release);
  epoch_.notify_all();
  work(Member{*this, 0, active_});
  meet(active_);
  judge(std::chrono::nanoseconds(Clock::now() - start).count());
}

// If members stood still for a third of a run, on average, and not just once in a while, go on with one fewer for some
// runs, for longer each time it happens.
void Team::judge(int64_t nanoseconds) {
  if (stalled_.load(std::memory_order_relaxed) / (active_ - 1) <= nanoseconds / 3) {
    if (crowded_ > 0 && --crowded_ == 0) next_patience_ = 16;
  } else if (++crowded_ >= 4) {
    crowded_ = 3;  // the next such run is enough
    --active_;
    patience_ = next_patience_;
    next_patience_ = std::min<int64_t>(2 * next_patience_, 1024);
  }
}

void Team::serve(int id) {
  uint64_t seen = 0;
  while (true) {
    const auto start = Clock::now();
    uint64_t epoch;
    for (int spins = 0; (epoch = epoch_.load(std::memory_order_acquire)) == seen; ++spins) {
      pause();
      if (spins % 64 == 63 && Clock::now() - start > kAwake) epoch_.wait(seen);
    }
    seen = epoch;
    if (stop_) return;
    // A run that this member takes part in cannot end without it; one that it does not may be over already.
    const int members = int(epoch % 256);
    if (id >= members) continue;
    (*work_)(Member{*this, id, members});
    meet(members);
  }
}

// Sense-reversing barrier: the last to arrive opens the next phase.
void Team::meet(int members) {
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == members - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    for (Bag& bag : bags_) bag.dealt.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; spins < kSpins; ++spins) {
    if (phase_.load(std::memory_order_acquire) != phase) return;
    pause();
  }
  const auto start = Clock::now();
  while (phase_.load(std::memory_order_acquire) == phase) std::this_thread::yield();
  stalled_.fetch_add(std::chrono::nanoseconds(Clock::now() - start).count(), std::memory_order_relaxed);
}

}  // namespace paceline
