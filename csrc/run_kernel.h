// The last step of every handler: finds the kernel, gives it threads and memory, and calls it.
#ifndef CURVAX_CSRC_RUN_KERNEL_H_
#define CURVAX_CSRC_RUN_KERNEL_H_

#include "csrc/ffi_helpers.h"
#include "csrc/parallel_for.h"

namespace curvax {

// `bytes` and `kernel` are the two entries of one kernel in the table of the active level.
template <typename Args>
xla::ffi::Error RunKernel(const char* op, xla::ffi::ThreadPool threads,
                          int64_t (*KernelTable::*bytes)(const Args&, int64_t),
                          void (*KernelTable::*kernel)(const Args&, const ParallelFor&),
                          Args* args) {
  const KernelTable* kernels = nullptr;
  CURVAX_RETURN_IF_ERROR(FindKernels(&kernels));
  XlaParallelFor pool(threads);
  const ParallelFor view = pool.view();
  const Workspace workspace((kernels->*bytes)(*args, view.max_workers));
  if (workspace.get() == nullptr) {
    return xla::ffi::Error(xla::ffi::ErrorCode::kResourceExhausted,
                           std::string(op) + ": out of memory");
  }
  args->workspace = workspace.get();
  (kernels->*kernel)(*args, view);
  return xla::ffi::Error::Success();
}

}  // namespace curvax

#endif  // CURVAX_CSRC_RUN_KERNEL_H_
