// curvax.matmul_sum: C = [C +] op(A_1) op(B_1) + op(A_2) op(B_2).
//
//   a_1, b_1, [a_2, b_2], [c] -> c (batch, m, n) or (m, n)
//
// with a (batch, m, k) or (m, k), and b (batch, k, n) or (k, n); the last two axes of every a are
// swapped if transpose_a, of every b if transpose_b. The result is meant to alias c; it works
// unaliased. A matrix stays one, with no batch of 1: a reshape would cost a copy where another call
// writes over the result.
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "csrc/cpu/platform.h"
#include "csrc/handlers.h"

namespace curvax {
namespace {

namespace ffi = xla::ffi;

constexpr char kOp[] = "curvax.matmul_sum";

// Describes a matrix of `rows` by `columns`, or a batch of them, stored transposed if `transposed`.
ffi::Error ReadOperand(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType type,
                       bool transposed, int64_t batch, int64_t rows, int64_t columns,
                       MatrixBatch* out) {
  const int64_t first = transposed ? columns : rows, second = transposed ? rows : columns;
  const bool single = buffer.dimensions().size() == 2;
  CURVAX_RETURN_IF_ERROR(single ? CheckBuffer(kOp, name, buffer, type, {first, second})
                                : CheckBuffer(kOp, name, buffer, type, {batch, first, second}));
  out->data = buffer.untyped_data();
  out->batch = single ? 0 : first * second;
  out->row = transposed ? 1 : second;
  out->column = transposed ? second : 1;
  return ffi::Error::Success();
}

// A result of some megabytes is new memory, which the kernel writes, and reads again, in columns:
// with pages of 4 KB, a page fault or a TLB miss at every row. A hint; refused, nothing is lost.
void AskForHugePages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

ffi::Error CheckSame(const ffi::AnyBuffer& c, const ffi::AnyBuffer& result) {
  const auto shape = result.dimensions();
  if (shape.size() == 2) {
    return CheckBuffer(kOp, "c", c, result.element_type(), {shape[0], shape[1]});
  }
  return CheckBuffer(kOp, "c", c, result.element_type(), {shape[0], shape[1], shape[2]});
}

ffi::Error ReadOperands(const ffi::RemainingArgs& operands, const ffi::AnyBuffer& c,
                        bool transpose_a, bool transpose_b, MatmulSumArgs* args) {
  const auto shape = c.dimensions();
  const ffi::DataType type = c.element_type();
  const size_t pairs = operands.size() / 2;
  const size_t axes = shape.size();
  if (pairs < 1 || pairs > kMaxTerms || !(axes == 2 || axes == 3)) {
    return ffi::Error::InvalidArgument(
        std::string(kOp) + ": one or two products with a result (batch, m, n) or (m, n)");
  }
  if (type != ffi::DataType::F32 && type != ffi::DataType::F64) {
    return ffi::Error::InvalidArgument(std::string(kOp) + ": the result must be f32 or f64");
  }
  *args = MatmulSumArgs{};
  args->dtype = *ToDType(type);
  args->batch = axes == 3 ? shape[0] : 1;
  args->m = shape[axes - 2];
  args->n = shape[axes - 1];
  args->terms = static_cast<int>(pairs);
  args->add = operands.size() % 2 == 1;
  for (size_t t = 0; t < pairs; ++t) {
    const auto a = operands.get<ffi::AnyBuffer>(2 * t);
    const auto b = operands.get<ffi::AnyBuffer>(2 * t + 1);
    if (a.has_error()) return a.error();
    if (b.has_error()) return b.error();
    const auto a_shape = a->dimensions();
    if (t == 0 && a_shape.size() >= 2) args->k = a_shape[a_shape.size() - (transpose_a ? 2 : 1)];
    CURVAX_RETURN_IF_ERROR(
        ReadOperand("a", *a, type, transpose_a, args->batch, args->m, args->k, &args->a[t]));
    CURVAX_RETURN_IF_ERROR(
        ReadOperand("b", *b, type, transpose_b, args->batch, args->k, args->n, &args->b[t]));
  }
  return ffi::Error::Success();
}

ffi::Error MatmulSumHandler(ffi::ThreadPool threads, ffi::RemainingArgs operands,
                            ffi::Result<ffi::AnyBuffer> result, bool transpose_a,
                            bool transpose_b) {
  MatmulSumArgs args;
  CURVAX_RETURN_IF_ERROR(ReadOperands(operands, *result, transpose_a, transpose_b, &args));
  args.c = result->untyped_data();
  if (args.add) {
    const auto start = operands.get<ffi::AnyBuffer>(operands.size() - 1);
    if (start.has_error()) return start.error();
    CURVAX_RETURN_IF_ERROR(CheckSame(*start, *result));
    CURVAX_RETURN_IF_ERROR(CopyIfDifferent<CpuPlatform>(*start, result, threads));
  } else {
    AskForHugePages(result->untyped_data(), result->size_bytes());
  }
  return RunKernel(kOp, threads, &KernelTable::matmul_sum_workspace_bytes, &KernelTable::matmul_sum,
                   &args);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(curvax_cpu_matmul_sum, MatmulSumHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("transpose_a")
                                  .Attr<bool>("transpose_b"));

}  // namespace curvax
