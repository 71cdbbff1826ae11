// What stream_launcher.h uses of the CUDA runtime, for a host without it: two devices of different
// size and one that no kernel fits, and a log of the calls.
#ifndef CURVAX_TESTS_FAKE_CUDA_RUNTIME_H_
#define CURVAX_TESTS_FAKE_CUDA_RUNTIME_H_

#include <cstddef>
#include <string>

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrMultiProcessorCount = 16
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct dim3 {
  unsigned x;
  explicit dim3(unsigned count) : x(count) {}
};

namespace fake {
inline int device = 0;
inline bool fails = false;
inline std::string log;
inline const char* (*name)(const void* function) = nullptr;

inline cudaError_t Call(const std::string& what) {
  log += what + " on " + std::to_string(device) + "\n";
  return fails ? cudaErrorInvalidValue : cudaSuccess;
}
}  // namespace fake

inline cudaError_t cudaGetDevice(int* device) {
  *device = fake::device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const bool shared = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin;
  *value = shared ? 100000 + device : 10 + device;
  return fake::Call(shared ? "shared limit" : "processors");
}
inline cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value) {
  return fake::Call(fake::name(function) + (" may have " + std::to_string(value)));
}
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function,
                                                                 int threads, size_t bytes) {
  *blocks = fake::device < 2 ? 3 : 0;
  return fake::Call(std::string("occupancy of ") + fake::name(function) + " " +
                    std::to_string(threads) + " " + std::to_string(bytes));
}
inline cudaError_t cudaLaunchKernel(const void* function, dim3 blocks, dim3 threads, void**,
                                    size_t bytes, struct CUstream_st*) {
  return fake::Call(std::string("launch ") + fake::name(function) + " " + std::to_string(blocks.x) +
                    " " + std::to_string(threads.x) + " " + std::to_string(bytes));
}
inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

#endif  // CURVAX_TESTS_FAKE_CUDA_RUNTIME_H_
