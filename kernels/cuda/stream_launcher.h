// Launches kernels on a stream, and remembers the first failure (shapes.h says what a launcher is).
#ifndef CURVAX_CUDA_STREAM_LAUNCHER_H_
#define CURVAX_CUDA_STREAM_LAUNCHER_H_

#include <cuda_runtime.h>

#include <atomic>

#include "cuda/shapes.h"
#include "curvax/cuda.h"

namespace curvax::CURVAX_TARGET {

class StreamLauncher {
 public:
  explicit StreamLauncher(Stream stream) : stream_(stream) {}

  int64_t MostSweepBlocks() const { return kMostSweepBlocks; }

  int64_t SharedLimit() { return OfDevice<cudaDevAttrMaxSharedMemoryPerBlockOptin>(); }

  // Blocks of `kernel` that the device holds at once.
  template <typename Args>
  int64_t Residents(void (*kernel)(Args), int threads, int64_t shared_bytes) {
    const void* function = reinterpret_cast<const void*>(kernel);
    int blocks = 0;
    if (!AllowShared(function, shared_bytes)) return 0;
    Check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, threads,
                                                        static_cast<size_t>(shared_bytes)));
    if (blocks == 0 && error_ == nullptr) error_ = "a kernel that does not fit the device";
    return blocks * OfDevice<cudaDevAttrMultiProcessorCount>();
  }

  template <typename Args>
  bool Launch(void (*kernel)(Args), const LaunchShape& shape, Args args) {
    const void* function = reinterpret_cast<const void*>(kernel);
    if (shape.blocks > INT32_MAX) {
      error_ = "more blocks than a grid can have";
    } else if (shape.blocks > 0 && error_ == nullptr && AllowShared(function, shape.shared_bytes)) {
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
  static constexpr int kDevices = 64;  // that are remembered; others are asked each time

  int Device() {
    int device = 0;
    Check(cudaGetDevice(&device));
    return device;
  }
  template <cudaDeviceAttr kAttribute>
  int64_t OfDevice() {
    static std::atomic<int> known[kDevices];
    const int device = Device();
    int value = device < kDevices ? known[device].load() : 0;
    if (value == 0) {
      Check(cudaDeviceGetAttribute(&value, kAttribute, device));
      if (device < kDevices && error_ == nullptr) known[device].store(value);
    }
    return value;
  }

  // More than 48 KB must be asked for, once per kernel and device. The most there is, not what this
  // launch needs: another thread may be about to launch the same kernel with more, and the setting
  // is the function's.
  bool AllowShared(const void* function, int64_t bytes) {
    constexpr int64_t kUnasked = 48 << 10;
    if (bytes <= kUnasked) return error_ == nullptr;
    const int device = Device();
    std::atomic<uint64_t>* allowed = device < kDevices ? DevicesThatAllow(function) : nullptr;
    const uint64_t bit = uint64_t{1} << device % kDevices;
    if (allowed != nullptr && (allowed->load() & bit) != 0) return true;
    Check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(SharedLimit())));
    if (allowed != nullptr && error_ == nullptr) allowed->fetch_or(bit);
    return error_ == nullptr;
  }
  // A bit for each device on which the function may have all shared memory; null if there are more
  // functions than are remembered.
  static std::atomic<uint64_t>* DevicesThatAllow(const void* function) {
    struct Entry {
      std::atomic<const void*> function;
      std::atomic<uint64_t> devices;
    };
    static Entry entries[64];
    for (Entry& entry : entries) {
      const void* found = nullptr;
      // Takes the first free entry, unless another thread has just done so.
      if (entry.function.compare_exchange_strong(found, function) || found == function) {
        return &entry.devices;
      }
    }
    return nullptr;
  }

  void Check(cudaError_t status) {
    if (status == cudaSuccess || error_ != nullptr) return;
    error_ = cudaGetErrorString(status);
    (void)cudaGetLastError();  // so that nobody else takes it for theirs
  }

  Stream stream_;
  const char* error_ = nullptr;
};

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CUDA_STREAM_LAUNCHER_H_
