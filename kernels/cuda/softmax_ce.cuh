// Softmax cross entropy of rows of logits on a GPU: loss, gradient and Hessian products.
//
// The equations are those of common/softmax_ce_terms.h.
//
// Algorithm, rows that fit shared memory (SoftmaxCeRow): one block per row. It reads the logits
// into shared memory while it asks for the first tangent to be brought to L2; reads the tangent
// there, replaces the logits by e^(z - max) and sums e and e u; reads the tangent again from L2 and
// writes the product over it. Further tangents find e in place. Device memory: logits read once,
// each tangent read and written once, 1 + 2b passes over an (N,V) array; a softcap keeps z in place
// of e and evaluates the exponential again. Longer rows (SoftmaxCePartSums, SoftmaxCePartProducts):
// several blocks share a row. The first kernel leaves the sums of each part in the workspace, the
// second adds them up and reads logits and tangents again: 2 + 3b passes.
//
// Every phase gives a thread the same elements, so that what it keeps in shared memory is its own
// and only the sums need barriers; the aligned positions are those of the logits' row, and vectors
// that the row's borders cut are read element by element.
// Accumulation: the compute type within a thread, double across threads and parts. Determinism: all
// sums are in a fixed order.
#ifndef CURVAX_CUDA_SOFTMAX_CE_CUH_
#define CURVAX_CUDA_SOFTMAX_CE_CUH_

#include "cuda/softmax_ce_row.cuh"

namespace curvax::CURVAX_LEVEL {

// What the label, the weight and the log-sum-exp of a row make of it.
template <typename C>
struct Row {
  bool skip;   // all results are 0
  bool valid;  // the label names a class
  int64_t label;
  double weight;
  double lse, kappa;

