// cuda_driver time: the kernels at full size, beside the bandwidth of a copy on the same device.
#ifndef CURVAX_TESTS_CUDA_TIME_H_
#define CURVAX_TESTS_CUDA_TIME_H_

#include "native/cuda_arrays.cuh"

namespace curvax::CURVAX_TARGET {

// The median of five after one to warm up; `prepare` is not timed.
template <typename Prepare, typename Run>
double Seconds(Prepare prepare, Run run) {
  cudaEvent_t begin, end;
  Require(cudaEventCreate(&begin), "event");
  Require(cudaEventCreate(&end), "event");
  std::vector<double> seconds;
  for (int i = 0; i < 6; ++i) {
    prepare();
    Require(cudaEventRecord(begin), "event");
    run();
    Require(cudaEventRecord(end), "event");
    Require(cudaEventSynchronize(end), "a kernel");
    float milliseconds = 0;
    Require(cudaEventElapsedTime(&milliseconds, begin, end), "event");
    if (i > 0) seconds.push_back(milliseconds / 1e3);
  }
  (void)cudaEventDestroy(begin);
  (void)cudaEventDestroy(end);
  std::sort(seconds.begin(), seconds.end());
  return seconds[seconds.size() / 2];
}

static __global__ void CopyVectors(const float4* from, float4* to, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < count) to[i] = from[i];
}

// Bytes read and written per second: the better of the driver's copy and of a kernel.
inline double CopyBandwidth() {
  constexpr int64_t kBytes = int64_t{1} << 31, kVectors = kBytes / 16;
  const Array from(kBytes), to(kBytes);
  Fill(from, kTypes[0], kBytes / 4, 0, 1, 1);
  const double driver =
      Seconds([] {}, [&] { Require(cuda::Copy(to.data(), from.data(), kBytes, nullptr), "copy"); });
  const double kernel =
      Seconds([] {},
              [&] {
                CopyVectors<<<kVectors / 512, 512>>>(static_cast<const float4*>(from.data()),
                                                     static_cast<float4*>(to.data()), kVectors);
              });
  const double best = 2 * kBytes / std::min(driver, kernel);
  std::printf("copy: %.0f GB/s by the driver, %.0f by a kernel\n", 2e-9 * kBytes / driver,
              2e-9 * kBytes / kernel);
  return best;
}

inline void Report(const std::string& name, double seconds, double bytes, double copy,
                   double target) {
  std::printf("%s: %.3f ms, %.0f GB/s, %.1f %% of copy", name.c_str(), 1e3 * seconds,
              1e-9 * bytes / seconds, 100 * bytes / seconds / copy);
  if (target > 0) std::printf(", target %.0f %%", 100 * target);
  std::printf("\n");
}

// Never zeros, on which a device may be faster, nor what a kernel did not write.
inline void RequireValues(const Type& type, const void* array, int64_t count) {
  std::vector<char> host(static_cast<size_t>(count * type.bytes));
  Require(cudaMemcpy(host.data(), array, host.size(), cudaMemcpyDeviceToHost), "a kernel");
  int64_t zeros = 0;
  WithType(type.dtype, [&](auto s) {
    const auto* values = reinterpret_cast<const decltype(s)*>(host.data());
    for (int64_t i = 0; i < count; ++i) {
      const double x = Widen(values[i]);
      zeros += x == 0 || !std::isfinite(x);
    }
  });
  Require(100 * zeros > count ? "more than 1 % zeros or not finite" : nullptr, "a result");
}

inline std::string Shape(int64_t rows, int64_t columns) {
  return " (" + std::to_string(rows) + ", " + std::to_string(columns) + ") ";
}

// Products over their tangents. The weights are of the size of V, so that products keep theirs.
inline void TimeSoftmaxCe(const Type& type, int64_t rows, int64_t vocab, double copy,
                          double target) {
  const Type& compute = ComputeOf(type);
  const Array logits(rows * vocab * type.bytes), u(rows * vocab * type.bytes), labels(4 * rows),
      weights(rows * compute.bytes);
  Fill(logits, type, rows * vocab, 0, 1.5, 1);
  Fill(u, type, rows * vocab, 0, 1, 2);
  Fill(weights, compute, rows, static_cast<double>(vocab), 0, 3);
  Require(cudaMemset(labels.data(), 0, static_cast<size_t>(4 * rows)), "cudaMemset");
  SoftmaxCeArgs args = {};
  args.dtype = type.dtype;
  args.rows = rows, args.vocab = vocab, args.tangents = 1;
  args.logits = logits.data(), args.u = u.data(), args.products = u.data();
  args.labels = static_cast<int32_t*>(labels.data()), args.weights = weights.data();
  args.ignore_index = -100;
  const Array workspace(cuda::SoftmaxCeWorkspace(args));
  args.workspace = workspace.data();
  const double seconds =
      Seconds([] {}, [&] { Require(cuda::SoftmaxCe(args, nullptr), "softmax_ce"); });
  RequireValues(type, u.data(), vocab);
  const auto passes = 3.0 * static_cast<double>(rows * vocab * type.bytes);
  Report("softmax_ce" + Shape(rows, vocab) + type.name, seconds, passes, copy, target);
}

