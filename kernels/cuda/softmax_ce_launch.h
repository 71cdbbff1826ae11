// Which kernels softmax_ce launches, and in what shapes (shapes.h says what a launcher is).
#ifndef CURVAX_CUDA_SOFTMAX_CE_LAUNCH_H_
#define CURVAX_CUDA_SOFTMAX_CE_LAUNCH_H_

#include "cuda/softmax_ce.cuh"

namespace curvax::CURVAX_TARGET {

// Bytes of SoftmaxCeArgs::workspace: for rows that some device cannot hold in shared memory.
inline int64_t SoftmaxCeWorkspaceBytes(const SoftmaxCeArgs& args) {
  const int64_t element = args.dtype == DType::kF64 ? sizeof(double) : sizeof(float);
  if (MostRowSharedBytes(args.vocab, element) <= kSharedBytes) return 0;
  return args.rows * RowParts(args.vocab, element) * (PartRecord::kDots + args.tangents) *
         int64_t{sizeof(double)};
}

// For a kernel whose blocks go on to further of `items` pieces of work.
template <typename Launcher>
bool LaunchResident(void (*kernel)(SoftmaxCeArgs), const SoftmaxCeArgs& args, int64_t items,
                    int threads, int64_t shared_bytes, Launcher& launcher) {
  const int64_t blocks = Min(items, launcher.Residents(kernel, threads, shared_bytes));
  return launcher.Launch(kernel, {blocks, threads, shared_bytes}, args);
}

template <typename S, bool kCap, typename Launcher>
bool LaunchSoftmaxCeAs(const SoftmaxCeArgs& args, Launcher& launcher) {
  const int64_t row_bytes = RowSharedBytes<S>(args.vocab);
  if (row_bytes <= launcher.SharedLimit()) {
    return LaunchResident(&SoftmaxCeRow<S, kCap>, args, args.rows, RowThreads<S>(args.vocab),
                          row_bytes, launcher);
  }
  constexpr int64_t kPart = kPartElements<Compute<S>>;
  const int64_t parts = args.rows * CeilDiv(args.vocab, kPart), bytes = RowSharedBytes<S>(kPart);
  return LaunchResident(&SoftmaxCePartSums<S, kCap>, args, parts, kPartThreads, bytes, launcher) &&
         LaunchResident(&SoftmaxCePartProducts<S, kCap>, args, parts, kPartThreads, bytes,
                        launcher);
}

template <typename S, typename Launcher>
bool LaunchSoftmaxCeCapped(const SoftmaxCeArgs& args, Launcher& launcher) {
  return args.softcap > 0 ? LaunchSoftmaxCeAs<S, true>(args, launcher)
                          : LaunchSoftmaxCeAs<S, false>(args, launcher);
}

// Fills the outputs of `args` that are not null; false if a launch failed.
template <typename Launcher>
bool LaunchSoftmaxCe(const SoftmaxCeArgs& args, Launcher& launcher) {
  if (args.rows == 0 || args.vocab == 0) return true;
  switch (args.dtype) {
    case DType::kF32:
      return LaunchSoftmaxCeCapped<float>(args, launcher);
    case DType::kF64:
      return LaunchSoftmaxCeCapped<double>(args, launcher);
    case DType::kBF16:
      return LaunchSoftmaxCeCapped<BFloat16>(args, launcher);
    case DType::kF16:
      return LaunchSoftmaxCeCapped<Half>(args, launcher);
  }
  return false;
}

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CUDA_SOFTMAX_CE_LAUNCH_H_
