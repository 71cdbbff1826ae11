// Sums of matrix products, C = [C +] A_1 B_1 + A_2 B_2, over a batch.
#ifndef CURVAX_MATMUL_SUM_H_
#define CURVAX_MATMUL_SUM_H_

#include "curvax/types.h"

namespace curvax {

constexpr int kMaxTerms = 2;

// A batch of matrices: element (i, j) of matrix k is at data[k * batch + i * row + j * column].
struct MatrixBatch {
  const void* data;
  int64_t batch;  // 0 for one matrix that serves the whole batch
  int64_t row, column;
};

struct MatmulSumArgs {
  DType dtype;  // kF32 or kF64
  int64_t batch, m, n, k;
  int terms;                 // 1 or 2
  MatrixBatch a[kMaxTerms];  // (m, k)
  MatrixBatch b[kMaxTerms];  // (k, n)
  void* c;                   // (batch, m, n), dense; overlaps no operand
  bool add;                  // to what c holds
  void* workspace;           // MatmulSumWorkspaceBytes(...) bytes, 64-byte aligned
};

}  // namespace curvax

#endif  // CURVAX_MATMUL_SUM_H_
