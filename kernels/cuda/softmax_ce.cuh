// Softmax cross entropy of rows of logits on a GPU: loss, gradient and Hessian products.
//
// The equations are those of common/softmax_ce_terms.h.
//
// Algorithm, rows that fit shared memory (SoftmaxCeRow): as many blocks as the device holds, each
// of which takes one row after another. It reads the logits into shared memory while it asks for
// the first tangent to be brought to L2; reads the tangent there, replaces the logits by
// e^(z - max), sums e and e u, and asks for the first half of the next row's logits, so that the
// memory has work in this phase too (the whole row would not fit L2 beside the tangents); reads the
// tangent again from L2 and writes the product over it. Further tangents find e in place. Label and
// weight are loaded a row ahead. Device memory: logits read once, each tangent read and written
// once, 1 + 2b passes over an (N,V) array; a softcap keeps z in place of e and evaluates the
// exponential again.
//
// Longer rows (SoftmaxCePartSums, SoftmaxCePartProducts): several blocks share a row, and a
// processor holds several blocks, whose phases overlap. The first kernel leaves the sums of each
// part in the workspace; the second reads logits and tangents again, and each of its warps adds up
// those sums for itself: 2 + 3b passes.
//
// Every phase gives a thread the same elements, so that what it keeps in shared memory is its own
// and only the sums need barriers.
// Accumulation: the compute type within a thread, double across threads and parts. Determinism: all
// sums are in an order that the row's length and the operands' alignment decide, whatever block
// works on the row.
#ifndef CURVAX_CUDA_SOFTMAX_CE_CUH_
#define CURVAX_CUDA_SOFTMAX_CE_CUH_

#include "cuda/softmax_ce_row.cuh"

namespace curvax::CURVAX_TARGET {

// Label and weight of a row, as they are in memory: nothing waits for them before they are used.
template <typename C>
struct RowInput {
  int32_t label;
  C weight;

  __device__ bool Skip(const SoftmaxCeArgs& args) const {  // all results are 0
    const bool hessian_only = args.grad == nullptr && args.loss == nullptr;
    return label == args.ignore_index || (weight == 0 && hessian_only);
  }
};

// The parts of rows that a block works on: every BlockCount()-th.
template <typename C>
class Queue {
 public:
  __device__ Queue(const SoftmaxCeArgs& args, int parts)
      : args_(args),
        parts_(parts),
        row_(BlockIndex() / parts),
        part_(static_cast<int>(BlockIndex() % parts)) {
    Load();
  }
  __device__ bool HasRow() const { return row_ < args_.rows; }
  __device__ int64_t row() const { return row_; }
  __device__ int part() const { return part_; }
  __device__ RowInput<C> input() const { return input_; }
  __device__ void Advance() {
    const int blocks = static_cast<int>(BlockCount());
    row_ += blocks / parts_;
    part_ += blocks % parts_;
    if (part_ >= parts_) {
      part_ -= parts_;
      ++row_;
    }
    Load();
  }

 private:
  __device__ void Load() {
    if (HasRow()) {
      input_ = {args_.labels[row_], static_cast<const C*>(args_.weights)[row_]};
    }
  }
  const SoftmaxCeArgs& args_;
  const int parts_;
  int64_t row_;
  int part_;
  RowInput<C> input_ = {};
};

// What the label, the weight and the log-sum-exp of a row make of it.
template <typename C>
struct Row {
  bool valid;  // the label names a class
  int label;
  C weight;
  double lse = 0, kappa = 1;

  __device__ Row(const SoftmaxCeArgs& args, const RowInput<C>& input)
      : valid(input.label >= 0 && input.label < args.vocab),
        label(valid ? input.label : 0),
        // If not, the row is poisoned: a silent zero would look like a masked token.
        weight(valid ? input.weight : C(NAN)) {}

