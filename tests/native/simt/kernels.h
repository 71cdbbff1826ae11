// The kernels of kernels/cuda on the emulated GPU, launched as a real one would.
#ifndef CURVAX_TESTS_SIMT_KERNELS_H_
#define CURVAX_TESTS_SIMT_KERNELS_H_

#include <cstdint>
#include <string>

#include "curvax/block_ortho.h"
#include "curvax/softmax_ce.h"

namespace curvax::emulated {

struct Device {
  int64_t shared_bytes;     // the most that a block can have
  uint32_t seed;            // of the order of threads
  int64_t first_block = 0;  // of every launch; earlier ones are left out
  int64_t residents = 2;    // blocks that it holds at once, in all
};

// Each returns an empty string, or what went wrong. The workspace is theirs.
std::string SoftmaxCe(const Device& device, SoftmaxCeArgs args);
std::string BlockOrtho(const Device& device, BlockOrthoArgs args);
std::string RotateBasis(const Device& device, RotateBasisArgs args);

}  // namespace curvax::emulated

#endif  // CURVAX_TESTS_SIMT_KERNELS_H_
