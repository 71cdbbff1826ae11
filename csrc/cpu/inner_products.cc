// curvax.inner_products: inner products in float64 of rows, or of combinations of them.
//
//   coefficients f64 (combinations, rows of all sets), then of each set a matrix (rows, columns)
//   and the first row s32 -> products f64
//
// with attributes n, the length of the rows, counts, how many rows each set has, and runs (first,
// begin, count), which of the combinations are multiplied. No combinations: the rows themselves
// are.
#include <vector>

#include "csrc/cpu/platform.h"
#include "csrc/handlers.h"

namespace curvax {
namespace {

namespace ffi = xla::ffi;

constexpr char kOp[] = "curvax.inner_products";

ffi::Error Invalid(const std::string& text) {
  return ffi::Error::InvalidArgument(std::string(kOp) + ": " + text);
}

ffi::Error ReadSet(const ffi::AnyBuffer& matrix, const ffi::AnyBuffer& start, int64_t count,
                   int64_t n, RowSet* out) {
  const auto shape = matrix.dimensions();
  const std::optional<DType> dtype = ToDType(matrix.element_type());
  if (!dtype) return Invalid("rows must be f32, f64, bf16 or f16");
  if (shape.size() != 2 || n > shape[1]) {
    return Invalid("a set of rows must have shape (rows, columns) with at least n = " +
                   std::to_string(n) + " columns, got " + ShapeText(shape));
  }
  CURVAX_RETURN_IF_ERROR(CheckBuffer(kOp, "start", start, ffi::DataType::S32, {}));
  const int64_t first = *static_cast<const int32_t*>(start.untyped_data());
  if (first < 0 || count < 1 || first + count > shape[0]) {
    return Invalid(std::to_string(count) + " rows from " + std::to_string(first) +
                   " on must be rows of a matrix of shape " + ShapeText(shape));
  }
  const int64_t row_bytes = shape[0] == 0 ? 0 : int64_t(matrix.size_bytes()) / shape[0];
  *out = {*dtype, static_cast<const char*>(matrix.untyped_data()) + first * row_bytes, shape[1],
          count};
  return ffi::Error::Success();
}

ffi::Error ReadRuns(ffi::Span<const int64_t> runs, int64_t vectors, int64_t products,
                    std::vector<ProductRun>* out) {
  int64_t total = 0;
  for (size_t i = 0; i + 2 < runs.size(); i += 3) {
    const ProductRun run = {runs[i], runs[i + 1], runs[i + 2]};
    if (run.first < 0 || run.begin < 0 || run.count < 0 || run.first >= vectors ||
        run.begin + run.count > vectors) {
      return Invalid("runs must lie within the " + std::to_string(vectors) + " vectors");
    }
    total += run.count;
    out->push_back(run);
  }
  if (runs.size() % 3 != 0 || total != products) {
    return Invalid("runs must have (first, begin, count) of all products, got " +
                   std::to_string(total) + " for " + std::to_string(products));
  }
  return ffi::Error::Success();
}

ffi::Error InnerProductsHandler(ffi::ThreadPool threads, ffi::RemainingArgs operands,
                                ffi::Result<ffi::BufferR1<ffi::F64>> products, int64_t n,
                                ffi::Span<const int64_t> counts, ffi::Span<const int64_t> runs) {
  InnerProductsArgs args = {};
  args.n = n;
  if (counts.size() < 1 || counts.size() > kMaxRowSets ||
      operands.size() != 1 + 2 * counts.size()) {
    return Invalid("coefficients, then one to three pairs of a matrix and its first row");
  }
  int64_t rows = 0;
  for (size_t s = 0; s < counts.size(); ++s) {
    const auto matrix = operands.get<ffi::AnyBuffer>(1 + 2 * s);
    const auto start = operands.get<ffi::AnyBuffer>(2 + 2 * s);
    if (matrix.has_error()) return matrix.error();
    if (start.has_error()) return start.error();
    CURVAX_RETURN_IF_ERROR(ReadSet(*matrix, *start, counts[s], n, &args.sets[s]));
    rows += counts[s];
  }
  args.num_sets = static_cast<int>(counts.size());
  const auto coefficients = operands.get<ffi::AnyBuffer>(0);
  if (coefficients.has_error()) return coefficients.error();
  const auto shape = coefficients->dimensions();
  args.combinations = shape.size() == 2 ? shape[0] : 0;
  CURVAX_RETURN_IF_ERROR(CheckBuffer(kOp, "coefficients", *coefficients, ffi::DataType::F64,
                                     {args.combinations, rows}));
  args.coefficients = static_cast<const double*>(coefficients->untyped_data());
  std::vector<ProductRun> read;
  CURVAX_RETURN_IF_ERROR(ReadRuns(runs, args.combinations > 0 ? args.combinations : rows,
                                  static_cast<int64_t>(products->element_count()), &read));
  args.num_runs = static_cast<int64_t>(read.size());
  args.runs = read.data();
  args.products = products->typed_data();
  return RunKernel(kOp, threads, &KernelTable::inner_products_workspace_bytes,
                   &KernelTable::inner_products, &args);
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

}  // namespace curvax
