// What the parts of cuda_driver share: types, memory of the device, and what is in it.
#ifndef CURVAX_TESTS_CUDA_ARRAYS_H_
#define CURVAX_TESTS_CUDA_ARRAYS_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "common/storage.h"
#include "curvax/cuda.h"

namespace curvax::CURVAX_TARGET {

constexpr int kWrong = 1;  // the status that a failure ends with

struct Type {
  DType dtype;
  const char* name;
  int64_t bytes;
  double eps;
};
constexpr Type kTypes[] = {{DType::kF32, "float32", 4, 0x1p-23},
                           {DType::kF64, "float64", 8, 0x1p-52},
                           {DType::kBF16, "bfloat16", 2, 0x1p-8},
                           {DType::kF16, "float16", 2, 0x1p-11}};
constexpr Type kInt32 = {DType::kF32, "int32", 4, 0};
// What arrays of `type` are computed in.
inline const Type& ComputeOf(const Type& type) { return kTypes[type.dtype == DType::kF64 ? 1 : 0]; }

inline void Require(const char* failure, const char* what) {
  if (failure == nullptr) return;
  std::printf("FAILED: %s: %s\n", what, failure);
  std::exit(kWrong);
}
inline void Require(cudaError_t status, const char* what) {
  Require(status == cudaSuccess ? nullptr : cudaGetErrorString(status), what);
}

// Calls `body` with a value of the storage type.
template <typename Body>
void WithType(DType dtype, Body body) {
  switch (dtype) {
    case DType::kF32:
      return body(float{});
    case DType::kF64:
      return body(double{});
    case DType::kBF16:
      return body(BFloat16{});
    case DType::kF16:
      return body(Half{});
  }
}

// Device memory of its own, so that compute-sanitizer sees a write past the end of any array.
class Array {
 public:
  explicit Array(int64_t bytes) : bytes_(bytes) {
    Require(cudaMalloc(&data_, static_cast<size_t>(std::max<int64_t>(bytes, 1))), "cudaMalloc");
    Require(cudaMemset(data_, 0xff, static_cast<size_t>(bytes)), "cudaMemset");  // NaN
  }
  ~Array() { (void)cudaFree(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  void* data() const { return data_; }
  std::vector<char> Download() const {
    std::vector<char> out(static_cast<size_t>(bytes_));
    Require(cudaMemcpy(out.data(), data_, out.size(), cudaMemcpyDeviceToHost), "a kernel");
    return out;
  }
  void Upload(const void* from) {
    Require(cudaMemcpy(data_, from, static_cast<size_t>(bytes_), cudaMemcpyHostToDevice), "upload");
  }

 private:
  void* data_ = nullptr;
  int64_t bytes_;
};

// Uniform in [-1, 1): splitmix64 of the position.
__device__ double Noise(uint64_t seed, int64_t i) {
  uint64_t x = (seed << 40) + static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return static_cast<double>(x >> 11) * 0x1p-52 - 1;
}

// mean + size * noise.
template <typename S>
__global__ void FillNoise(S* out, int64_t count, double mean, double size, uint64_t seed) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    Narrow(static_cast<Compute<S>>(mean + size * Noise(seed, i)), out + i);
  }
}

// Row i is (-1)^popcount(i & j) times `size`: the signs of Walsh functions, and for rows of a
// multiple of 64 elements the first 64 are exactly orthogonal.
template <typename S>
__global__ void FillWalsh(S* out, int64_t n, int64_t stride, double size) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x, row = blockIdx.y;
  for (int64_t j = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; j < n; j += step) {
    const double sign = __popcll(static_cast<uint64_t>(row & j)) % 2 == 0 ? size : -size;
    Narrow(static_cast<Compute<S>>(sign), out + row * stride + j);
  }
}

static __global__ void FillLabels(int32_t* out, int64_t rows, int64_t vocab) {
  for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) {
    out[i] = i % 5 == 1 ? -100 : static_cast<int32_t>(i * 7919 % vocab);
  }
}

inline void Fill(const Array& array, const Type& type, int64_t count, double mean, double size,
                 uint64_t seed) {
  WithType(type.dtype, [&](auto s) {
    using S = decltype(s);
    FillNoise<S><<<4096, 256>>>(static_cast<S*>(array.data()), count, mean, size, seed);
  });
  Require(cudaGetLastError(), "filling an array");
}

// One array on the device and one on the host, with the same bytes to begin with.
class Both {
 public:
  Both(const Type& type, int64_t count)
      : type_(type), count_(count), device_(count * type.bytes), host_(device_.Download()) {}

  void* at(bool device) { return device ? device_.data() : host_.data(); }
  template <typename T>
  T* at(bool device) {
    return static_cast<T*>(at(device));
  }
  void Noise(double mean, double size, uint64_t seed) {
    Fill(device_, type_, count_, mean, size, seed);
    host_ = device_.Download();
  }
  void ToHost() { host_ = device_.Download(); }
  void ToDevice() { device_.Upload(host_.data()); }

  // The largest difference over the largest value, of elements [first, first + count).
  double Difference(int64_t first, int64_t count) const {
    const std::vector<char> device = device_.Download();
    double difference = 0, size = 0;
    WithType(type_.dtype, [&](auto s) {
      using S = decltype(s);
      const S* a = reinterpret_cast<const S*>(device.data());
      const S* b = reinterpret_cast<const S*>(host_.data());
      for (int64_t i = first; i < first + count; ++i) {
        const double x = Widen(a[i]), y = Widen(b[i]), apart = std::fabs(x - y);
        difference = std::max(difference, std::isnan(apart) ? HUGE_VAL : apart);
        size = std::max(size, std::fabs(y));
      }
    });
    return difference == 0 ? 0 : difference / size;
  }
  double Difference() const { return Difference(0, count_); }

 private:
  Type type_;
  int64_t count_;
  Array device_;
  std::vector<char> host_;
};

inline BlockOrthoArgs OrthoArguments(const Type& type, int64_t rows, int64_t n, int64_t stride,
                                     int64_t used, int64_t block, double scale) {
  BlockOrthoArgs args = {};
  args.dtype = type.dtype;
  args.rows = rows, args.n = n, args.stride = stride, args.used = used, args.block = block;
  args.scale = scale;
  return args;
}

// The counts and the seed of block_ortho on the device.
struct Counters {
  Array used{4}, kept{4}, seed{8};
  Counters(int64_t used_rows, int64_t kept_rows) {
    const int32_t counts[] = {static_cast<int32_t>(used_rows), static_cast<int32_t>(kept_rows)};
    const uint32_t words[] = {0, 0};
    used.Upload(&counts[0]);
    kept.Upload(&counts[1]);
    seed.Upload(words);
  }
};

inline void BlockOrthoOnDevice(BlockOrthoArgs args, const Counters& counters,
                               const Array& workspace) {
  args.workspace = workspace.data();
  Require(cuda::BlockOrtho(args, static_cast<int32_t*>(counters.used.data()),
                           static_cast<uint32_t*>(counters.seed.data()), nullptr),
          "block_ortho");
}

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_TESTS_CUDA_ARRAYS_H_
