// curvax.softmax_ce_hvp and curvax.softmax_ce_derivatives, for any platform.
//
//   hvp:         logits (N,V), tangents (b,N,V) or (N,V), labels (N) s32, weights (N)
//                -> products, workspace
//   derivatives: the same operands -> gradient (N,V), products, loss (N), lse (N), workspace
//
// A reshape between (N,V) and (1,N,V) outside the call would cost a copy of the donated tangents.
// Products are meant to alias the tangents, and the gradient the logits; both work unaliased. The
// workspace is a result, since memory asked for while the handler runs would not outlive a capture;
// its size is what the CUDA module asks for, and a CPU does not use it.
//
// A Platform has a Context, and Run(op, args, context, workspace), which calls the kernel.
#ifndef CURVAX_CSRC_SOFTMAX_CE_H_
#define CURVAX_CSRC_SOFTMAX_CE_H_

#include <utility>

#include "csrc/ffi_helpers.h"
#include "curvax/softmax_ce.h"

namespace curvax {

struct SoftmaxCeOptions {
  double softcap, z_loss, label_smoothing;
  int64_t ignore_index;
};

inline xla::ffi::Error CheckTangents(const char* op, const char* name,
                                     const xla::ffi::AnyBuffer& buffer, xla::ffi::DataType type,
                                     bool single, int64_t count, int64_t rows, int64_t vocab) {
  if (single) return CheckBuffer(op, name, buffer, type, {rows, vocab});
  return CheckBuffer(op, name, buffer, type, {count, rows, vocab});
}

// Checks the operands and describes them; outputs are left null.
inline xla::ffi::Error ReadOperands(const char* op, const xla::ffi::AnyBuffer& logits,
                                    const xla::ffi::AnyBuffer& tangents,
                                    const xla::ffi::AnyBuffer& labels,
                                    const xla::ffi::AnyBuffer& weights,
                                    const SoftmaxCeOptions& options, SoftmaxCeArgs* args) {
  namespace ffi = xla::ffi;
  const auto shape = logits.dimensions();
  const auto tangent_shape = tangents.dimensions();
  const bool single = tangent_shape.size() == 2;
  if (shape.size() != 2 || !(single || tangent_shape.size() == 3)) {
    return ffi::Error::InvalidArgument(
        std::string(op) + ": logits must have shape (N, V), tangents (b, N, V) or (N, V)");
  }
  const std::optional<DType> dtype = ToDType(logits.element_type());
  if (!dtype) {
    return ffi::Error::InvalidArgument(std::string(op) + ": logits must be f32, f64, bf16 or f16");
  }
  const int64_t rows = shape[0], vocab = shape[1], count = single ? 1 : tangent_shape[0];
  if (vocab == 0) {
    return ffi::Error::InvalidArgument(std::string(op) + ": logits must have a class, got shape " +
                                       ShapeText(shape));
  }
  CURVAX_RETURN_IF_ERROR(
      CheckTangents(op, "tangents", tangents, logits.element_type(), single, count, rows, vocab));
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "labels", labels, ffi::DataType::S32, {rows}));
  CURVAX_RETURN_IF_ERROR(
      CheckBuffer(op, "weights", weights, ComputeType(logits.element_type()), {rows}));
  *args = SoftmaxCeArgs{};
  args->dtype = *dtype;
  args->rows = rows;
  args->vocab = vocab;
  args->tangents = count;
  args->logits = logits.untyped_data();
  args->u = tangents.untyped_data();
  args->labels = static_cast<const int32_t*>(labels.untyped_data());
  args->weights = weights.untyped_data();
  args->softcap = options.softcap;
  args->z_loss = options.z_loss;
  args->label_smoothing = options.label_smoothing;
  args->ignore_index = options.ignore_index;
  return ffi::Error::Success();
}

