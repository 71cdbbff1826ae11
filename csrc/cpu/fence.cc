// curvax.fence: the identity, opaque to XLA's fusion.
//
// Called with its operand aliased to its result it does nothing at all; its worth is that XLA must
// have the operand in memory once instead of recomputing it inside every consumer.
#include <cstring>

#include "csrc/handlers.h"
#include "xla/ffi/api/ffi.h"

namespace curvax {
namespace {

namespace ffi = xla::ffi;

ffi::Error Fence(ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y) {
  if (x.size_bytes() != y->size_bytes()) {
    return ffi::Error::InvalidArgument("curvax.fence: operand and result differ in size");
  }
  if (x.untyped_data() != y->untyped_data() && x.size_bytes() > 0) {
    std::memcpy(y->untyped_data(), x.untyped_data(), x.size_bytes());
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(curvax_cpu_fence, Fence,
                              ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());

}  // namespace curvax
