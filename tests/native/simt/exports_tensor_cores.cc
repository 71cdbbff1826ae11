// As exports_softmax_ce.cc: block_ortho with blocks of more than four vectors, of the types whose
// products are made on tensor cores.
#include <vector>

#include "cuda/block_ortho_launch.h"
#include "simt/launcher.h"

namespace {

namespace device = curvax::CURVAX_TARGET;

template <typename S>
void Run(const curvax::BlockOrthoArgs& args, curvax::emulated::Launcher& launcher) {
  const int32_t used = static_cast<int32_t>(args.used);
  const uint32_t words[2] = {7, 0};
  device::LaunchBlockOrthoTile<S, 8>(args, &used, words, launcher);
}

}  // namespace

extern "C" const char* block_ortho_tensor(uint32_t seed, int64_t shared_bytes,
                                          const curvax::BlockOrthoArgs* args) {
  curvax::emulated::Launcher launcher({shared_bytes, seed});
  std::vector<char> workspace(device::BlockOrthoLayout(*args).bytes, char(0xff));
  curvax::BlockOrthoArgs with = *args;
  with.workspace = workspace.data();
  if (args->dtype == curvax::DType::kF64) Run<double>(with, launcher);
  if (args->dtype == curvax::DType::kBF16) Run<device::BFloat16>(with, launcher);
  if (args->dtype == curvax::DType::kF16) Run<device::Half>(with, launcher);
  return curvax::emulated::Keep(launcher.error);
}
