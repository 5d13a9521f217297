// Counts of what kernels_test.cpp and the files beside it check.
#pragma once

#include <cstdio>
#include <string>

#include "kernels/kernels.hpp"

inline int checks = 0, failures = 0;

inline void check(bool ok, const char* isa, const std::string& what) {
  ++checks;
  if (!ok && ++failures <= 20) std::fprintf(stderr, "%s: %s\n", isa, what.c_str());
}

inline void report(const char* name, int& failed) {
  if (failures) std::printf("%s: %d of %d checks FAILED\n", name, failures, checks);
  else std::printf("%s: %d checks passed\n", name, checks);
  failed += failures;
  checks = failures = 0;
}

void test_attention(const paceline::Kernels& kernels);  // attention_test.cpp
void test_elementary();                                 // elementary_test.cpp

// threads_test.cpp
void test_thread_pool();
void test_failing_runs();
