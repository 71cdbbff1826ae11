// curvax.block_ortho and curvax.rotate_basis, for any platform.
//
//   block_ortho:  basis (rows,stride), block (b,n), used s32, seed u32 (2)
//                 -> basis, block (scratch), coefficients f64 (rows,b), factor f64 (b,b),
//                 info f64 (4), workspace
//   rotate_basis: basis (rows,n), rotation f64 (rows,rows), used s32, kept s32
//                 -> basis, workspace
//
// The basis and the block are meant to alias their results; unaliased calls copy first. The number
// of used rows is an operand, since an attribute would compile every step anew. softmax_ce.h says
// what the workspace is.
//
// A Platform has a Context, Copy(to, from, bytes, context), and Run for either arguments: with the
// operands that only the platform can read.
#ifndef CURVAX_CSRC_BLOCK_ORTHO_H_
#define CURVAX_CSRC_BLOCK_ORTHO_H_

#include "csrc/ffi_helpers.h"
#include "curvax/block_ortho.h"

namespace curvax {

// Checks that there is a basis of a storage type, with elements, and describes it.
template <typename Args>
xla::ffi::Error ReadBasis(const char* op, const xla::ffi::AnyBuffer& basis, Args* args) {
  const auto shape = basis.dimensions();
  if (shape.size() != 2 || shape[0] == 0 || shape[1] == 0) {
    return xla::ffi::Error::InvalidArgument(
        std::string(op) + ": basis must have shape (rows, n), at least 1 each, got " +
        ShapeText(shape));
  }
  const std::optional<DType> dtype = ToDType(basis.element_type());
  if (!dtype) {
    return xla::ffi::Error::InvalidArgument(std::string(op) +
                                            ": basis must be f32, f64, bf16 or f16");
  }
  args->dtype = *dtype;
  args->rows = shape[0];
  args->n = shape[1];
  return xla::ffi::Error::Success();
}

template <typename Platform>
xla::ffi::Error BlockOrthoHandler(typename Platform::Context context, xla::ffi::AnyBuffer basis,
                                  xla::ffi::AnyBuffer block, xla::ffi::AnyBuffer used,
                                  xla::ffi::AnyBuffer seed,
                                  xla::ffi::Result<xla::ffi::AnyBuffer> basis_out,
                                  xla::ffi::Result<xla::ffi::AnyBuffer> block_out,
                                  xla::ffi::Result<xla::ffi::AnyBuffer> coefficients,
                                  xla::ffi::Result<xla::ffi::AnyBuffer> factor,
                                  xla::ffi::Result<xla::ffi::AnyBuffer> info,
                                  xla::ffi::Result<xla::ffi::AnyBuffer> workspace, double scale,
                                  double lazy_below) {
  namespace ffi = xla::ffi;
  const char* op = "curvax.block_ortho";
  BlockOrthoArgs args = {};
  CURVAX_RETURN_IF_ERROR(ReadBasis(op, basis, &args));
  args.stride = args.n;
  const auto shape = block.dimensions();
  if (shape.size() != 2 || shape[1] < 1 || shape[1] > args.stride) {
    return ffi::Error::InvalidArgument(
        std::string(op) + ": block must have shape (b, n), with n from 1 to the basis' " +
        std::to_string(args.stride) + " columns, got " + ShapeText(shape));
  }
  args.n = shape[1];
  const int64_t rows = args.rows, n = args.n, b = shape[0];
  const ffi::DataType type = basis.element_type(), compute = ComputeType(type);
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "block", block, compute, {b, n}));
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "used", used, ffi::DataType::S32, {}));
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "seed", seed, ffi::DataType::U32, {2}));
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "basis result", *basis_out, type, {rows, args.stride}));
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "block result", *block_out, compute, {b, n}));
  CURVAX_RETURN_IF_ERROR(
      CheckBuffer(op, "coefficients", *coefficients, ffi::DataType::F64, {rows, b}));
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "factor", *factor, ffi::DataType::F64, {b, b}));
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "info", *info, ffi::DataType::F64, {4}));
  if (b < 1 || b > kMaxBlock) {
    return ffi::Error::InvalidArgument(std::string(op) + ": block must have 1 to " +
                                       std::to_string(kMaxBlock) + " rows, got " +
                                       std::to_string(b));
  }
  args.block = b;
  args.scale = scale;
  args.lazy_below = lazy_below;
  args.basis = basis_out->untyped_data();
  args.w = block_out->untyped_data();
  args.coefficients = static_cast<double*>(coefficients->untyped_data());
  args.factor = static_cast<double*>(factor->untyped_data());
  args.info = static_cast<double*>(info->untyped_data());
  CURVAX_RETURN_IF_ERROR(Platform::Check(op, args, used));
  CURVAX_RETURN_IF_ERROR(CopyIfDifferent<Platform>(basis, basis_out, context));
  CURVAX_RETURN_IF_ERROR(CopyIfDifferent<Platform>(block, block_out, context));
  return Platform::Run(op, &args, used, seed, context, *workspace);
}

