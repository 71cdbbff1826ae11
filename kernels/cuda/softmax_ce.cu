#include "cuda/softmax_ce_launch.h"
#include "cuda/stream_launcher.h"

namespace curvax::cuda {

int64_t SoftmaxCeWorkspace(const SoftmaxCeArgs& args) { return SoftmaxCeWorkspaceBytes(args); }

const char* SoftmaxCe(const SoftmaxCeArgs& args, Stream stream) {
  StreamLauncher launcher(stream);
  LaunchSoftmaxCe(args, launcher);
  return launcher.error();
}

}  // namespace curvax::cuda
