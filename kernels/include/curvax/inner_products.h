// Inner products, in float64, of stored rows or of linear combinations of them.
#ifndef CURVAX_INNER_PRODUCTS_H_
#define CURVAX_INNER_PRODUCTS_H_

#include "curvax/types.h"

namespace curvax {

constexpr int kMaxRowSets = 3;

// `count` rows of n elements, `stride` elements apart.
struct RowSet {
  DType dtype;
  const void* rows;
  int64_t stride, count;
};

// The products of y_first with y_begin, ..., y_{begin + count - 1}.
struct ProductRun {
  int64_t first, begin, count;
};

// The vectors v are the rows of all sets, one set after another; y = coefficients v, or v itself.
struct InnerProductsArgs {
  int64_t n;
  int num_sets;
  RowSet sets[kMaxRowSets];
  int64_t combinations;        // of which there are y; 0: y is v
  const double* coefficients;  // (combinations, rows of all sets); a row that only has zeros in
                               // its column is not read
  int64_t num_runs;
  const ProductRun* runs;
  double* products;  // of all runs, one run after another

  void* workspace;  // InnerProductsWorkspaceBytes(...) bytes, 64-byte aligned
};

}  // namespace curvax

#endif  // CURVAX_INNER_PRODUCTS_H_
