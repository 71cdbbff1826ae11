// Declares every handler. X(name) lists those of a platform once, for its module and its build
// info.
#ifndef CURVAX_CSRC_HANDLERS_H_
#define CURVAX_CSRC_HANDLERS_H_

#include "xla/ffi/api/c_api.h"

#define CURVAX_FOR_EACH_CPU_HANDLER(X) \
  X(fence)                             \
  X(uninitialised_like)                \
  X(zeros)                             \
  X(put)                               \
  X(inner_products)                    \
  X(residual_products)                 \
  X(matmul_sum)                        \
  X(softmax_ce_hvp)                    \
  X(softmax_ce_derivatives)            \
  X(block_ortho)                       \
  X(rotate_basis)

#define CURVAX_FOR_EACH_CUDA_HANDLER(X) \
  X(softmax_ce_hvp)                     \
  X(softmax_ce_derivatives)             \
  X(block_ortho)                        \
  X(rotate_basis)

#define CURVAX_DECLARE_CPU_HANDLER(name) \
  extern "C" XLA_FFI_Error* curvax_cpu_##name(XLA_FFI_CallFrame*);
CURVAX_FOR_EACH_CPU_HANDLER(CURVAX_DECLARE_CPU_HANDLER)
#undef CURVAX_DECLARE_CPU_HANDLER

#define CURVAX_DECLARE_CUDA_HANDLER(name) \
  extern "C" XLA_FFI_Error* curvax_cuda_##name(XLA_FFI_CallFrame*);
CURVAX_FOR_EACH_CUDA_HANDLER(CURVAX_DECLARE_CUDA_HANDLER)
#undef CURVAX_DECLARE_CUDA_HANDLER

#endif  // CURVAX_CSRC_HANDLERS_H_
