// Picks the target, the instructions that the CPU's kernels may use, at run time: base for every
// machine, v3 and v4 for those levels of the x86-64 architecture.
#ifndef CURVAX_DISPATCH_H_
#define CURVAX_DISPATCH_H_

#include "curvax/block_ortho.h"
#include "curvax/inner_products.h"
#include "curvax/matmul_sum.h"
#include "curvax/softmax_ce.h"

namespace curvax {

// The entry points of one target.
struct KernelTable {
  const char* target;

  // Bytes of SoftmaxCeArgs::workspace for a pool of `max_workers`.
  int64_t (*softmax_ce_workspace_bytes)(const SoftmaxCeArgs& args, int64_t max_workers);
  // Fills the outputs of `args` that are not null.
  void (*softmax_ce)(const SoftmaxCeArgs& args, const ParallelFor& pool);

  // Bytes of MatmulSumArgs::workspace for a pool of `max_workers`.
  int64_t (*matmul_sum_workspace_bytes)(const MatmulSumArgs& args, int64_t max_workers);
  // Fills or adds to args.c.
  void (*matmul_sum)(const MatmulSumArgs& args, const ParallelFor& pool);

  // Bytes of BlockOrthoArgs::workspace for a pool of `max_workers`.
  int64_t (*block_ortho_workspace_bytes)(const BlockOrthoArgs& args, int64_t max_workers);
  // Orthonormalises args.w against args.basis and itself, into the basis.
  void (*block_ortho)(const BlockOrthoArgs& args, const ParallelFor& pool);

  // Bytes of RotateBasisArgs::workspace for a pool of `max_workers`.
  int64_t (*rotate_basis_workspace_bytes)(const RotateBasisArgs& args, int64_t max_workers);
  // Replaces the first rows of the basis by combinations of its used rows.
  void (*rotate_basis)(const RotateBasisArgs& args, const ParallelFor& pool);

  // Bytes of InnerProductsArgs::workspace for a pool of `max_workers`.
  int64_t (*inner_products_workspace_bytes)(const InnerProductsArgs& args, int64_t max_workers);
  // Fills args.products.
  void (*inner_products)(const InnerProductsArgs& args, const ParallelFor& pool);

  // Bytes of ResidualProductsArgs::workspace for a pool of `max_workers`.
  int64_t (*residual_products_workspace_bytes)(const ResidualProductsArgs& args,
                                               int64_t max_workers);
  // Fills args.products.
  void (*residual_products)(const ResidualProductsArgs& args, const ParallelFor& pool);
};

constexpr int kMaxTargets = 3;

// Names of the compiled targets, lowest first; null after the last.
extern const char* const kCompiledTargets[kMaxTargets + 1];

// The table of a target by name, or null if it was not compiled or this machine lacks it.
const KernelTable* TableForTarget(const char* name);

// The best target of this machine, or the one named by the environment variable CURVAX_ISA; null if
// that cannot be had.
const KernelTable* ActiveTable();

}  // namespace curvax

#endif  // CURVAX_DISPATCH_H_
