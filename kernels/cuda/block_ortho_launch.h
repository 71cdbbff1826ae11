// Which kernels block_ortho and rotate_basis launch, and in what shapes (shapes.h says what a
// launcher is).
#ifndef CURVAX_CUDA_BLOCK_ORTHO_LAUNCH_H_
#define CURVAX_CUDA_BLOCK_ORTHO_LAUNCH_H_

#include "cuda/block_ortho.cuh"
#include "cuda/rotate_basis.cuh"

namespace curvax::CURVAX_TARGET {

// Where everything lies in the workspace of block_ortho. The number of used rows is only known on
// the device, so there is room for all.
struct BlockOrthoLayout {
  int64_t sums, blocks;
  int64_t partial, measured, left, a, mix, bytes;
  explicit BlockOrthoLayout(const BlockOrthoArgs& args, int64_t most_blocks = kMostSweepBlocks) {
    const int64_t b = args.block, element = args.dtype == DType::kF64 ? 8 : 4;
    sums = (args.rows + b) * b + b;
    blocks = SweepBlocks(args.n, sums, most_blocks);
    int64_t at = RoundUp(sizeof(BlockOrthoDevice), 64);
    const auto take = [&at](int64_t size) {
      const int64_t begin = at;
      at = RoundUp(at + size, 64);
      return begin;
    };
    partial = take(blocks * sums * 8);
    measured = take(sums * 8);
    left = take(args.rows * b * 8);
    a = take(args.rows * PaddedColumns(b) * element);
    mix = take(b * b * element);
    bytes = at;
  }
};

// Whether every row begins at a multiple of 16 bytes.
template <typename T>
bool RowsAligned(const void* rows, int64_t stride) {
  return stride % kVector<T> == 0 && reinterpret_cast<uintptr_t>(rows) % sizeof(Bytes16) == 0;
}

template <typename S, int B, typename Launcher>
bool LaunchBlockOrthoTile(const BlockOrthoArgs& args, const int32_t* used, const uint32_t* seed,
                          Launcher& launcher) {
  const BlockOrthoLayout layout(args, launcher.MostSweepBlocks());
  char* memory = static_cast<char*>(args.workspace);
  const auto doubles = [memory](int64_t at) { return reinterpret_cast<double*>(memory + at); };
  BlockOrthoLaunch launch = {};
  launch.args = args;
  launch.used = used;
  launch.seed = seed;
  launch.blocks = layout.blocks;
  launch.sums = layout.sums;
  const int64_t limit = Min<int64_t>(launcher.SharedLimit(), kSharedBytes);
  launch.shape = ShapeSweep<S, B>(args.rows - args.block, args.block, limit);
  launch.basis_aligned = RowsAligned<S>(args.basis, args.stride);
  launch.w_aligned = RowsAligned<Compute<S>>(args.w, args.n);
  launch.device = reinterpret_cast<BlockOrthoDevice*>(memory);
  launch.partial = doubles(layout.partial);
  launch.measured = doubles(layout.measured);
  launch.left = doubles(layout.left);
  launch.a = memory + layout.a;
  launch.mix = memory + layout.mix;

  const LaunchShape one = {1, kDecideThreads, kReduceBytes};
  LaunchShape sweep = {layout.blocks, kSweepThreads, launch.shape.bytes};
  const LaunchShape combine = {CeilDiv(layout.sums, kCombineEntries), kCombineThreads,
                               kCombineThreads * int64_t{sizeof(double)}};
  if (!launcher.Launch(&BlockOrthoBegin<S>, one, launch) ||
      !launcher.Launch(&MeasureSweep<S, B>, sweep, launch) ||
      !launcher.Launch(&CombineSums, combine, launch) ||
      !launcher.Launch(&Decide<S, true>, one, launch)) {
    return false;
  }
  // One sweep more than passes, for a block that has to be scaled first.
  for (int i = 0; i <= kMaxPasses; ++i) {
    if (i == kUsualPasses) sweep.blocks = launch.blocks = Min(launch.blocks, kFewSweepBlocks);
    if (!launcher.Launch(&UpdateSweep<S, B>, sweep, launch) ||
        !launcher.Launch(&CombineSums, combine, launch) ||
        !launcher.Launch(&Decide<S, false>, one, launch)) {
      return false;
    }
  }
  return true;
}

template <typename S, typename Launcher>
bool LaunchBlockOrthoAs(const BlockOrthoArgs& args, const int32_t* used, const uint32_t* seed,
                        Launcher& launcher) {
  switch (TileColumns(args.block)) {
    case 1:
      return LaunchBlockOrthoTile<S, 1>(args, used, seed, launcher);
    case 2:
      return LaunchBlockOrthoTile<S, 2>(args, used, seed, launcher);
    case 4:
      return LaunchBlockOrthoTile<S, 4>(args, used, seed, launcher);
    default:
      return LaunchBlockOrthoTile<S, 8>(args, used, seed, launcher);
  }
}

// `used` (1) and `seed` (2) are on the device, in place of those of `args`.
template <typename Launcher>
bool LaunchBlockOrtho(const BlockOrthoArgs& args, const int32_t* used, const uint32_t* seed,
                      Launcher& launcher) {
  switch (args.dtype) {
    case DType::kF32:
      return LaunchBlockOrthoAs<float>(args, used, seed, launcher);
    case DType::kF64:
      return LaunchBlockOrthoAs<double>(args, used, seed, launcher);
    case DType::kBF16:
      return LaunchBlockOrthoAs<BFloat16>(args, used, seed, launcher);
    case DType::kF16:
      return LaunchBlockOrthoAs<Half>(args, used, seed, launcher);
  }
  return false;
}

inline int64_t RotateWorkspaceBytes(int64_t rows) {
  return RoundUp(rows, kRotateRows) * rows * int64_t{sizeof(double)};
}

template <typename S, typename Launcher>
bool LaunchRotateBasisAs(const RotateBasisArgs& args, const int32_t* used, const int32_t* kept,
                         Launcher& launcher) {
  using C = Compute<S>;
  const RotateBasisLaunch launch = {args, used, kept, RotatePanel(args.rows, sizeof(C))};
  const int64_t pack_blocks = CeilDiv(RotateWorkspaceBytes(args.rows) / 8, kRotateThreads);
  const LaunchShape pack = {Min<int64_t>(pack_blocks, 1024), kRotateThreads, 0};
  const LaunchShape rotate = {CeilDiv(args.n, launch.panel), kRotateThreads,
                              args.rows * launch.panel * int64_t{sizeof(S)}};
  return launcher.Launch(&PackRotation<C>, pack, launch) &&
         launcher.Launch(&RotatePanels<S>, rotate, launch);
}

// `used` and `kept` are on the device. The caller has checked that RotatePanel is not 0.
template <typename Launcher>
bool LaunchRotateBasis(const RotateBasisArgs& args, const int32_t* used, const int32_t* kept,
                       Launcher& launcher) {
  switch (args.dtype) {
    case DType::kF32:
      return LaunchRotateBasisAs<float>(args, used, kept, launcher);
    case DType::kF64:
      return LaunchRotateBasisAs<double>(args, used, kept, launcher);
    case DType::kBF16:
      return LaunchRotateBasisAs<BFloat16>(args, used, kept, launcher);
    case DType::kF16:
      return LaunchRotateBasisAs<Half>(args, used, kept, launcher);
  }
  return false;
}

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CUDA_BLOCK_ORTHO_LAUNCH_H_
