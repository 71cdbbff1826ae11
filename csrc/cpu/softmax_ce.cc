#include "csrc/softmax_ce.h"

#include "csrc/cpu/platform.h"
#include "csrc/handlers.h"

namespace curvax {
namespace {

namespace ffi = xla::ffi;

struct Cpu : CpuPlatform {
  static ffi::Error Run(const char* op, SoftmaxCeArgs* args, Context threads,
                        const ffi::AnyBuffer&) {
    return RunKernel(op, threads, &KernelTable::softmax_ce_workspace_bytes,
                     &KernelTable::softmax_ce, args);
  }
};

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(curvax_cpu_softmax_ce_hvp, SoftmaxCeHvp<Cpu>,
                              BindSoftmaxCeHvp<Cpu::Context>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(curvax_cpu_softmax_ce_derivatives, SoftmaxCeDerivatives<Cpu>,
                              BindSoftmaxCeDerivatives<Cpu::Context>());

}  // namespace curvax
