// Entry points of the matmul_sum kernel at this instruction level.
#ifndef CURVAX_CPU_MATMUL_SUM_LEVEL_H_
#define CURVAX_CPU_MATMUL_SUM_LEVEL_H_

#include "curvax/matmul_sum.h"

namespace curvax::CURVAX_LEVEL {

// Bytes of MatmulSumArgs::workspace that a pool of `max_workers` needs.
int64_t MatmulSumWorkspaceBytes(const MatmulSumArgs& args, int64_t max_workers);

// Fills or adds to args.c.
void MatmulSum(const MatmulSumArgs& args, const ParallelFor& pool);

}  // namespace curvax::CURVAX_LEVEL

#endif  // CURVAX_CPU_MATMUL_SUM_LEVEL_H_