template <typename Platform>
xla::ffi::Error SoftmaxCeHvp(typename Platform::Context context, xla::ffi::AnyBuffer logits,
                             xla::ffi::AnyBuffer tangents, xla::ffi::AnyBuffer labels,
                             xla::ffi::AnyBuffer weights,
                             xla::ffi::Result<xla::ffi::AnyBuffer> products,
                             xla::ffi::Result<xla::ffi::AnyBuffer> workspace, double softcap,
                             double z_loss, double label_smoothing, int64_t ignore_index) {
  const char* op = "curvax.softmax_ce_hvp";
  SoftmaxCeArgs args;
  CURVAX_RETURN_IF_ERROR(ReadOperands(op, logits, tangents, labels, weights,
                                      {softcap, z_loss, label_smoothing, ignore_index}, &args));
  CURVAX_RETURN_IF_ERROR(CheckTangents(op, "products", *products, logits.element_type(),
                                       tangents.dimensions().size() == 2, args.tangents, args.rows,
                                       args.vocab));
  args.products = products->untyped_data();
  return Platform::Run(op, &args, context, *workspace);
}

template <typename Platform>
xla::ffi::Error SoftmaxCeDerivatives(
    typename Platform::Context context, xla::ffi::AnyBuffer logits, xla::ffi::AnyBuffer tangents,
    xla::ffi::AnyBuffer labels, xla::ffi::AnyBuffer weights,
    xla::ffi::Result<xla::ffi::AnyBuffer> grad, xla::ffi::Result<xla::ffi::AnyBuffer> products,
    xla::ffi::Result<xla::ffi::AnyBuffer> loss, xla::ffi::Result<xla::ffi::AnyBuffer> lse,
    xla::ffi::Result<xla::ffi::AnyBuffer> workspace, double softcap, double z_loss,
    double label_smoothing, int64_t ignore_index) {
  const char* op = "curvax.softmax_ce_derivatives";
  SoftmaxCeArgs args;
  CURVAX_RETURN_IF_ERROR(ReadOperands(op, logits, tangents, labels, weights,
                                      {softcap, z_loss, label_smoothing, ignore_index}, &args));
  const xla::ffi::DataType type = logits.element_type();
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "grad", *grad, type, {args.rows, args.vocab}));
  CURVAX_RETURN_IF_ERROR(CheckTangents(op, "products", *products, type,
                                       tangents.dimensions().size() == 2, args.tangents, args.rows,
                                       args.vocab));
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "loss", *loss, ComputeType(type), {args.rows}));
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "lse", *lse, ComputeType(type), {args.rows}));
  args.grad = grad->untyped_data();
  args.products = products->untyped_data();
  args.loss = loss->untyped_data();
  args.lse = lse->untyped_data();
  return Platform::Run(op, &args, context, *workspace);
}

template <typename Argument>
auto WithSoftmaxCeOperands() {
  return xla::ffi::Ffi::Bind()
      .Ctx<Argument>()
      .template Arg<xla::ffi::AnyBuffer>()
      .template Arg<xla::ffi::AnyBuffer>()
      .template Arg<xla::ffi::AnyBuffer>()
      .template Arg<xla::ffi::AnyBuffer>();
}
template <typename Binding>
auto WithSoftmaxCeOptions(Binding binding) {
  return std::move(binding)
      .template Attr<double>("softcap")
      .template Attr<double>("z_loss")
      .template Attr<double>("label_smoothing")
      .template Attr<int64_t>("ignore_index");
}
// `Argument`: what the context is decoded from, ffi::ThreadPool or ffi::PlatformStream<...>.
template <typename Argument>
auto BindSoftmaxCeHvp() {
  return WithSoftmaxCeOptions(WithSoftmaxCeOperands<Argument>()
                                  .template Ret<xla::ffi::AnyBuffer>()
                                  .template Ret<xla::ffi::AnyBuffer>());
}
template <typename Argument>
auto BindSoftmaxCeDerivatives() {
  return WithSoftmaxCeOptions(WithSoftmaxCeOperands<Argument>()
                                  .template Ret<xla::ffi::AnyBuffer>()
                                  .template Ret<xla::ffi::AnyBuffer>()
                                  .template Ret<xla::ffi::AnyBuffer>()
                                  .template Ret<xla::ffi::AnyBuffer>()
                                  .template Ret<xla::ffi::AnyBuffer>());
}

}  // namespace curvax

#endif  // CURVAX_CSRC_SOFTMAX_CE_H_
