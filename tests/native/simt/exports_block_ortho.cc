// As exports_softmax_ce.cc: block_ortho and rotate_basis in float.
#include <vector>

#include "cuda/block_ortho_launch.h"
#include "simt/launcher.h"

namespace {

namespace device = curvax::CURVAX_TARGET;
using curvax::emulated::Keep;
using curvax::emulated::Launcher;

}  // namespace

extern "C" const char* block_ortho(uint32_t seed, int64_t shared_bytes,
                                   const curvax::BlockOrthoArgs* args) {
  Launcher launcher({shared_bytes, seed});
  std::vector<char> workspace(device::BlockOrthoLayout(*args).bytes, char(0xff));
  curvax::BlockOrthoArgs with = *args;
  with.workspace = workspace.data();
  const int32_t used = static_cast<int32_t>(args->used);
  const uint32_t words[2] = {7, 0};
  device::LaunchBlockOrthoTile<float, 4>(with, &used, words, launcher);
  return Keep(launcher.error);
}

extern "C" const char* rotate_basis(uint32_t seed, const curvax::RotateBasisArgs* args) {
  Launcher launcher({0, seed});
  const int32_t used = static_cast<int32_t>(args->used), kept = static_cast<int32_t>(args->kept);
  device::LaunchRotateBasisAs<float>(*args, &used, &kept, launcher);
  return Keep(launcher.error);
}
