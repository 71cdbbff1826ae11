#include "csrc/block_ortho.h"

#include "csrc/cpu/platform.h"
#include "csrc/handlers.h"

namespace curvax {
namespace {

namespace ffi = xla::ffi;

int64_t Scalar(const ffi::AnyBuffer& buffer) {
  return *static_cast<const int32_t*>(buffer.untyped_data());
}

struct Cpu : CpuPlatform {
  static ffi::Error Check(const char* op, const BlockOrthoArgs& args, const ffi::AnyBuffer& used) {
    const int64_t m = Scalar(used), b = args.block;
    if (m >= 0 && m + b <= args.rows && m + b <= args.n) return ffi::Error::Success();
    return ffi::Error::InvalidArgument(std::string(op) +
                                       ": used + b must be at most rows and n, got used " +
                                       std::to_string(m) + ", b " + std::to_string(b) + ", rows " +
                                       std::to_string(args.rows) + ", n " + std::to_string(args.n));
  }
  static ffi::Error Run(const char* op, BlockOrthoArgs* args, const ffi::AnyBuffer& used,
                        const ffi::AnyBuffer& seed, Context threads, const ffi::AnyBuffer&) {
    const uint32_t* words = static_cast<const uint32_t*>(seed.untyped_data());
    args->used = Scalar(used);
    args->seed = words[0] | uint64_t{words[1]} << 32;
    return RunKernel(op, threads, &KernelTable::block_ortho_workspace_bytes,
                     &KernelTable::block_ortho, args);
  }

  static ffi::Error Check(const char* op, const RotateBasisArgs& args, const ffi::AnyBuffer& used,
                          const ffi::AnyBuffer& kept) {
    const int64_t m = Scalar(used), k = Scalar(kept);
    if (0 <= k && k <= m && m <= args.rows) return ffi::Error::Success();
    return ffi::Error::InvalidArgument(
        std::string(op) + ": 0 <= kept <= used <= rows must hold, got kept " + std::to_string(k) +
        ", used " + std::to_string(m) + ", rows " + std::to_string(args.rows));
  }
  static ffi::Error Run(const char* op, RotateBasisArgs* args, const ffi::AnyBuffer& used,
                        const ffi::AnyBuffer& kept, Context threads, const ffi::AnyBuffer&) {
    args->used = Scalar(used);
    args->kept = Scalar(kept);
    return RunKernel(op, threads, &KernelTable::rotate_basis_workspace_bytes,
                     &KernelTable::rotate_basis, args);
  }
};

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(curvax_cpu_block_ortho, BlockOrthoHandler<Cpu>,
                              BindBlockOrtho<Cpu::Context>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(curvax_cpu_rotate_basis, RotateBasisHandler<Cpu>,
                              BindRotateBasis<Cpu::Context>());

}  // namespace curvax
