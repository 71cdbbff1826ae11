// Entry points of the inner_products kernels of this target.
#ifndef CURVAX_CPU_INNER_PRODUCTS_H_
#define CURVAX_CPU_INNER_PRODUCTS_H_

#include "curvax/inner_products.h"

namespace curvax::CURVAX_TARGET {

// Bytes of InnerProductsArgs::workspace for a pool of `max_workers`.
int64_t InnerProductsWorkspaceBytes(const InnerProductsArgs& args, int64_t max_workers);

// Fills args.products.
void InnerProducts(const InnerProductsArgs& args, const ParallelFor& pool);

// Bytes of ResidualProductsArgs::workspace for a pool of `max_workers`.
int64_t ResidualProductsWorkspaceBytes(const ResidualProductsArgs& args, int64_t max_workers);

// Fills args.products.
void ResidualProducts(const ResidualProductsArgs& args, const ParallelFor& pool);

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CPU_INNER_PRODUCTS_H_
