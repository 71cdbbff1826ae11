// The kernels of a CUDA device, launched on a stream. Nothing here waits, allocates device memory
// or reads it on the host, so that all of it can be captured in a graph.
#ifndef CURVAX_CUDA_H_
#define CURVAX_CUDA_H_

#include "curvax/block_ortho.h"
#include "curvax/softmax_ce.h"

struct CUstream_st;  // cudaStream_t points to it

namespace curvax::cuda {

using Stream = CUstream_st*;

// Device pointers in the arguments; sizes, options and the workspace as for the CPU. Each launcher
// returns null, or a static text that says what failed.

int64_t SoftmaxCeWorkspace(const SoftmaxCeArgs& args);
const char* SoftmaxCe(const SoftmaxCeArgs& args, Stream stream);

// `used` (1) and `seed` (2) are on the device, in place of those of `args`. A `used` that does not
// fit leaves the basis as it is and the other results NaN.
int64_t BlockOrthoWorkspace(const BlockOrthoArgs& args);
const char* BlockOrtho(const BlockOrthoArgs& args, const int32_t* used, const uint32_t* seed,
                       Stream stream);

// `used` and `kept` likewise. If they do not fit, the basis is NaN.
int64_t RotateBasisWorkspace(const RotateBasisArgs& args);
const char* RotateBasis(const RotateBasisArgs& args, const int32_t* used, const int32_t* kept,
                        Stream stream);

// Copies between arrays of the device.
const char* Copy(void* to, const void* from, int64_t bytes, Stream stream);

// The kernels that the current device was asked to load, and the first cudaError_t of that, or 0.
struct Loaded {
  int kernels;
  int error;
};
Loaded LoadSoftmaxCe();
Loaded LoadBlockOrtho();  // and those of RotateBasis

// A device, and whether all kernels of the module are now loaded on it, as they must be before one
// is captured in a graph.
struct DeviceFacts {
  int driver;        // the newest CUDA that the driver supports, as RuntimeVersion(); 0: no driver
  int major, minor;  // compute capability
  int64_t free, total;  // bytes of its memory
  int kernels;          // that the module has
  const char* error;    // the name of the first error, or ""
  const char* message;  // what CUDA says of it
};
// The thread's current device stays, and no error is left for others to find.
DeviceFacts CheckDevice(int ordinal);

// Compute capabilities that the module has machine code for, then that of its PTX, by spaces.
const char* Architectures();
// The CUDA runtime that the module is linked with, as 1000 major + 10 minor.
int RuntimeVersion();

}  // namespace curvax::cuda

#endif  // CURVAX_CUDA_H_
