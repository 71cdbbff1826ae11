// curvax.softmax_ce_hvp and curvax.softmax_ce_triple.
//
//   hvp:    logits (N,V), tangents (b,N,V) or (N,V), labels (N) s32, weights (N) -> products
//   triple: the same operands -> gradient (N,V), products, loss (N), lse (N)
//
// A reshape between (N,V) and (1,N,V) outside the call would cost a copy of the donated tangents.
// Products are meant to alias the tangents, and the gradient the logits; both work unaliased.
#include "csrc/handlers.h"
#include "csrc/run_kernel.h"

namespace curvax {
namespace {

namespace ffi = xla::ffi;

struct Options {
  double softcap, z_loss, label_smoothing;
  int64_t ignore_index;
};

ffi::Error CheckTangents(const char* op, const char* name, const ffi::AnyBuffer& buffer,
                         ffi::DataType type, bool single, int64_t count, int64_t rows,
                         int64_t vocab) {
  if (single) return CheckBuffer(op, name, buffer, type, {rows, vocab});
  return CheckBuffer(op, name, buffer, type, {count, rows, vocab});
}

// Checks the operands and describes them; outputs are left null.
ffi::Error ReadOperands(const char* op, const ffi::AnyBuffer& logits,
                        const ffi::AnyBuffer& tangents, const ffi::AnyBuffer& labels,
                        const ffi::AnyBuffer& weights, const Options& options,
                        SoftmaxCeArgs* args) {
  const auto shape = logits.dimensions();
  const auto tangent_shape = tangents.dimensions();
  const bool single = tangent_shape.size() == 2;
  if (shape.size() != 2 || !(single || tangent_shape.size() == 3)) {
    return ffi::Error::InvalidArgument(
        std::string(op) + ": logits must have shape (N, V), tangents (b, N, V) or (N, V)");
  }
  const std::optional<DType> dtype = ToDType(logits.element_type());
  if (!dtype || *dtype == DType::kF16) {
    return ffi::Error::InvalidArgument(std::string(op) + ": logits must be f32, f64 or bf16");
  }
  const int64_t rows = shape[0], vocab = shape[1], count = single ? 1 : tangent_shape[0];
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

ffi::Error Run(SoftmaxCeArgs* args, ffi::ThreadPool threads) {
  return RunKernel("curvax.softmax_ce", threads, &KernelTable::softmax_ce_workspace_bytes,
                   &KernelTable::softmax_ce, args);
}

ffi::Error SoftmaxCeHvp(ffi::ThreadPool threads, ffi::AnyBuffer logits, ffi::AnyBuffer tangents,
                        ffi::AnyBuffer labels, ffi::AnyBuffer weights,
                        ffi::Result<ffi::AnyBuffer> products, double softcap, double z_loss,
                        double label_smoothing, int64_t ignore_index) {
  SoftmaxCeArgs args;
  CURVAX_RETURN_IF_ERROR(ReadOperands("curvax.softmax_ce_hvp", logits, tangents, labels, weights,
                                      {softcap, z_loss, label_smoothing, ignore_index}, &args));
  CURVAX_RETURN_IF_ERROR(CheckTangents("curvax.softmax_ce_hvp", "products", *products,
                                       logits.element_type(), tangents.dimensions().size() == 2,
                                       args.tangents, args.rows, args.vocab));
  args.products = products->untyped_data();
  return Run(&args, threads);
}

ffi::Error SoftmaxCeTriple(ffi::ThreadPool threads, ffi::AnyBuffer logits, ffi::AnyBuffer tangents,
                           ffi::AnyBuffer labels, ffi::AnyBuffer weights,
                           ffi::Result<ffi::AnyBuffer> grad, ffi::Result<ffi::AnyBuffer> products,
                           ffi::Result<ffi::AnyBuffer> loss, ffi::Result<ffi::AnyBuffer> lse,
                           double softcap, double z_loss, double label_smoothing,
                           int64_t ignore_index) {
  const char* op = "curvax.softmax_ce_triple";
  SoftmaxCeArgs args;
  CURVAX_RETURN_IF_ERROR(ReadOperands(op, logits, tangents, labels, weights,
                                      {softcap, z_loss, label_smoothing, ignore_index}, &args));
  const ffi::DataType type = logits.element_type();
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
  return Run(&args, threads);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(curvax_cpu_softmax_ce_hvp, SoftmaxCeHvp,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<double>("softcap")
                                  .Attr<double>("z_loss")
                                  .Attr<double>("label_smoothing")
                                  .Attr<int64_t>("ignore_index"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(curvax_cpu_softmax_ce_triple, SoftmaxCeTriple,
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
                                  .Attr<double>("softcap")
                                  .Attr<double>("z_loss")
                                  .Attr<double>("label_smoothing")
                                  .Attr<int64_t>("ignore_index"));

}  // namespace curvax
