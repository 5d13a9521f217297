// Compiled once for each instruction set: PACELINE_ISA names the namespace, PACELINE_<NAME> selects intrinsics.
// PACELINE_SAMPLE is the namespace of the same set's sampler, which is compiled without contraction.
#include "kernels.hpp"

#include "attention.hpp"
#include "matmul.hpp"
#include "rows.hpp"

#define PACELINE_STRING_(x) #x
#define PACELINE_STRING(x) PACELINE_STRING_(x)

namespace PACELINE_SAMPLE { extern const paceline::Sampler sampler; }

namespace PACELINE_ISA {

extern const paceline::Kernels table;
const paceline::Kernels table = {PACELINE_STRING(PACELINE_ISA), prepare, matmul, gated, rms_norm, add_scaled, axpy, rope,
                                 append, attend, softcap, arg_max, checksum, &PACELINE_SAMPLE::sampler};

}  // namespace PACELINE_ISA
