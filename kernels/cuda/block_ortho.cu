#include "cuda/block_ortho_launch.h"
#include "cuda/loader.h"
#include "cuda/stream_launcher.h"

namespace curvax::cuda {

int64_t BlockOrthoWorkspace(const BlockOrthoArgs& args) { return BlockOrthoLayout(args).bytes; }

const char* BlockOrtho(const BlockOrthoArgs& args, const int32_t* used, const uint32_t* seed,
                       Stream stream) {
  StreamLauncher launcher(stream);
  LaunchBlockOrtho(args, used, seed, launcher);
  return launcher.error();
}

int64_t RotateBasisWorkspace(const RotateBasisArgs& args) {
  return RotateWorkspaceBytes(args.rows);
}

const char* RotateBasis(const RotateBasisArgs& args, const int32_t* used, const int32_t* kept,
                        Stream stream) {
  if (RotatePanel(args.rows, args.dtype == DType::kF64 ? 8 : 4) == 0) {
    return "the basis has more rows (25344, or 12672 in float64) than shared memory can hold; use "
           "impl='reference'";
  }
  StreamLauncher launcher(stream);
  LaunchRotateBasis(args, used, kept, launcher);
  return launcher.error();
}

Loaded LoadBlockOrtho() {
  Loader loader;
  for (const DType dtype : kStorageTypes) {
    for (int64_t block = 1; block <= kMaxBlock; ++block) {
      BlockOrthoArgs args = {};
      args.dtype = dtype;
      args.rows = args.n = args.stride = kMaxBlock;
      args.block = block;
      args.scale = 1;
      LaunchBlockOrtho(args, nullptr, nullptr, loader);
    }
    RotateBasisArgs args = {};
    args.dtype = dtype;
    args.rows = args.n = 1;
    LaunchRotateBasis(args, nullptr, nullptr, loader);
  }
  return {loader.kernels(), loader.status()};
}

}  // namespace curvax::cuda
