// Which compiled instruction sets this processor can run.
#include <stdexcept>

#include "kernels/kernels.hpp"

#if __x86_64__
#include <cpuid.h>
#elif __aarch64__ && __linux__
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#if __x86_64__ && !PACELINE_EMULATED
namespace {

// Features that not all compilers have a name for. Whether the system saves the registers, the features asked for beside
// them say.
[[maybe_unused]] bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
[[maybe_unused]] bool has_avxvnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

}  // namespace
#endif

// The sets compiled in, best first: set(name, whether this processor can run it). AVX-VNNI in EVEX encoding is for tests.
// clang-format off
#if PACELINE_EMULATED
#define PACELINE_SETS(set) set(avx512bf16, true) set(avx512, true) set(avxvnni, true)
#elif __x86_64__
#define has(feature) bool(__builtin_cpu_supports(feature))
#define PACELINE_AVX2 (has("avx2") && has("fma") && has_f16c())
#define PACELINE_AVX512 (PACELINE_AVX2 && has("avx512f") && has("avx512bw") && has("avx512vl") && has("avx512dq") && \
                         has("avx512vnni"))
#if PACELINE_SANITIZED  // these alone are compiled: CMakeLists.txt
#define PACELINE_SETS(set) set(avx512, PACELINE_AVX512) set(avx2, PACELINE_AVX2) set(generic, true)
#else
#define PACELINE_SETS(set)                              \
  set(avx512bf16, PACELINE_AVX512 && has("avx512bf16")) \
  set(avx512, PACELINE_AVX512)                          \
  set(avxvnni, PACELINE_AVX2 && has_avxvnni())          \
  set(avxvnni_evex, PACELINE_AVX512)                    \
  set(avx2, PACELINE_AVX2)                              \
  set(generic, true)
#endif
#elif __aarch64__ && __linux__
#define PACELINE_SETS(set) set(neon, (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0) set(generic, true)
#elif __aarch64__ && __APPLE__  // all their processors have had the dot product since 2019
#define PACELINE_SETS(set) set(neon, true) set(generic, true)
#else
#define PACELINE_SETS(set) set(generic, true)
#endif

// clang-format on

#define PACELINE_DECLARE(set, usable) \
  namespace set { extern const paceline::Kernels table; }
PACELINE_SETS(PACELINE_DECLARE)

namespace paceline {
namespace {

struct Choice {
  const Kernels* kernels;
  bool usable;
};

std::vector<Choice> choices() {
#if __x86_64__
  __builtin_cpu_init();
#endif
#define PACELINE_CHOICE(set, usable) {&set::table, usable},
  return {PACELINE_SETS(PACELINE_CHOICE)};
}

}  // namespace

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Choice& choice : choices())
    if (choice.usable) names.push_back(choice.kernels->name);
  return names;
}

const Kernels& select_kernels(const std::string& isa) {
  std::string known;
  for (const Choice& choice : choices()) {
    known += (known.empty() ? "" : ", ") + std::string(choice.kernels->name);
    if (isa.empty() ? choice.usable : isa == choice.kernels->name) {
      if (choice.usable) return *choice.kernels;
      throw std::invalid_argument("this processor cannot run the " + isa + " kernels");
    }
  }
  throw std::invalid_argument("unknown instruction set " + isa + " (compiled in: " + known + ")");
}

}  // namespace paceline