  // The thread that writes the scalars needs lse; kappa, which all need, depends on it with a
  // z_loss alone.
  __device__ void SetLogSumExp(const SoftmaxCeArgs& args, double top, double sum) {
    if (args.z_loss == 0 && ThreadIndex() != 0) return;
    lse = top + ::log(sum);
    kappa = 1 + 2 * args.z_loss * lse;
  }
  __device__ static void WriteScalars(const SoftmaxCeArgs& args, int64_t row, double loss,
                                      double lse) {
    if (args.loss != nullptr) static_cast<C*>(args.loss)[row] = C(loss);
    if (args.lse != nullptr) static_cast<C*>(args.lse)[row] = C(lse);
  }
  // By the first thread.
  __device__ void WriteLoss(const SoftmaxCeArgs& args, int64_t row, double z_label,
                            double z_sum) const {
    WriteScalars(args, row, valid ? SoftmaxCeLoss(args, lse, z_label, z_sum) : NAN, lse);
  }
};

// The label's logit, which is read before the gradient comes over it.
template <typename S, bool kCap>
__device__ Compute<S> LabelLogit(const SoftmaxCeArgs& args, int64_t row, int64_t label,
                                 const RowPart<S, kCap>& part) {
  return part.Cap(Widen(static_cast<const S*>(args.logits)[row * args.vocab + label]));
}

// Of a row or a part of it: the largest z, and the sums of z, of e and of e f u_0.
template <typename C>
struct PartSums {
  C top;
  double logits, exponentials, dot;
};
// Reads the part, and leaves exponentials relative to its top in place. next() is a row of logits
// whose first half will be wanted, or null.
template <typename S, bool kCap, typename Next>
__device__ __forceinline__ PartSums<Compute<S>> ReadPart(const SoftmaxCeArgs& args,
                                                         RowPart<S, kCap>& part,
                                                         BlockReducer& reducer, const Next& next) {
  const Compute<S> top = reducer.Max(part.ReadLogits());
  const bool smooth = args.loss != nullptr && args.label_smoothing != 0;
  const double logits = smooth ? reducer.Sum(part.LogitSum()) : 0;
  double sums[2];
  if (args.tangents > 0) {
    part.template Exponentials<true>(top, next(), sums);
  } else {
    part.template Exponentials<false>(top, nullptr, sums);
  }
  reducer.Sum(sums);
  return {top, logits, sums[0], sums[1]};
}

// Products and gradient of a part of a row, whose exponentials are relative to the row's maximum:
// their sum over the row is `sum`, and that of e f u_k is dot(k), asked for once and by all
// threads.
template <typename S, bool kCap, typename Dot>
__device__ __forceinline__ void WriteResults(const SoftmaxCeArgs& args, const Row<Compute<S>>& row,
                                             double sum, RowPart<S, kCap>& part, const Dot& dot) {
  using C = Compute<S>;
  const SoftmaxCeTargets targets(args);
  const C scale = C(row.weight / sum);
  const auto factors = [&](double mu) {
    RowFactors<C> made = {SoftmaxCeTerms<C>(args, row.kappa, mu), C(row.weight * targets.label),
                          C(row.weight * targets.rest), part.Place(row.label)};
    made.terms.kappa *= scale;
    made.terms.constant *= scale;
    return made;
  };
  for (int64_t k = 0; k < args.tangents; ++k) part.Product(k, factors(dot(k) / sum));
  // Last, since it may lie over the logits.
  if (args.grad != nullptr) part.Gradient(factors(0));
}

template <typename S, bool kCap>
__global__ void __launch_bounds__(kMaxRowThreads<S>, 1)
    SoftmaxCeRow(const __grid_constant__ SoftmaxCeArgs args) {
  using C = Compute<S>;
  BlockReducer reducer(SharedMemory());
  Queue<C> queue(args, 1);
  while (queue.HasRow()) {
    const int64_t index = queue.row();
    const RowInput<C> input = queue.input();
    queue.Advance();
    RowPart<S, kCap> part(args, index, 0, args.vocab);
    if (input.Skip(args)) {
      if (ThreadIndex() == 0) Row<C>::WriteScalars(args, index, 0, 0);
      part.Clear();
      continue;
    }
    Row<C> row(args, input);
    C z_label = 0;
    if (ThreadIndex() == 0) z_label = LabelLogit(args, index, row.label, part);
    const PartSums<C> sums = ReadPart(args, part, reducer, [&]() -> const S* {
      const bool reads_next = queue.HasRow() && !queue.input().Skip(args);
      return reads_next ? static_cast<const S*>(args.logits) + queue.row() * args.vocab : nullptr;
    });
    row.SetLogSumExp(args, sums.top, sums.exponentials);
    if (ThreadIndex() == 0) row.WriteLoss(args, index, z_label, sums.logits);
    WriteResults(args, row, sums.exponentials, part,
                 [&](int64_t k) { return k == 0 ? sums.dot : reducer.Sum(part.Dot(k)); });
  }
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
__global__ void __launch_bounds__(kPartThreads, kPartSumsResidents<Compute<S>>)
    SoftmaxCePartSums(const __grid_constant__ SoftmaxCeArgs args) {
  using C = Compute<S>;
  constexpr int64_t kPart = kPartElements<C>;
  const int parts = static_cast<int>(CeilDiv(args.vocab, kPart));
  BlockReducer reducer(SharedMemory());
  Queue<C> queue(args, parts);
  while (queue.HasRow()) {
    const int64_t index = queue.row(), begin = queue.part() * kPart;
    const int which = queue.part();
    const RowInput<C> input = queue.input();
    queue.Advance();
    if (input.Skip(args)) continue;
    const Row<C> row(args, input);
    RowPart<S, kCap> part(args, index, begin, Min(kPart, args.vocab - begin));
    const PartSums<C> sums = ReadPart(args, part, reducer, []() -> const S* { return nullptr; });
    double* record = PartRecord::Of(args, parts, index, which);
    if (ThreadIndex() == 0) {
      const bool here = row.label >= begin && row.label < begin + kPart;
      record[PartRecord::kTop] = sums.top;
      record[PartRecord::kSum] = sums.exponentials;
      record[PartRecord::kLogitSum] = sums.logits;
      record[PartRecord::kLabelLogit] = here ? LabelLogit(args, index, row.label, part) : C{0};
    }
    for (int64_t k = 0; k < args.tangents; ++k) {
      const double dot = k == 0 ? sums.dot : reducer.Sum(part.Dot(k));
      if (ThreadIndex() == 0) record[PartRecord::kDots + k] = dot;
    }
  }
}

// Sums of the records of a row's parts, which each warp forms for itself: a lane those of every
// 32nd part (there are seldom more), then across the lanes.
template <typename C>
class RowRecords {
 public:
  __device__ RowRecords(const SoftmaxCeArgs& args, int parts, int64_t row)
      : first_(PartRecord::Of(args, parts, row, 0)),
        parts_(parts),
        stride_(static_cast<int>(PartRecord::kDots + args.tangents)) {
    double own = -INFINITY;
    ForOwn([&](const double* record) { own = Max(own, record[PartRecord::kTop]); });
    top = WarpMax(own);
  }
  __device__ double Sum(int64_t field) const {
    double own = 0;
    ForOwn([&](const double* record) { own += record[field]; });
    return WarpSum(own);
  }
  // Of a field that is relative to the largest logit of its part: relative to that of the row.
  __device__ double SumToTop(int64_t field) const {
    double own = 0;
    ForOwn([&](const double* record) {
      const double part_top = record[PartRecord::kTop];
      const double share = part_top == -INFINITY ? 0.0 : double(Exp(C(part_top - top)));
      own += record[field] * share;
    });
    return WarpSum(own);
  }
  double top;

 private:
  template <typename F>
  __device__ void ForOwn(const F& f) const {
#pragma unroll 1
    for (int p = Lane(); p < parts_; p += kWarpSize) f(first_ + int64_t{stride_} * p);
  }
  const double* const first_;
  const int parts_, stride_;
};

template <typename S, bool kCap>
__global__ void __launch_bounds__(kPartThreads, kPartProductsResidents<Compute<S>>)
    SoftmaxCePartProducts(const __grid_constant__ SoftmaxCeArgs args) {
  using C = Compute<S>;
  constexpr int64_t kPart = kPartElements<C>;
  const int parts = static_cast<int>(CeilDiv(args.vocab, kPart));
  Queue<C> queue(args, parts);
  while (queue.HasRow()) {
    const int64_t index = queue.row(), begin = queue.part() * kPart;
    const int which = queue.part();
    const RowInput<C> input = queue.input();
    queue.Advance();
    RowPart<S, kCap> part(args, index, begin, Min(kPart, args.vocab - begin));
    if (input.Skip(args)) {
      if (which == 0 && ThreadIndex() == 0) Row<C>::WriteScalars(args, index, 0, 0);
      part.Clear();
      continue;
    }
    // Before the records, so that nothing has to come back before the memory has work.
    part.ReadLogits();
    const RowRecords<C> records(args, parts, index);
    const double sum = records.SumToTop(PartRecord::kSum);
    Row<C> row(args, input);
    row.SetLogSumExp(args, records.top, sum);
    if (which == 0 && Warp() == 0) {
      const double z_label = records.Sum(PartRecord::kLabelLogit);
      const double z_sum = records.Sum(PartRecord::kLogitSum);
      if (Lane() == 0) row.WriteLoss(args, index, z_label, z_sum);
    }
    double sums[2];
    part.template Exponentials<false>(C(records.top), nullptr, sums);
    WriteResults(args, row, sum, part,
                 [&](int64_t k) { return records.SumToTop(PartRecord::kDots + k); });
  }
}

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CUDA_SOFTMAX_CE_CUH_
