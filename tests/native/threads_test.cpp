// The thread pool, without Python: see kernels_test.cpp, whose program runs this.
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "checks.hpp"
#include "runtime/threads.hpp"

using namespace paceline;

// More workers than processors, and runs that end with some of them left out: every item taken once, in every run.
void test_thread_pool() {
  constexpr int64_t n = 997;
  for (int size : {1, 2, 3, 5, 12}) {
    ThreadPool pool(size);
    for (int run = 0; run < 300; ++run) {
      std::vector<int64_t> first(n, 0), second(n, 0);
      pool.run([&](const Worker& w) {
        w.parallel_for(n, 1 + run % 3 * 200, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) first[size_t(i)] += i + run;
        });
        w.barrier();
        w.parallel_for(n, 1 + run % 5 * 7, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) second[size_t(i)] += first[size_t(i * 7 % n)];
        });
        w.barrier();
        int64_t begin, end;
        w.share(n, begin, end);
        for (int64_t i = begin; i < end; ++i) first[size_t(i)] = second[size_t(i * 3 % n)];
      });
      bool right = true;
      for (int64_t i = 0; i < n; ++i)
        right = right && second[size_t(i)] == i * 7 % n + run && first[size_t(i)] == i * 3 % n * 7 % n + run;
      check(right, "thread pool", std::to_string(size) + " workers lost or repeated work");
    }
  }
}

// An exception on one worker, or on all, ends the run on every worker, and the pool works on.
void test_failing_runs() {
  for (int size : {1, 2, 3, 5})
    for (int run = 0; run < 200; ++run) {
      ThreadPool pool(size);
      const int culprit = run % (size + 1), barriers = run / 7 % 4;  // size: all of them
      const auto fail = [&](const Worker& w) {
        for (int i = 0; i < 5; ++i) {
          if (i == barriers && (w.id == culprit || culprit == size)) throw std::runtime_error("failed");
          w.parallel_for(100, 1, [](int64_t, int64_t) {});
          w.barrier();
        }
      };
      for (int again = 0; again < 3; ++again) {
        std::string caught;
        try {
          pool.run(fail);
        } catch (const std::runtime_error& error) {
          caught = error.what();
        }
        std::atomic<int64_t> sum{0};
        pool.run([&](const Worker& w) {
          w.parallel_for(100, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) sum += i;
          });
          w.barrier();
        });
        // a pool that has left workers out may have left out the culprit
        check(sum == 4950 && (caught == "failed" || (caught.empty() && culprit > 0 && culprit < size)), "thread pool",
              std::to_string(size) + " workers, a failure after " + std::to_string(barriers) + " barriers: " + caught);
      }
    }
}
