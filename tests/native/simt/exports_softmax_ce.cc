// softmax_ce in float on the emulated GPU as a plain function, for a copy of the device code that a
// test has broken: small enough to be compiled once for every mutant.
#include "cuda/softmax_ce_launch.h"
#include "simt/launcher.h"

namespace {

namespace device = curvax::CURVAX_TARGET;
using curvax::emulated::Keep;
using curvax::emulated::Launcher;

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
