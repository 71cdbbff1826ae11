// Inner products, in float64, of stored rows, and those of which a certificate is made.
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

// The products of row `first` with rows `begin`, ..., `begin + count - 1`.
struct ProductRun {
  int64_t first, begin, count;
};

// Rows are numbered through, one set after another.
struct InnerProductsArgs {
  int64_t n;
  int num_sets;
  RowSet sets[kMaxRowSets];
  int64_t num_runs;
  const ProductRun* runs;
  double* products;  // of all runs, one run after another

  void* workspace;  // InnerProductsWorkspaceBytes(...) bytes, 64-byte aligned
};

// C below is double for kF64 and float otherwise.
struct ResidualProductsArgs {
  DType dtype;  // of x and q
  int64_t n, pairs;
  const void *x, *q;  // `pairs` rows each, `stride` elements apart
  int64_t stride;
  const void* w;           // (pairs, n) of C
  const double* shifts;    // (pairs)
  const double* thetas;    // (pairs)
  const double* coupling;  // (pairs, pairs); q that only has zeros in its row is not read
  double* products;  // (pairs, 4): of r = w - shift x and e = w - theta x - coupling^T q, the sums
                     // x x, x r, r r and e e

  void* workspace;  // ResidualProductsWorkspaceBytes(...) bytes, 64-byte aligned
};

}  // namespace curvax

#endif  // CURVAX_INNER_PRODUCTS_H_
