// Launches kernels on a stream, and remembers the first failure (softmax_ce_launch.h says what a
// launcher is).
#ifndef CURVAX_CUDA_STREAM_LAUNCHER_H_
#define CURVAX_CUDA_STREAM_LAUNCHER_H_

#include <cuda_runtime.h>

#include "cuda/launch_config.h"
#include "curvax/cuda.h"

namespace curvax::CURVAX_LEVEL {

class StreamLauncher {
 public:
  explicit StreamLauncher(Stream stream) : stream_(stream) {}

  int64_t MostSweepBlocks() const { return kMostSweepBlocks; }

  int64_t SharedLimit() {
    if (shared_limit_ == 0) {
      int device = 0;
      Check(cudaGetDevice(&device));
      Check(
          cudaDeviceGetAttribute(&shared_limit_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    }
    return shared_limit_;
  }

  template <typename Args>
  bool Launch(void (*kernel)(Args), const LaunchShape& shape, Args args) {
    constexpr int64_t kUnasked = 48 << 10;  // more shared memory must be asked for
    const void* function = reinterpret_cast<const void*>(kernel);
    if (shape.blocks > INT32_MAX) {
      error_ = "more blocks than a grid can have";
    } else if (shape.blocks > 0 && error_ == nullptr) {
      if (shape.shared_bytes > kUnasked) {
        // The most there is, not what this launch needs: another thread may be about to launch the
        // same kernel with more, and the setting is the function's.
        Check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(SharedLimit())));
      }
      // Returns its own error, where the last one of the thread might be another's.
      void* parameters[] = {&args};
      Check(cudaLaunchKernel(function, dim3(static_cast<unsigned>(shape.blocks)),
                             dim3(static_cast<unsigned>(shape.threads)), parameters,
                             static_cast<size_t>(shape.shared_bytes), stream_));
    }
    return error_ == nullptr;
  }

  const char* error() const { return error_; }

 private:
  void Check(cudaError_t status) {
    if (status == cudaSuccess || error_ != nullptr) return;
    error_ = cudaGetErrorString(status);
    (void)cudaGetLastError();  // so that nobody else takes it for theirs
  }

  Stream stream_;
  int shared_limit_ = 0;
  const char* error_ = nullptr;
};

}  // namespace curvax::CURVAX_LEVEL

#endif  // CURVAX_CUDA_STREAM_LAUNCHER_H_
