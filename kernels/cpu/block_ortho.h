// Entry points of the block_ortho kernels of this target.
#ifndef CURVAX_CPU_BLOCK_ORTHO_H_
#define CURVAX_CPU_BLOCK_ORTHO_H_

#include "curvax/block_ortho.h"

namespace curvax::CURVAX_TARGET {

// Bytes of BlockOrthoArgs::workspace for a pool of `max_workers`.
int64_t BlockOrthoWorkspaceBytes(const BlockOrthoArgs& args, int64_t max_workers);

// Orthonormalises args.w against args.basis and itself, into the basis.
void BlockOrtho(const BlockOrthoArgs& args, const ParallelFor& pool);

// Bytes of RotateBasisArgs::workspace for a pool of `max_workers`.
int64_t RotateBasisWorkspaceBytes(const RotateBasisArgs& args, int64_t max_workers);

// Replaces the first rows of the basis by combinations of its used rows.
void RotateBasis(const RotateBasisArgs& args, const ParallelFor& pool);

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CPU_BLOCK_ORTHO_H_