// The most elements that a vector may have, up to 10^8, for a basis of so many rows.
inline int64_t Length(int64_t rows, int64_t row_bytes) {
  size_t free = 0, total = 0;
  Require(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  const auto fits = static_cast<int64_t>(0.9 * static_cast<double>(free)) / (rows * row_bytes);
  return std::min<int64_t>(fits, 100'000'000) / 128 * 128;
}

inline void FillBasis(const Array& basis, const Type& type, int64_t rows, int64_t n, double scale) {
  WithType(type.dtype, [&](auto s) {
    using S = decltype(s);
    FillWalsh<S><<<dim3(4096, static_cast<unsigned>(rows)), 256>>>(
        static_cast<S*>(basis.data()), n, n, scale / std::sqrt(static_cast<double>(n)));
  });
  Require(cudaGetLastError(), "filling a basis");
}

// A random block after 64 rows: as many bytes as three reads of them, and the block's own.
inline void TimeBlockOrtho(const Type& type, int64_t block, double copy, double target) {
  constexpr int64_t kUsed = 64;
  const Type& compute = ComputeOf(type);
  const int64_t rows = kUsed + block;
  const int64_t n = Length(rows + block * compute.bytes / type.bytes, type.bytes);
  const double scale = type.bytes == 2 ? std::sqrt(static_cast<double>(n)) : 1;
  const Array basis(rows * n * type.bytes), w(block * n * compute.bytes), c(rows * block * 8),
      s(block * block * 8), info(4 * 8);
  FillBasis(basis, type, kUsed, n, scale);
  BlockOrthoArgs args = OrthoArguments(type, rows, n, n, kUsed, block, scale);
  args.basis = basis.data(), args.w = w.data();
  args.coefficients = static_cast<double*>(c.data()), args.factor = static_cast<double*>(s.data());
  args.info = static_cast<double*>(info.data());
  const Array workspace(cuda::BlockOrthoWorkspace(args));
  const Counters counters(kUsed, 0);
  uint64_t seed = 0;
  const double seconds = Seconds([&] { Fill(w, compute, block * n, 0, 1, ++seed); },
                                 [&] { BlockOrthoOnDevice(args, counters, workspace); });
  const auto* row = static_cast<const char*>(basis.data()) + kUsed * n * type.bytes;
  RequireValues(type, row, std::min<int64_t>(n, 1 << 20));
  const auto element = static_cast<double>(n);
  const double moved = element * static_cast<double>(3 * kUsed * type.bytes +
                                                     block * (4 * compute.bytes + type.bytes));
  Report(
      "block_ortho m=64 b=" + std::to_string(block) + " n=" + std::to_string(n) + " " + type.name,
      seconds, moved, copy, target);
}

inline void TimeRotateBasis(const Type& type, double copy) {
  constexpr int64_t kUsed = 64, kKept = 40;
  const int64_t n = Length(kUsed, type.bytes);
  const Array basis(kUsed * n * type.bytes), rotation(kUsed * kUsed * 8);
  FillBasis(basis, type, kUsed, n, std::sqrt(static_cast<double>(n)));
  RotateBasisArgs args = {};
  args.dtype = type.dtype;
  args.rows = kUsed, args.n = n, args.used = kUsed, args.kept = kKept;
  args.basis = basis.data(), args.rotation = static_cast<double*>(rotation.data());
  const Array workspace(cuda::RotateBasisWorkspace(args));
  args.workspace = workspace.data();
  Fill(rotation, kTypes[1], kUsed * kUsed, 0, 0.2, 7);
  const Counters counters(kUsed, kKept);
  const double seconds =
      Seconds([] {},
              [&] {
                Require(cuda::RotateBasis(args, static_cast<int32_t*>(counters.used.data()),
                                          static_cast<int32_t*>(counters.kept.data()), nullptr),
                        "rotate_basis");
              });
  const auto bytes = static_cast<double>((kUsed + kKept) * n * type.bytes);
  Report("rotate_basis 64 to 40 n=" + std::to_string(n) + " " + type.name, seconds, bytes, copy, 0);
}

inline void Time(bool softmax_ce, bool block_ortho, bool rotate_basis) {
  const double copy = CopyBandwidth();
  const Type &float32 = kTypes[0], &bfloat16 = kTypes[2], &float16 = kTypes[3];
  if (softmax_ce) {
    TimeSoftmaxCe(float32, 16384, 50304, copy, 0.85);
    TimeSoftmaxCe(float32, 16384, 50257, copy, 0);
    TimeSoftmaxCe(float32, 4096, 151936, copy, 0.60);
    TimeSoftmaxCe(bfloat16, 16384, 50304, copy, 0);
  }
  if (block_ortho) {
    for (const int64_t block : {1, 4, 8}) TimeBlockOrtho(float32, block, copy, 0.80);
    TimeBlockOrtho(float16, 1, copy, 0);
  }
  if (rotate_basis) {
    TimeRotateBasis(float32, copy);
    TimeRotateBasis(float16, copy);
  }
}

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_TESTS_CUDA_TIME_H_
