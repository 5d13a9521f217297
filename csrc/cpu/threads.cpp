#include "threads.hpp"

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

constexpr int kSpins = 2000;                                    // then give the processor away at each look
constexpr auto kAwake = std::chrono::microseconds(2000);        // then sleep until the next run

}  // namespace

Team::Team(int size) : size_(size < 1 ? 1 : size) {
  for (int id = 1; id < size_; ++id) threads_.emplace_back([this, id] { serve(id); });
}

Team::~Team() {
  stop_ = true;
  epoch_.fetch_add(1);
  epoch_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void Team::run(const std::function<void(const Member&)>& work) {
  if (size_ > 1) {
    work_ = &work;
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
  }
  work(Member{*this, 0, size_});
  if (size_ > 1) meet();
}

void Team::serve(int id) {
  uint32_t seen = 0;
  while (true) {
    const auto start = std::chrono::steady_clock::now();
    for (int spins = 0; epoch_.load(std::memory_order_acquire) == seen; ++spins) {
      pause();
      if (spins % 64 == 63 && std::chrono::steady_clock::now() - start > kAwake) epoch_.wait(seen);
    }
    ++seen;
    if (stop_) return;
    (*work_)(Member{*this, id, size_});
    meet();
  }
}

// Sense-reversing barrier: the last to arrive opens the next phase.
void Team::meet() {
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    for (Bag& bag : bags_) bag.dealt.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
    if (spins < kSpins) pause();
    else std::this_thread::yield();
  }
}

}  // namespace paceline