  __device__ Row(const SoftmaxCeArgs& args, int64_t row) {
    const int64_t given = args.labels[row];
    weight = static_cast<const C*>(args.weights)[row];
    const bool hessian_only = args.grad == nullptr && args.loss == nullptr;
    skip = given == args.ignore_index || (weight == 0 && hessian_only);
    valid = given >= 0 && given < args.vocab;
    label = valid ? given : 0;
    // A label that names no class poisons its row: a silent zero would look like a masked token.
    if (!valid) weight = NAN;
    lse = kappa = 0;
  }
  __device__ void SetLogSumExp(const SoftmaxCeArgs& args, double top, double sum) {
    lse = top + ::log(sum);
    kappa = 1 + 2 * args.z_loss * lse;
  }
  // By one thread of a row.
  __device__ void WriteScalars(const SoftmaxCeArgs& args, int64_t row, double z_label,
                               double z_sum) const {
    const double loss = valid ? SoftmaxCeLoss(args, lse, z_label, z_sum) : NAN;
    if (args.loss != nullptr) static_cast<C*>(args.loss)[row] = C(skip ? 0.0 : loss);
    if (args.lse != nullptr) static_cast<C*>(args.lse)[row] = C(lse);
  }
};

// Products and gradient of a part of a row, whose exponentials are relative to the row's maximum:
// their sum over the row is `sum`, and that of e f u_k is dot(k), asked for once and by all
// threads.
template <typename S, bool kCap, typename Dot>
__device__ __forceinline__ void WriteResults(const SoftmaxCeArgs& args, const Row<Compute<S>>& row,
                                             double sum, RowPart<S, kCap>& part, const Dot& dot) {
  using C = Compute<S>;
  const SoftmaxCeTargets targets(args);
  const C target_label = C(row.weight * targets.label), target_rest = C(row.weight * targets.rest);
  const C scale = C(row.weight / sum);
  for (int64_t k = 0; k < args.tangents; ++k) {
    const SoftmaxCeTerms<C> terms(args, row.kappa, dot(k) / sum);
    part.Product(k, scale, terms, target_label, target_rest, row.label);
  }
  // Last, since it may lie over the logits.
  if (args.grad != nullptr) {
    const SoftmaxCeTerms<C> terms(args, row.kappa, 0);
    part.Gradient(scale, terms, target_label, target_rest, row.label);
  }
}

template <typename S, bool kCap>
__global__ void __launch_bounds__(kMaxRowThreads<Compute<S>>, 1)
    SoftmaxCeRow(const __grid_constant__ SoftmaxCeArgs args) {
  using C = Compute<S>;
  const int64_t index = BlockIndex();
  Row<C> row(args, index);
  RowPart<S, kCap> part(args, index, 0, args.vocab);
  if (row.skip) {
    if (ThreadIndex() == 0) row.WriteScalars(args, index, 0, 0);
    return part.Clear();
  }
  // Read now, since the gradient may come over it.
  const C z_label =
      part.Cap(Widen(static_cast<const S*>(args.logits)[index * args.vocab + row.label]));
  double z_sum = 0, dot = 0;
  const bool smooth = args.loss != nullptr && args.label_smoothing != 0;
  const C top = part.ReadLogits(smooth ? &z_sum : nullptr);
  const double sum = part.Exponentials(top, &dot);
  row.SetLogSumExp(args, top, sum);
  if (ThreadIndex() == 0) row.WriteScalars(args, index, z_label, z_sum);

  WriteResults(args, row, sum, part, [&](int64_t k) { return k == 0 ? dot : part.Dot(k); });
}

// Sums of one part of a row: doubles in the workspace, those of the tangents last.
struct PartRecord {
  enum Field { kTop, kSum, kLogitSum, kLabelLogit, kDots };
  __device__ static double* Of(const SoftmaxCeArgs& args, int64_t parts, int64_t row,
                               int64_t part) {
    return static_cast<double*>(args.workspace) + (row * parts + part) * (kDots + args.tangents);
  }
};

template <typename S, bool kCap>
__global__ void __launch_bounds__(kPartThreads<Compute<S>>, 1)
    SoftmaxCePartSums(const __grid_constant__ SoftmaxCeArgs args) {
  using C = Compute<S>;
  constexpr int64_t kPart = kPartElements<C>;
  const int64_t parts = CeilDiv(args.vocab, kPart);
  const int64_t index = BlockIndex() / parts, which = BlockIndex() % parts, begin = which * kPart;
  const Row<C> row(args, index);
  if (row.skip) return;
  RowPart<S, kCap> part(args, index, begin, Min(kPart, args.vocab - begin));
  double z_sum = 0, dot = 0;
  const C top = part.ReadLogits(&z_sum);
  const double sum = part.Exponentials(top, &dot);
  double* record = PartRecord::Of(args, parts, index, which);
  if (ThreadIndex() == 0) {
    const bool here = row.label >= begin && row.label < begin + kPart;
    record[PartRecord::kTop] = top;
    record[PartRecord::kSum] = sum;
    record[PartRecord::kLogitSum] = z_sum;
    record[PartRecord::kLabelLogit] =
        here ? part.Cap(Widen(static_cast<const S*>(args.logits)[index * args.vocab + row.label]))
             : C{0};
  }
  for (int64_t k = 0; k < args.tangents; ++k) {
    const double total = k == 0 ? dot : part.Dot(k);
    if (ThreadIndex() == 0) record[PartRecord::kDots + k] = total;
  }
}

template <typename S, bool kCap>
__global__ void __launch_bounds__(kPartThreads<Compute<S>>, 1)
    SoftmaxCePartProducts(const __grid_constant__ SoftmaxCeArgs args) {
  using C = Compute<S>;
  constexpr int64_t kPart = kPartElements<C>;
  const int64_t parts = CeilDiv(args.vocab, kPart);
  const int64_t index = BlockIndex() / parts, which = BlockIndex() % parts, begin = which * kPart;
  Row<C> row(args, index);
  RowPart<S, kCap> part(args, index, begin, Min(kPart, args.vocab - begin));
  if (row.skip) {
    if (which == 0 && ThreadIndex() == 0) row.WriteScalars(args, index, 0, 0);
    return part.Clear();
  }
  const auto record = [&](int64_t p) { return PartRecord::Of(args, parts, index, p); };
  double* sums = reinterpret_cast<double*>(SharedMemory());
  double largest = -INFINITY;
  for (int64_t p = ThreadIndex(); p < parts; p += BlockSize()) {
    largest = Max(largest, record(p)[PartRecord::kTop]);
  }
  const double top = BlockMax(largest, sums);
  // Adds up a field of all parts, each thread some of them, relative to the row's maximum or as is.
  const auto total = [&](int64_t field, bool relative) {
    double own = 0;
    for (int64_t p = ThreadIndex(); p < parts; p += BlockSize()) {
      const double part_top = record(p)[PartRecord::kTop];
      const double share = part_top == -INFINITY ? 0.0 : double(Exp(C(part_top - top)));
      own += record(p)[field] * (relative ? share : 1.0);
    }
    return BlockSum(own, sums);
  };
  const double sum = total(PartRecord::kSum, true);
  const double z_sum = total(PartRecord::kLogitSum, false);
  const double z_label = total(PartRecord::kLabelLogit, false);
  row.SetLogSumExp(args, top, sum);
  if (which == 0 && ThreadIndex() == 0) row.WriteScalars(args, index, z_label, z_sum);

  part.ReadLogits(nullptr);
  part.Exponentials(C(top), nullptr);
  WriteResults(args, row, sum, part, [&](int64_t k) { return total(PartRecord::kDots + k, true); });
}

}  // namespace curvax::CURVAX_LEVEL

#endif  // CURVAX_CUDA_SOFTMAX_CE_CUH_
