// Entry points of the softmax_ce kernels of this target.
#ifndef CURVAX_CPU_SOFTMAX_CE_H_
#define CURVAX_CPU_SOFTMAX_CE_H_

#include "curvax/softmax_ce.h"

namespace curvax::CURVAX_TARGET {

// Bytes of SoftmaxCeArgs::workspace that a pool of `max_workers` needs.
int64_t SoftmaxCeWorkspaceBytes(const SoftmaxCeArgs& args, int64_t max_workers);

// Fills the outputs of `args` that are not null.
void SoftmaxCe(const SoftmaxCeArgs& args, const ParallelFor& pool);

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CPU_SOFTMAX_CE_H_
