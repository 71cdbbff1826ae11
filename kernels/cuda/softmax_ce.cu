#include "cuda/loader.h"
#include "cuda/softmax_ce_launch.h"
#include "cuda/stream_launcher.h"

namespace curvax::cuda {

int64_t SoftmaxCeWorkspace(const SoftmaxCeArgs& args) { return SoftmaxCeWorkspaceBytes(args); }

const char* SoftmaxCe(const SoftmaxCeArgs& args, Stream stream) {
  StreamLauncher launcher(stream);
  LaunchSoftmaxCe(args, launcher);
  return launcher.error();
}

Loaded LoadSoftmaxCe() {
  Loader loader;
  for (const DType dtype : kStorageTypes) {
    for (const int64_t vocab : {int64_t{1}, kSharedBytes}) {  // whole rows, and rows in parts
      for (const double softcap : {0.0, 1.0}) {
        SoftmaxCeArgs args = {};
        args.dtype = dtype;
        args.rows = 1;
        args.vocab = vocab;
        args.softcap = softcap;
        LaunchSoftmaxCe(args, loader);
      }
    }
  }
  return {loader.kernels(), loader.status()};
}

}  // namespace curvax::cuda
