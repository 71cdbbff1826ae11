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

// Compute capabilities that the module has machine code for, then that of its PTX, by spaces.
const char* Architectures();
// The CUDA runtime that the module is linked with, as 1000 major + 10 minor.
int RuntimeVersion();

}  // namespace curvax::cuda

#endif  // CURVAX_CUDA_H_
