// Softmax cross entropy: loss, gradient and Hessian products of rows of logits.
#ifndef CURVAX_SOFTMAX_CE_H_
#define CURVAX_SOFTMAX_CE_H_

#include "curvax/types.h"

namespace curvax {

struct SoftmaxCeArgs {
  DType dtype;       // of logits, tangents, products and grad
  int64_t rows;      // N
  int64_t vocab;     // V
  int64_t tangents;  // b, may be 0

  const void* logits;     // (N, V)
  const void* u;          // (b, N, V)
  const int32_t* labels;  // (N)
  const void* weights;    // (N), double for kF64 and float otherwise

  void* products;  // (b, N, V); may be `u` itself
  void* grad;      // (N, V); may be `logits` itself; null if not wanted
  void* loss;      // (N), as weights; null if not wanted
  void* lse;       // (N), as weights; null if not wanted

  double softcap;  // 0: none
  double z_loss;
  double label_smoothing;
  int64_t ignore_index;

  void* workspace;  // SoftmaxCeWorkspaceBytes(...) bytes, 64-byte aligned
};

}  // namespace curvax

#endif  // CURVAX_SOFTMAX_CE_H_
