// What the handlers of the CPU share: the context, copies, and the last step of each, which finds
// the kernel, gives it threads and memory, and calls it.
#ifndef CURVAX_CSRC_CPU_PLATFORM_H_
#define CURVAX_CSRC_CPU_PLATFORM_H_

#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

#include "csrc/cpu/parallel_for.h"
#include "csrc/ffi_helpers.h"
#include "curvax/dispatch.h"

namespace curvax {

struct CpuPlatform {
  using Context = xla::ffi::ThreadPool;
  static xla::ffi::Error Copy(void* to, const void* from, int64_t bytes, Context) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
    return xla::ffi::Error::Success();
  }
};

// Memory for one call, aligned for any vector; null if it cannot be had.
//
// Up to kKept bytes stay with the thread for its next call: a fresh allocation of this size is
// mapped page by page while the kernel runs, which costs more than the kernel's work on it.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    thread_local Kept kept;
    if (kept.memory == nullptr || bytes > kept.bytes) {
      kept.bytes = 0;
      kept.memory.reset(Allocate(bytes));
      if (kept.memory != nullptr && bytes <= kKept) kept.bytes = bytes;
    }
    memory_ = kept.memory.get();
    if (bytes > kKept) own_ = std::move(kept.memory);
  }
  void* get() const { return memory_; }

 private:
  static constexpr int64_t kKept = int64_t{8} << 20;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  using Memory = std::unique_ptr<void, Free>;
  struct Kept {
    Memory memory;
    int64_t bytes = 0;
  };
  static void* Allocate(int64_t bytes) {
    return std::aligned_alloc(64, static_cast<size_t>((bytes + 127) / 64 * 64));
  }

  void* memory_;
  Memory own_;
};

// The kernels of the active target, chosen once.
inline xla::ffi::Error FindKernels(const KernelTable** kernels) {
  static const KernelTable* const table = ActiveTable();
  if (table == nullptr) {
    return xla::ffi::Error::InvalidArgument(
        "curvax: CURVAX_ISA must name a target that this build and this machine have");
  }
  *kernels = table;
  return xla::ffi::Error::Success();
}

// `bytes` and `kernel` are the two entries of one kernel in the table of the active target.
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

#endif  // CURVAX_CSRC_CPU_PLATFORM_H_
