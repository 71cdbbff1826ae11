// curvax.block_ortho and curvax.rotate_basis.
//
//   block_ortho:  basis (rows,n), block (b,n), used s32, seed u32 (2)
//                 -> basis, block (scratch), coefficients f64 (rows,b), factor f64 (b,b), info f64
//                 (4)
//   rotate_basis: basis (rows,n), rotation f64 (rows,rows), used s32, kept s32 -> basis
//
// The basis and the block are meant to alias their results; unaliased calls copy first. The number
// of used rows is an operand, since an attribute would compile every step anew.
#include "csrc/handlers.h"
#include "csrc/run_kernel.h"

namespace curvax {
namespace {

namespace ffi = xla::ffi;

int64_t Scalar(const ffi::AnyBuffer& buffer) {
  return *static_cast<const int32_t*>(buffer.untyped_data());
}

ffi::Error BlockOrthoHandler(ffi::ThreadPool threads, ffi::AnyBuffer basis, ffi::AnyBuffer block,
                             ffi::AnyBuffer used, ffi::AnyBuffer seed,
                             ffi::Result<ffi::AnyBuffer> basis_out,
                             ffi::Result<ffi::AnyBuffer> block_out,
                             ffi::Result<ffi::AnyBuffer> coefficients,
                             ffi::Result<ffi::AnyBuffer> factor, ffi::Result<ffi::AnyBuffer> info,
                             double scale) {
  const char* op = "curvax.block_ortho";
  if (basis.dimensions().size() != 2 || block.dimensions().size() != 2) {
    return ffi::Error::InvalidArgument(std::string(op) +
                                       ": basis must have shape (rows, n), block (b, n)");
  }
  const std::optional<DType> dtype = ToDType(basis.element_type());
  if (!dtype) {
    return ffi::Error::InvalidArgument(std::string(op) + ": basis must be f32, f64, bf16 or f16");
  }
  const int64_t rows = basis.dimensions()[0], n = basis.dimensions()[1];
  const int64_t b = block.dimensions()[0];
  const ffi::DataType type = basis.element_type(), compute = ComputeType(type);
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "block", block, compute, {b, n}));
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "used", used, ffi::DataType::S32, {}));
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "seed", seed, ffi::DataType::U32, {2}));
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "basis result", *basis_out, type, {rows, n}));
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "block result", *block_out, compute, {b, n}));
  CURVAX_RETURN_IF_ERROR(
      CheckBuffer(op, "coefficients", *coefficients, ffi::DataType::F64, {rows, b}));
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "factor", *factor, ffi::DataType::F64, {b, b}));
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "info", *info, ffi::DataType::F64, {4}));
  const int64_t m = Scalar(used);
  if (b < 1 || b > kMaxBlock) {
    return ffi::Error::InvalidArgument(std::string(op) + ": block must have 1 to " +
                                       std::to_string(kMaxBlock) + " rows, got " +
                                       std::to_string(b));
  }
  if (m < 0 || m + b > rows || m + b > n) {
    return ffi::Error::InvalidArgument(
        std::string(op) + ": used + b must be at most rows and n, got used " + std::to_string(m) +
        ", b " + std::to_string(b) + ", rows " + std::to_string(rows) + ", n " + std::to_string(n));
  }
  CopyIfDifferent(basis, basis_out);
  CopyIfDifferent(block, block_out);

  const uint32_t* words = static_cast<const uint32_t*>(seed.untyped_data());
  BlockOrthoArgs args = {};
  args.dtype = *dtype;
  args.rows = rows;
  args.n = n;
  args.used = m;
  args.block = b;
  args.scale = scale;
  args.seed = words[0] | uint64_t{words[1]} << 32;
  args.basis = basis_out->untyped_data();
  args.w = block_out->untyped_data();
  args.coefficients = static_cast<double*>(coefficients->untyped_data());
  args.factor = static_cast<double*>(factor->untyped_data());
  args.info = static_cast<double*>(info->untyped_data());
  return RunKernel(op, threads, &KernelTable::block_ortho_workspace_bytes,
                   &KernelTable::block_ortho, &args);
}

ffi::Error RotateBasisHandler(ffi::ThreadPool threads, ffi::AnyBuffer basis,
                              ffi::AnyBuffer rotation, ffi::AnyBuffer used, ffi::AnyBuffer kept,
                              ffi::Result<ffi::AnyBuffer> basis_out) {
  const char* op = "curvax.rotate_basis";
  if (basis.dimensions().size() != 2) {
    return ffi::Error::InvalidArgument(std::string(op) + ": basis must have shape (rows, n)");
  }
  const std::optional<DType> dtype = ToDType(basis.element_type());
  if (!dtype) {
    return ffi::Error::InvalidArgument(std::string(op) + ": basis must be f32, f64, bf16 or f16");
  }
  const int64_t rows = basis.dimensions()[0], n = basis.dimensions()[1];
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "rotation", rotation, ffi::DataType::F64, {rows, rows}));
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "used", used, ffi::DataType::S32, {}));
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "kept", kept, ffi::DataType::S32, {}));
  CURVAX_RETURN_IF_ERROR(
      CheckBuffer(op, "basis result", *basis_out, basis.element_type(), {rows, n}));
  const int64_t m = Scalar(used), k = Scalar(kept);
  if (m < 0 || m > rows || k < 0 || k > m) {
    return ffi::Error::InvalidArgument(
        std::string(op) + ": 0 <= kept <= used <= rows must hold, got kept " + std::to_string(k) +
        ", used " + std::to_string(m) + ", rows " + std::to_string(rows));
  }
  CopyIfDifferent(basis, basis_out);

  RotateBasisArgs args = {};
  args.dtype = *dtype;
  args.rows = rows;
  args.n = n;
  args.used = m;
  args.kept = k;
  args.basis = basis_out->untyped_data();
  args.rotation = static_cast<const double*>(rotation.untyped_data());
  return RunKernel(op, threads, &KernelTable::rotate_basis_workspace_bytes,
                   &KernelTable::rotate_basis, &args);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(curvax_cpu_block_ortho, BlockOrthoHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<double>("scale"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(curvax_cpu_rotate_basis, RotateBasisHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

}  // namespace curvax
