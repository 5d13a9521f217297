// Compiled once for each instruction set: PACELINE_SET names the set's file, PACELINE_NAMESPACE the namespace, and
// PACELINE_SAMPLER that of the set whose sampler it takes.
#include "kernels/kernels.hpp"

#include "kernels/attention.hpp"
#include "kernels/elementwise.hpp"
#include "kernels/matmul.hpp"
#include "kernels/peak.hpp"

#define PACELINE_STRING_(x) #x
#define PACELINE_STRING(x) PACELINE_STRING_(x)

namespace PACELINE_SAMPLER {

paceline::Sampled sample(const paceline::Logits&, const paceline::SamplingParams&, uint32_t position, bool probability);

}  // namespace PACELINE_SAMPLER

namespace PACELINE_NAMESPACE {

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
                                 PACELINE_SAMPLER::sample,
                                 dot_peak};

}  // namespace PACELINE_NAMESPACE
