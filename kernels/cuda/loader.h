// Loads kernels instead of launching them (shapes.h says what a launcher is).
#ifndef CURVAX_CUDA_LOADER_H_
#define CURVAX_CUDA_LOADER_H_

#include <cuda_runtime.h>

#include <set>

#include "cuda/shapes.h"
#include "curvax/types.h"

namespace curvax::CURVAX_TARGET {

// A kernel is loaded when it is first referred to, which may take memory of the device: not while a
// stream is captured in a graph.
class Loader {
 public:
  // As of a device that has no more for a block, so that no row fits that need not.
  int64_t SharedLimit() const { return kSharedBytes; }
  int64_t MostSweepBlocks() const { return kMostSweepBlocks; }
  template <typename Args>
  int64_t Residents(void (*)(Args), int, int64_t) {
    return 1;
  }

  // Goes on after a failure, so that the count is that of all kernels.
  template <typename Args>
  bool Launch(void (*kernel)(Args), const LaunchShape&, const Args&) {
    const void* function = reinterpret_cast<const void*>(kernel);
    if (!kernels_.insert(function).second) return true;
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, function);
    if (status_ == cudaSuccess) status_ = status;
    if (status != cudaSuccess) (void)cudaGetLastError();  // so that nobody takes it for theirs
    return true;
  }

  int kernels() const { return static_cast<int>(kernels_.size()); }
  cudaError_t status() const { return status_; }

 private:
  std::set<const void*> kernels_;
  cudaError_t status_ = cudaSuccess;
};

constexpr DType kStorageTypes[] = {DType::kF32, DType::kF64, DType::kBF16, DType::kF16};

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CUDA_LOADER_H_
