// Entry points of the matmul_sum kernel of this target.
#ifndef CURVAX_CPU_MATMUL_SUM_H_
#define CURVAX_CPU_MATMUL_SUM_H_

#include "curvax/matmul_sum.h"

namespace curvax::CURVAX_TARGET {

// Bytes of MatmulSumArgs::workspace that a pool of `max_workers` needs.
int64_t MatmulSumWorkspaceBytes(const MatmulSumArgs& args, int64_t max_workers);

// Fills or adds to args.c.
void MatmulSum(const MatmulSumArgs& args, const ParallelFor& pool);

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CPU_MATMUL_SUM_H_
