// Which compiled instruction sets this processor can run.
#include <stdexcept>

#include "kernels.hpp"

#if PACELINE_HAS_ARM && __linux__
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace generic { extern const paceline::Kernels table; }
#if PACELINE_HAS_X86
namespace avx2 { extern const paceline::Kernels table; }
namespace avx512 { extern const paceline::Kernels table; }
#elif PACELINE_HAS_ARM
namespace neon { extern const paceline::Kernels table; }
#endif

namespace paceline {
namespace {

struct Choice {
  const Kernels* kernels;
  bool usable;
};

std::vector<Choice> choices() {  // best first
  std::vector<Choice> all;
#if PACELINE_HAS_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  all.push_back({&avx512::table, avx512});
  all.push_back({&avx2::table, avx2});
#elif PACELINE_HAS_ARM
#if __linux__
  const bool dot_product = getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif __APPLE__
  const bool dot_product = true;  // as all their processors have had since 2019
#else
  const bool dot_product = false;
#endif
  all.push_back({&neon::table, dot_product});
#endif
  all.push_back({&generic::table, true});
  return all;
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
