// What concerns the device and the module as a whole, not one family of kernels.
#include <cuda_runtime.h>

#include "curvax/cuda.h"

namespace curvax::cuda {

DeviceFacts CheckDevice(int ordinal) {
  DeviceFacts facts = {};
  (void)cudaDriverGetVersion(&facts.driver);
  int before = 0;
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess) status = cudaSetDevice(ordinal);
  if (status == cudaSuccess) {
    (void)cudaDeviceGetAttribute(&facts.major, cudaDevAttrComputeCapabilityMajor, ordinal);
    (void)cudaDeviceGetAttribute(&facts.minor, cudaDevAttrComputeCapabilityMinor, ordinal);
    size_t free = 0, total = 0;
    (void)cudaMemGetInfo(&free, &total);
    facts.free = static_cast<int64_t>(free);
    facts.total = static_cast<int64_t>(total);
  }
  for (const Loaded loaded : {LoadSoftmaxCe(), LoadBlockOrtho()}) {
    facts.kernels += loaded.kernels;
    if (status == cudaSuccess) status = static_cast<cudaError_t>(loaded.error);
  }
  (void)cudaSetDevice(before);
  (void)cudaGetLastError();  // so that nobody else takes it for theirs
  facts.error = status == cudaSuccess ? "" : cudaGetErrorName(status);
  facts.message = status == cudaSuccess ? "" : cudaGetErrorString(status);
  return facts;
}

const char* Copy(void* to, const void* from, int64_t bytes, Stream stream) {
  const cudaError_t status =
      cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream);
  if (status == cudaSuccess) return nullptr;
  (void)cudaGetLastError();  // so that nobody else takes it for theirs
  return cudaGetErrorString(status);
}

const char* Architectures() { return CURVAX_CUDA_ARCHITECTURES; }
int RuntimeVersion() { return CUDART_VERSION; }

}  // namespace curvax::cuda
