// curvax.inner_products and curvax.residual_products: sums of products in float64 of stored rows.
//
//   inner_products:    of each set of rows a matrix (rows, columns) and the first row s32
//                      -> products f64
//   residual_products: basis (rows, columns), first row of x s32, first row of q s32, w (b, n),
//                      shifts f64 (b), thetas f64 (b), coupling f64 (b, b) -> products f64 (b, 4)
//
// inner_products has the attributes n, the length of the rows, counts, how many each set has, and
// runs (first, begin, count), which rows are multiplied; curvax/inner_products.h says of what the
// products are.
#include <vector>

#include "csrc/cpu/platform.h"
#include "csrc/handlers.h"

namespace curvax {
namespace {

namespace ffi = xla::ffi;

ffi::Error Invalid(const char* op, const std::string& text) {
  return ffi::Error::InvalidArgument(std::string(op) + ": " + text);
}

ffi::Error ReadSet(const char* op, const ffi::AnyBuffer& matrix, const ffi::AnyBuffer& start,
                   int64_t count, int64_t n, RowSet* out) {
  const auto shape = matrix.dimensions();
  const std::optional<DType> dtype = ToDType(matrix.element_type());
  if (!dtype) return Invalid(op, "rows must be f32, f64, bf16 or f16");
  if (shape.size() != 2 || n > shape[1]) {
    return Invalid(op, "a set of rows must have shape (rows, columns) with at least n = " +
                           std::to_string(n) + " columns, got " + ShapeText(shape));
  }
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "start", start, ffi::DataType::S32, {}));
  const int64_t first = *static_cast<const int32_t*>(start.untyped_data());
  if (first < 0 || count < 1 || first + count > shape[0]) {
    return Invalid(op, std::to_string(count) + " rows from " + std::to_string(first) +
                           " on must be rows of a matrix of shape " + ShapeText(shape));
  }
  const int64_t row_bytes = shape[0] == 0 ? 0 : int64_t(matrix.size_bytes()) / shape[0];
  *out = {*dtype, static_cast<const char*>(matrix.untyped_data()) + first * row_bytes, shape[1],
          count};
  return ffi::Error::Success();
}

ffi::Error ReadRuns(const char* op, ffi::Span<const int64_t> runs, int64_t vectors,
                    int64_t products, std::vector<ProductRun>* out) {
  int64_t total = 0;
  for (size_t i = 0; i + 2 < runs.size(); i += 3) {
    const ProductRun run = {runs[i], runs[i + 1], runs[i + 2]};
    if (run.first < 0 || run.begin < 0 || run.count < 0 || run.first >= vectors ||
        run.begin + run.count > vectors) {
      return Invalid(op, "runs must lie within the " + std::to_string(vectors) + " vectors");
    }
    total += run.count;
    out->push_back(run);
  }
  if (runs.size() % 3 != 0 || total != products) {
    return Invalid(op, "runs must have (first, begin, count) of all products, got " +
                           std::to_string(total) + " for " + std::to_string(products));
  }
  return ffi::Error::Success();
}

ffi::Error InnerProductsHandler(ffi::ThreadPool threads, ffi::RemainingArgs operands,
                                ffi::Result<ffi::BufferR1<ffi::F64>> products, int64_t n,
                                ffi::Span<const int64_t> counts, ffi::Span<const int64_t> runs) {
  const char* op = "curvax.inner_products";
  InnerProductsArgs args = {};
  args.n = n;
  if (counts.size() < 1 || counts.size() > kMaxRowSets || operands.size() != 2 * counts.size()) {
    return Invalid(op, "one to three pairs of a matrix and its first row");
  }
  int64_t rows = 0;
  for (size_t s = 0; s < counts.size(); ++s) {
    const auto matrix = operands.get<ffi::AnyBuffer>(2 * s);
    const auto start = operands.get<ffi::AnyBuffer>(2 * s + 1);
    if (matrix.has_error()) return matrix.error();
    if (start.has_error()) return start.error();
    CURVAX_RETURN_IF_ERROR(ReadSet(op, *matrix, *start, counts[s], n, &args.sets[s]));
    rows += counts[s];
  }
  args.num_sets = static_cast<int>(counts.size());
  std::vector<ProductRun> read;
  CURVAX_RETURN_IF_ERROR(
      ReadRuns(op, runs, rows, static_cast<int64_t>(products->element_count()), &read));
  args.num_runs = static_cast<int64_t>(read.size());
  args.runs = read.data();
  args.products = products->typed_data();
  return RunKernel(op, threads, &KernelTable::inner_products_workspace_bytes,
                   &KernelTable::inner_products, &args);
}

ffi::Error ResidualProductsHandler(ffi::ThreadPool threads, ffi::AnyBuffer basis,
                                   ffi::AnyBuffer start, ffi::AnyBuffer following, ffi::AnyBuffer w,
                                   ffi::AnyBuffer shifts, ffi::AnyBuffer thetas,
                                   ffi::AnyBuffer coupling, ffi::Result<ffi::AnyBuffer> products) {
  const char* op = "curvax.residual_products";
  const auto shape = w.dimensions();
  if (shape.size() != 2 || shape[0] < 1 || shape[1] < 1) {
    return Invalid(op, "w must have shape (b, n), at least 1 each, got " + ShapeText(shape));
  }
  const int64_t b = shape[0], n = shape[1];
  RowSet x, q;
  CURVAX_RETURN_IF_ERROR(ReadSet(op, basis, start, b, n, &x));
  CURVAX_RETURN_IF_ERROR(ReadSet(op, basis, following, b, n, &q));
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "w", w, ComputeType(basis.element_type()), {b, n}));
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "shifts", shifts, ffi::DataType::F64, {b}));
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "thetas", thetas, ffi::DataType::F64, {b}));
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "coupling", coupling, ffi::DataType::F64, {b, b}));
  CURVAX_RETURN_IF_ERROR(CheckBuffer(op, "products", *products, ffi::DataType::F64, {b, 4}));
  ResidualProductsArgs args = {};
  args.dtype = x.dtype;
  args.n = n;
  args.pairs = b;
  args.x = x.rows;
  args.q = q.rows;
  args.stride = x.stride;
  args.w = w.untyped_data();
  args.shifts = static_cast<const double*>(shifts.untyped_data());
  args.thetas = static_cast<const double*>(thetas.untyped_data());
  args.coupling = static_cast<const double*>(coupling.untyped_data());
  args.products = static_cast<double*>(products->untyped_data());
  return RunKernel(op, threads, &KernelTable::residual_products_workspace_bytes,
                   &KernelTable::residual_products, &args);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(curvax_cpu_inner_products, InnerProductsHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .Ret<ffi::BufferR1<ffi::F64>>()
                                  .Attr<int64_t>("n")
                                  .Attr<ffi::Span<const int64_t>>("counts")
                                  .Attr<ffi::Span<const int64_t>>("runs"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(curvax_cpu_residual_products, ResidualProductsHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

}  // namespace curvax
