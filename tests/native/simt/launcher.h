// What launches kernels on the emulated GPU (shapes.h says what a launcher is).
#ifndef CURVAX_TESTS_SIMT_LAUNCHER_H_
#define CURVAX_TESTS_SIMT_LAUNCHER_H_

#include <string>

#include "cuda/shapes.h"
#include "simt/kernels.h"
#include "simt/simt.h"

namespace curvax::emulated {

class Launcher {
 public:
  explicit Launcher(const Device& device) : device_(device) {}
  int64_t SharedLimit() const { return device_.shared_bytes; }
  // Few, so that every block has several panels.
  int64_t MostSweepBlocks() const { return 3; }
  template <typename Args>
  int64_t Residents(void (*)(Args), int, int64_t) const {
    return device_.residents;
  }
  template <typename Args>
  bool Launch(void (*kernel)(Args), const CURVAX_TARGET::LaunchShape& shape, const Args& args) {
    if (shape.blocks > device_.first_block) {
      error = simt::Run({shape.blocks, shape.threads, shape.shared_bytes, device_.first_block},
                        device_.seed++, [&] { kernel(args); });
    }
    return error.empty();
  }
  std::string error;

 private:
  Device device_;
};

// An error as a C string, valid until the next.
inline const char* Keep(const std::string& error) {
  static std::string kept;
  kept = error;
  return kept.c_str();
}

}  // namespace curvax::emulated

#endif  // CURVAX_TESTS_SIMT_LAUNCHER_H_
