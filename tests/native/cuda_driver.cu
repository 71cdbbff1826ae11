// Runs the CUDA kernels without JAX: for profilers, compute-sanitizer and a first look at a device.
//
//   cuda_driver check             small cases of every kernel and type against the CPU's kernels
//   cuda_driver time [KERNEL...]  softmax_ce, block_ortho, rotate_basis, or some, at full size
//
// Ends with status 0; 1 if a case is wrong or fails, 2 for wrong arguments, 3 without a device.
#include <set>

#include "native/cuda_check.cuh"
#include "native/cuda_time.cuh"

namespace curvax::CURVAX_TARGET {
namespace {

constexpr int kUsage = 2, kNoDevice = 3;

int Run(int count, char** arguments) {
  const std::set<std::string> known = {"softmax_ce", "block_ortho", "rotate_basis"};
  const std::string what = count > 1 ? arguments[1] : "";
  std::set<std::string> names(arguments + std::min(count, 2), arguments + count);
  bool fine = what == "time" || (what == "check" && names.empty());
  for (const std::string& name : names) fine = fine && known.count(name) == 1;
  if (!fine) {
    std::printf("cuda_driver check | time [softmax_ce] [block_ortho] [rotate_basis]\n");
    return kUsage;
  }
  const cuda::DeviceFacts device = cuda::CheckDevice(0);
  std::printf("compute capability %d.%d, driver %d; %d kernels for %s\n", device.major,
              device.minor, device.driver, device.kernels, cuda::Architectures());
  if (device.error[0] != '\0') {
    std::printf("there is no CUDA device that can run them: %s\n", device.message);
    return kNoDevice;
  }
  if (what == "check") return Check();
  if (names.empty()) names = known;
  Time(names.count("softmax_ce") == 1, names.count("block_ortho") == 1,
       names.count("rotate_basis") == 1);
  return 0;
}

}  // namespace
}  // namespace curvax::CURVAX_TARGET

int main(int count, char** arguments) { return curvax::CURVAX_TARGET::Run(count, arguments); }