template <typename Platform>
xla::ffi::Error RotateBasisHandler(typename Platform::Context context, xla::ffi::AnyBuffer basis,
                                   xla::ffi::AnyBuffer rotation, xla::ffi::AnyBuffer used,
                                   xla::ffi::AnyBuffer kept,
                                   xla::ffi::Result<xla::ffi::AnyBuffer> basis_out,
                                   xla::ffi::Result<xla::ffi::AnyBuffer> workspace) {
  namespace ffi = xla::ffi;
  const char* op = "curvax.rotate_basis";
  RotateBasisArgs args = {};
  CURVAX_RETURN_IF_ERROR(ReadBasis(op, basis, &args));
  const int64_t rows = args.rows;
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "rotation", rotation, ffi::DataType::F64, {rows, rows}));
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "used", used, ffi::DataType::S32, {}));
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "kept", kept, ffi::DataType::S32, {}));
  CURVAX_RETURN_IF_ERROR(
      CheckBuffer(op, "basis result", *basis_out, basis.element_type(), {rows, args.n}));
  args.basis = basis_out->untyped_data();
  args.rotation = static_cast<const double*>(rotation.untyped_data());
  CURVAX_RETURN_IF_ERROR(Platform::Check(op, args, used, kept));
  CURVAX_RETURN_IF_ERROR(CopyIfDifferent<Platform>(basis, basis_out, context));
  return Platform::Run(op, &args, used, kept, context, *workspace);
}

// `Argument`: what the context is decoded from, ffi::ThreadPool or ffi::PlatformStream<...>.
template <typename Argument>
auto BindBlockOrtho() {
  return xla::ffi::Ffi::Bind()
      .Ctx<Argument>()
      .template Arg<xla::ffi::AnyBuffer>()
      .template Arg<xla::ffi::AnyBuffer>()
      .template Arg<xla::ffi::AnyBuffer>()
      .template Arg<xla::ffi::AnyBuffer>()
      .template Ret<xla::ffi::AnyBuffer>()
      .template Ret<xla::ffi::AnyBuffer>()
      .template Ret<xla::ffi::AnyBuffer>()
      .template Ret<xla::ffi::AnyBuffer>()
      .template Ret<xla::ffi::AnyBuffer>()
      .template Ret<xla::ffi::AnyBuffer>()
      .template Attr<double>("scale")
      .template Attr<double>("lazy_below");
}
template <typename Argument>
auto BindRotateBasis() {
  return xla::ffi::Ffi::Bind()
      .Ctx<Argument>()
      .template Arg<xla::ffi::AnyBuffer>()
      .template Arg<xla::ffi::AnyBuffer>()
      .template Arg<xla::ffi::AnyBuffer>()
      .template Arg<xla::ffi::AnyBuffer>()
      .template Ret<xla::ffi::AnyBuffer>()
      .template Ret<xla::ffi::AnyBuffer>();
}

}  // namespace curvax

#endif  // CURVAX_CSRC_BLOCK_ORTHO_H_
