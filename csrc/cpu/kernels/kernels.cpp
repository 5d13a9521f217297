// Compiled once for each instruction set, as sampler.cpp is: PACELINE_SET names the set's file, PACELINE_NAMESPACE the
// namespace.
#include "kernels/kernels.hpp"

#include "kernels/attention.hpp"
#include "kernels/elementwise.hpp"
#include "kernels/matmul.hpp"
#include "kernels/peak.hpp"

#define PACELINE_STRING_(x) #x
#define PACELINE_STRING(x) PACELINE_STRING_(x)

namespace PACELINE_NAMESPACE {

paceline::Sampled sample(const paceline::Logits&, const paceline::SamplingParams&, uint32_t position, bool probability);

extern const paceline::Kernels table;
const paceline::Kernels table = {PACELINE_STRING(PACELINE_NAMESPACE),
                                 pack_activations,
                                 matmul,
                                 gated,
                                 rms_norm,
                                 add_scaled,
                                 axpy,
                                 rope,
                                 append,
                                 score,
                                 softmax,
                                 mix,
                                 softcap,
                                 arg_max,
                                 checksum,
                                 sample,
                                 dot_peak};

}  // namespace PACELINE_NAMESPACE
