// What the handlers of CUDA share: the context, copies, and how a failed launch becomes an error.
#ifndef CURVAX_CSRC_CUDA_PLATFORM_H_
#define CURVAX_CSRC_CUDA_PLATFORM_H_

#include "csrc/ffi_helpers.h"
#include "curvax/cuda.h"

namespace curvax {

using StreamArgument = xla::ffi::PlatformStream<cuda::Stream>;

// `failure`: null, or what a launcher says.
inline xla::ffi::Error LaunchResult(const char* op, const char* failure) {
  if (failure == nullptr) return xla::ffi::Error::Success();
  return xla::ffi::Error::Internal(std::string(op) + ": " + failure);
}

struct CudaPlatform {
  using Context = cuda::Stream;
  static xla::ffi::Error Copy(void* to, const void* from, int64_t bytes, Context stream) {
    return LaunchResult("curvax: copy of an operand", cuda::Copy(to, from, bytes, stream));
  }
};

// An error unless `buffer` has room for what the kernels ask for.
inline xla::ffi::Error CheckWorkspace(const char* op, const xla::ffi::AnyBuffer& buffer,
                                      int64_t bytes) {
  if (static_cast<int64_t>(buffer.size_bytes()) >= bytes) return xla::ffi::Error::Success();
  return xla::ffi::Error::InvalidArgument(std::string(op) + ": workspace must have " +
                                          std::to_string(bytes) + " bytes, got " +
                                          std::to_string(buffer.size_bytes()));
}

}  // namespace curvax

#endif  // CURVAX_CSRC_CUDA_PLATFORM_H_
