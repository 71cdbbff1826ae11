#include "csrc/block_ortho.h"

#include "csrc/cuda/platform.h"
#include "csrc/handlers.h"

namespace curvax {
namespace {

namespace ffi = xla::ffi;

const int32_t* Counter(const ffi::AnyBuffer& buffer) {
  return static_cast<const int32_t*>(buffer.untyped_data());
}

// The counts are on the device: what they may be is checked there.
struct Cuda : CudaPlatform {
  static ffi::Error Check(const char*, const BlockOrthoArgs&, const ffi::AnyBuffer&) {
    return ffi::Error::Success();
  }
  static ffi::Error Run(const char* op, BlockOrthoArgs* args, const ffi::AnyBuffer& used,
                        const ffi::AnyBuffer& seed, Context stream,
                        const ffi::AnyBuffer& workspace) {
    CURVAX_RETURN_IF_ERROR(CheckWorkspace(op, workspace, cuda::BlockOrthoWorkspace(*args)));
    args->workspace = workspace.untyped_data();
    const auto* words = static_cast<const uint32_t*>(seed.untyped_data());
    return LaunchResult(op, cuda::BlockOrtho(*args, Counter(used), words, stream));
  }

  static ffi::Error Check(const char*, const RotateBasisArgs&, const ffi::AnyBuffer&,
                          const ffi::AnyBuffer&) {
    return ffi::Error::Success();
  }
  static ffi::Error Run(const char* op, RotateBasisArgs* args, const ffi::AnyBuffer& used,
                        const ffi::AnyBuffer& kept, Context stream,
                        const ffi::AnyBuffer& workspace) {
    CURVAX_RETURN_IF_ERROR(CheckWorkspace(op, workspace, cuda::RotateBasisWorkspace(*args)));
    args->workspace = workspace.untyped_data();
    return LaunchResult(op, cuda::RotateBasis(*args, Counter(used), Counter(kept), stream));
  }
};

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(curvax_cuda_block_ortho, BlockOrthoHandler<Cuda>,
                              BindBlockOrtho<StreamArgument>(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(curvax_cuda_rotate_basis, RotateBasisHandler<Cuda>,
                              BindRotateBasis<StreamArgument>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace curvax
