// A few float kernels on the emulated GPU as plain functions, for a copy of the device code that a
// test has broken: small enough to be compiled once for every mutant.
#include <string>
#include <vector>

#include "cuda/block_ortho_launch.h"
#include "cuda/softmax_ce_launch.h"
#include "simt/launcher.h"

namespace {

namespace device = curvax::CURVAX_TARGET;
using curvax::emulated::Launcher;

const char* Keep(const std::string& error) {
  static std::string kept;
  kept = error;
  return kept.c_str();
}

}  // namespace

// Each returns an empty string, or what went wrong. `workspace`: NaN, and large enough.
extern "C" const char* softmax_ce(uint32_t seed, int64_t shared_bytes, int64_t residents,
                                  const curvax::SoftmaxCeArgs* args) {
  Launcher launcher({shared_bytes, seed, 0, residents});
  if (args->softcap > 0) {
    device::LaunchSoftmaxCeAs<float, true>(*args, launcher);
  } else {
    device::LaunchSoftmaxCeAs<float, false>(*args, launcher);
  }
  return Keep(launcher.error);
}

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
