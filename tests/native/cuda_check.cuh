// cuda_driver check: small cases of every kernel and type against the CPU's kernels.
#ifndef CURVAX_TESTS_CUDA_CHECK_H_
#define CURVAX_TESTS_CUDA_CHECK_H_

#include "curvax/dispatch.h"
#include "native/cuda_arrays.cuh"

namespace curvax::CURVAX_TARGET {

// The CPU's kernels, on this thread.
inline void RunSerially(void*, int64_t count, ParallelFor::Body body, void* context) {
  for (int64_t i = 0; i < count; ++i) body(context, 0, i);
}
constexpr ParallelFor kPool = {&RunSerially, nullptr, 1};

inline const KernelTable& Cpu() {
  const KernelTable* table = ActiveTable();
  Require(table == nullptr ? "names a target that cannot be had" : nullptr, "CURVAX_ISA");
  return *table;
}

struct HostWorkspace {
  explicit HostWorkspace(int64_t bytes) : memory(static_cast<size_t>(bytes) + 64) {}
  void* data() {
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + (64 - address % 64) % 64;
  }
  std::vector<char> memory;
};

inline int failures = 0;

inline void Expect(const std::string& name, double difference, double allowed) {
  const bool fine = difference <= allowed;
  std::printf("%s: %.1e of %.1e %s\n", name.c_str(), difference, allowed, fine ? "" : "FAILED");
  failures += !fine;
}

inline void CheckSoftmaxCe(const Type& type, int64_t rows, int64_t vocab, bool options) {
  const Type& compute = ComputeOf(type);
  constexpr int64_t kTangents = 2;
  Both logits(type, rows * vocab), u(type, kTangents * rows * vocab), labels(kInt32, rows),
      weights(compute, rows), products(type, kTangents * rows * vocab), grad(type, rows * vocab),
      loss(compute, rows), lse(compute, rows);
  logits.Noise(0, 5, 1);
  u.Noise(0, 1, 2);
  weights.Noise(0.6, 0.4, 3);
  FillLabels<<<1, 32>>>(labels.at<int32_t>(true), rows, vocab);
  labels.ToHost();
  const auto arguments = [&](bool device) {
    SoftmaxCeArgs args = {};
    args.dtype = type.dtype;
    args.rows = rows, args.vocab = vocab, args.tangents = kTangents;
    args.logits = logits.at(device), args.u = u.at(device);
    args.labels = labels.at<int32_t>(device), args.weights = weights.at(device);
    args.products = products.at(device), args.grad = grad.at(device);
    args.loss = loss.at(device), args.lse = lse.at(device);
    args.ignore_index = -100;
    if (options) args.softcap = 4, args.z_loss = 1e-2, args.label_smoothing = 0.1;
    return args;
  };
  SoftmaxCeArgs host = arguments(false), device = arguments(true);
  HostWorkspace room(Cpu().softmax_ce_workspace_bytes(host, 1));
  host.workspace = room.data();
  Cpu().softmax_ce(host, kPool);
  Array workspace(cuda::SoftmaxCeWorkspace(device));
  device.workspace = workspace.data();
  Require(cuda::SoftmaxCe(device, nullptr), "softmax_ce");

  const std::string name = std::string("softmax_ce ") + type.name + " (" + std::to_string(rows) +
                           ", " + std::to_string(vocab) + (options ? ") capped" : ")");
  Expect(name + " products", products.Difference(), 16 * type.eps);
  Expect(name + " gradient", grad.Difference(), 16 * type.eps);
  Expect(name + " loss", loss.Difference(), 16 * compute.eps);
  Expect(name + " lse", lse.Difference(), 16 * compute.eps);
}

inline void OrthonormaliseOnCpu(BlockOrthoArgs args) {
  HostWorkspace room(Cpu().block_ortho_workspace_bytes(args, 1));
  args.workspace = room.data();
  Cpu().block_ortho(args, kPool);
}

inline void CheckBlockOrtho(const Type& type, int64_t used, int64_t block, int64_t n,
                            int64_t stride) {
  const Type& compute = ComputeOf(type);
  const Type& wide = kTypes[1];
  const int64_t rows = used + block + 2, widest = std::max<int64_t>(block, used);
  const double scale = type.dtype == DType::kF16 ? std::sqrt(n) : 1;
  Both basis(type, rows * stride), w(compute, widest * n), c(wide, rows * kMaxBlock),
      s(wide, kMaxBlock * kMaxBlock), info(wide, 4);
  const auto arguments = [&](bool device, int64_t first, int64_t count) {
    BlockOrthoArgs args = OrthoArguments(type, rows, n, stride, first, count, scale);
    args.basis = basis.at(device), args.w = w.at(device);
    args.coefficients = c.at<double>(device), args.factor = s.at<double>(device);
    args.info = info.at<double>(device);
    return args;
  };
  for (int64_t first = 0; first < used; first += kMaxBlock) {
    w.Noise(0, 1, 10 + static_cast<uint64_t>(first));
    OrthonormaliseOnCpu(arguments(false, first, std::min(kMaxBlock, used - first)));
  }
  basis.ToDevice();
  w.Noise(0, 1, 9);
  OrthonormaliseOnCpu(arguments(false, used, block));
  const BlockOrthoArgs args = arguments(true, used, block);
  const Array workspace(cuda::BlockOrthoWorkspace(args));
  BlockOrthoOnDevice(args, Counters(used, 0), workspace);

  const std::string name = std::string("block_ortho ") + type.name + " m=" + std::to_string(used) +
                           " b=" + std::to_string(block) + " n=" + std::to_string(n) + "/" +
                           std::to_string(stride);
  // The block is well conditioned: its orthonormal rows are its own to within a few roundings.
  Expect(name + " rows", basis.Difference(used * stride, block * stride), 16 * type.eps);
  Expect(name + " coefficients", c.Difference(0, rows * block), 16 * compute.eps);
  Expect(name + " factor", s.Difference(0, block * block), 16 * compute.eps);
  Expect(name + " passes", info.Difference(0, 2), 0);
}

inline void CheckRotateBasis(const Type& type, int64_t used, int64_t kept, int64_t n) {
  const int64_t rows = used + 3;
  Both basis(type, rows * n), rotation(kTypes[1], rows * rows);
  basis.Noise(0, 1, 4);
  rotation.Noise(0, 1, 5);
  const auto arguments = [&](bool device) {
    RotateBasisArgs args = {};
    args.dtype = type.dtype;
    args.rows = rows, args.n = n, args.used = used, args.kept = kept;
    args.basis = basis.at(device), args.rotation = rotation.at<double>(device);
    return args;
  };
  RotateBasisArgs host = arguments(false), device = arguments(true);
  HostWorkspace room(Cpu().rotate_basis_workspace_bytes(host, 1));
  host.workspace = room.data();
  Cpu().rotate_basis(host, kPool);
  const Array workspace(cuda::RotateBasisWorkspace(device));
  device.workspace = workspace.data();
  const Counters counters(used, kept);
  Require(cuda::RotateBasis(device, static_cast<int32_t*>(counters.used.data()),
                            static_cast<int32_t*>(counters.kept.data()), nullptr),
          "rotate_basis");
  Expect(std::string("rotate_basis ") + type.name + " " + std::to_string(used) + " to " +
             std::to_string(kept) + " n=" + std::to_string(n),
         basis.Difference(), 16 * type.eps);
}

inline int Check() {
  for (const Type& type : kTypes) {
    for (const bool options : {false, true}) {
      // The longest row is in parts in every type, on every device.
      for (const int64_t vocab : {7, 301, 50257, 60001}) CheckSoftmaxCe(type, 3, vocab, options);
    }
    CheckBlockOrtho(type, 0, 1, 17, 17);
    CheckBlockOrtho(type, 9, 3, 1001, 1024);
    CheckBlockOrtho(type, 33, 8, 5000, 5000);
    CheckBlockOrtho(type, 70, 2, 777, 777);
    CheckBlockOrtho(type, 64, 13, 3001, 3008);
    CheckRotateBasis(type, 5, 5, 33);
    CheckRotateBasis(type, 40, 17, 1000);
    CheckRotateBasis(type, 71, 40, 4099);
  }
  std::printf("%d cases differ\n", failures);
  return failures == 0 ? 0 : kWrong;
}

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_TESTS_CUDA_CHECK_H_
