#include "csrc/softmax_ce.h"

#include "csrc/cuda/platform.h"
#include "csrc/handlers.h"

namespace curvax {
namespace {

namespace ffi = xla::ffi;

struct Cuda : CudaPlatform {
  static ffi::Error Run(const char* op, SoftmaxCeArgs* args, Context stream,
                        const ffi::AnyBuffer& workspace) {
    CURVAX_RETURN_IF_ERROR(CheckWorkspace(op, workspace, cuda::SoftmaxCeWorkspace(*args)));
    args->workspace = workspace.untyped_data();
    return LaunchResult(op, cuda::SoftmaxCe(*args, stream));
  }
};

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(curvax_cuda_softmax_ce_hvp, SoftmaxCeHvp<Cuda>,
                              BindSoftmaxCeHvp<StreamArgument>(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(curvax_cuda_softmax_ce_derivatives, SoftmaxCeDerivatives<Cuda>,
                              BindSoftmaxCeDerivatives<StreamArgument>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace curvax
