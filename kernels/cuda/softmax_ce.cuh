// Softmax cross entropy of rows of logits on a GPU: loss, gradient and Hessian products.
//
// The equations are those of common/softmax_ce_terms.h.
//
// Algorithm, rows that fit shared memory (SoftmaxCeRow): one block per row. It reads the logits into
// shared memory while it asks for the first tangent to be brought to L2; reads the tangent there,
// replaces the logits by e^(z - max) and sums e and e u; reads the tangent again from L2 and writes
// the product over it. Further tangents find e in place. Device memory: logits read once, each
// tangent read and written once, 1 + 2b passes over an (N,V) array; a softcap keeps z in place of e
// and evaluates the exponential again.
// Longer rows (SoftmaxCePartSums, SoftmaxCePartProducts): several blocks share a row. The first
// kernel leaves the sums of each part in the workspace, the second adds them up and reads logits
// and tangents again: 2 + 3b passes.
//
// Every phase gives a thread the same elements, so that what it keeps in shared memory is its own
// and only the sums need barriers; the aligned positions are those of the logits' row, and vectors
// that the row's borders cut are read element by element.
// Accumulation: the compute type within a thread, double across threads and parts. Determinism: all
// sums are in a fixed order.
#ifndef CURVAX_CUDA_SOFTMAX_CE_CUH_
#define CURVAX_CUDA_SOFTMAX_CE_CUH_

#include "common/softmax_ce_terms.h"
#include "cuda/device.cuh"
#include "cuda/launch_config.h"

namespace curvax::CURVAX_LEVEL {

// Elements [begin, begin + count) of one row, of which this thread has every BlockSize()-th vector.
template <typename S, bool kCap>
class RowPart {
 public:
  using C = Compute<S>;
  static constexpr int V = kVector<S>;

  __device__ RowPart(const SoftmaxCeArgs& args, int64_t row, int64_t begin, int64_t count)
      : args_(args),
        cap_(args, 1, 0),
        first_(row * args.vocab + begin),
        begin_(begin),
        count_(static_cast<int>(count)),
        shift_(Misalignment(static_cast<const S*>(args.logits) + first_)),
        vectors_(static_cast<int>(CeilDiv(count + shift_, V))),
        sums_(reinterpret_cast<double*>(SharedMemory())),
        z_(reinterpret_cast<C*>(SharedMemory() + kReduceBytes)) {}

  __device__ C Cap(C a) const {
    return kCap ? C(args_.softcap) * Tanh(a * cap_.inverse_cap) : a;
  }
  // The first element of this part in tangent or product k.
  __device__ int64_t Offset(int64_t k) const { return k * args_.rows * args_.vocab + first_; }
  __device__ const S* Tangent(int64_t k) const {
    return static_cast<const S*>(args_.u) + Offset(k);
  }

  // Keeps the part's logits, and returns the largest. Their sum goes to *sum if that is not null.
  __device__ C ReadLogits(double* sum) {
    const S* logits = static_cast<const S*>(args_.logits) + first_;
    const S* ahead = args_.tangents > 0 ? Tangent(0) : nullptr;
    C top = C(-INFINITY), total = 0;
    ForVectors<true>(logits, ahead, [&](int v, C(&x)[V]) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const bool inside = Inside(v, k);
        x[k] = inside ? Cap(x[k]) : C(-INFINITY);
        top = Max(top, x[k]);
        total += inside ? x[k] : C{0};
      }
      Keep(v, x);
    });
    if (sum != nullptr) *sum = BlockSum(static_cast<double>(total), sums_);
    return static_cast<C>(BlockMax(static_cast<double>(top), sums_));
  }

  // Replaces what is kept by exponentials relative to `shift`, for the functions below. Returns
  // their sum over the part, and in *dot that of e f u_0 if there is a tangent and *dot is wanted.
  __device__ double Exponentials(C shift, double* dot) {
    // Nothing but -inf would give -inf + inf; any finite reference makes the exponentials 0.
    exp_shift_ = shift == C(-INFINITY) ? C{0} : shift;
    C sum = 0, weighted = 0;
    const auto add = [&](int v, const C* u) {
      C z[V], e[V];
      Kept(v, z);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        e[k] = Exp(z[k] - exp_shift_);
        sum += e[k];
        // A lane past the border holds -inf, whose slope is not finite.
        if (u != nullptr && Inside(v, k)) weighted += e[k] * Sloped(z[k], u[k]);
      }
      if constexpr (!kCap) Keep(v, e);
    };
    if (dot != nullptr && args_.tangents > 0) {
      ForVectors<false>(Tangent(0), nullptr, [&](int v, C(&u)[V]) { add(v, u); });
      *dot = BlockSum(static_cast<double>(weighted), sums_);
    } else {
      for (int v = ThreadIndex(); v < vectors_; v += BlockSize()) add(v, nullptr);
    }
    return BlockSum(static_cast<double>(sum), sums_);
  }

  // The sum of e f u_k.
  __device__ double Dot(int64_t k) {
    C weighted = 0;
    ForVectors<false>(Tangent(k), nullptr, [&](int v, C(&u)[V]) {
      C z[V];
      Kept(v, z);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (Inside(v, i)) weighted += Exponential(z[i]) * Sloped(z[i], u[i]);
      }
    });
    return BlockSum(static_cast<double>(weighted), sums_);
  }

  // Writes product k, with p = scale e / w.
  __device__ void Product(int64_t k, C scale, const SoftmaxCeTerms<C>& terms, C target_label,
                          C target_rest, int64_t label) {
    S* out = static_cast<S*>(args_.products) + Offset(k);
    const S* ahead = k + 1 < args_.tangents ? Tangent(k + 1) : nullptr;
    ForVectors<true>(Tangent(k), ahead, [&](int v, C(&u)[V]) {
      C z[V];
      Kept(v, z);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const C target = begin_ + Element(v) + i == label ? target_label : target_rest;
        u[i] = terms.template Product<kCap>(scale * Exponential(z[i]), u[i], z[i], target);
      }
      Write(out, v, u);
    });
  }

  __device__ void Gradient(C scale, const SoftmaxCeTerms<C>& terms, C target_label, C target_rest,
                           int64_t label) {
    S* out = static_cast<S*>(args_.grad) + first_;
    for (int v = ThreadIndex(); v < vectors_; v += BlockSize()) {
      C z[V];
      Kept(v, z);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const C target = begin_ + Element(v) + i == label ? target_label : target_rest;
        z[i] = terms.template Gradient<kCap>(scale * Exponential(z[i]), z[i], target);
      }
      Write(out, v, z);
    }
  }

  __device__ void Clear() {
    const C zeros[V] = {};
    for (int v = ThreadIndex(); v < vectors_; v += BlockSize()) {
      for (int64_t k = 0; k < args_.tangents; ++k) {
        Write(static_cast<S*>(args_.products) + Offset(k), v, zeros);
      }
      if (args_.grad != nullptr) Write(static_cast<S*>(args_.grad) + first_, v, zeros);
    }
  }

 private:
  static constexpr int kUnroll = 4;  // loads in flight per thread

  __device__ static int Misalignment(const S* p) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(S) % V);
  }
  // Index in the part of the first element of vector v, and whether its k-th is in the part.
  __device__ int Element(int v) const { return v * V - shift_; }
  __device__ bool Inside(int v, int k) const {
    const int j = Element(v) + k;
    return j >= 0 && j < count_;
  }
  __device__ bool Whole(int v) const { return Inside(v, 0) && Inside(v, V - 1); }

  static constexpr int kPieces = V * static_cast<int>(sizeof(C)) / 16;
  __device__ void Keep(int v, const C (&x)[V]) {
    Bytes16 pieces[kPieces];
    __builtin_memcpy(pieces, x, sizeof(pieces));
#pragma unroll
    for (int i = 0; i < kPieces; ++i) reinterpret_cast<Bytes16*>(z_ + v * V)[i] = pieces[i];
  }
  __device__ void Kept(int v, C (&x)[V]) const {
    Bytes16 pieces[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) pieces[i] = reinterpret_cast<const Bytes16*>(z_ + v * V)[i];
    __builtin_memcpy(x, pieces, sizeof(pieces));
  }
  // e from what is kept.
  __device__ C Exponential(C z) const { return kCap ? Exp(z - exp_shift_) : z; }
  __device__ C Sloped(C z, C u) const { return kCap ? cap_.Slope(z) * u : u; }

  // Calls f(v, x) for this thread's vectors, with elements of `p` in x, 0 outside the part. Asks
  // for the same elements of `ahead`, if that is not null. kLast: they are not read again.
  template <bool kLast, typename F>
  __device__ void ForVectors(const S* p, const S* ahead, const F& f) const {
    const bool aligned = Misalignment(p) == shift_;
    const int stride = BlockSize();
    for (int v = ThreadIndex(); v < vectors_; v += kUnroll * stride) {
      Bytes16 raw[kUnroll];
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int w = v + i * stride;
        if (w < vectors_) {
          raw[i] = Read<kLast>(p, w, aligned);
          if (ahead != nullptr && Whole(w)) Prefetch(ahead + Element(w));
        }
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int w = v + i * stride;
        if (w < vectors_) {
          C x[V];
          Unpack<S>(raw[i], x);
          f(w, x);
        }
      }
    }
  }
  template <bool kLast>
  __device__ Bytes16 Read(const S* p, int v, bool aligned) const {
    const int j = Element(v);
    if (aligned && Whole(v)) {
      const Bytes16* whole = reinterpret_cast<const Bytes16*>(p + j);
      return kLast ? LoadStreaming(whole) : *whole;
    }
    S elements[V] = {};
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (Inside(v, k)) elements[k] = p[j + k];
    }
    Bytes16 bytes;
    __builtin_memcpy(&bytes, elements, sizeof(bytes));
    return bytes;
  }
  __device__ void Write(S* p, int v, const C (&x)[V]) const {
    const int j = Element(v);
    if (Whole(v) && Misalignment(p) == shift_) {
      return StoreStreaming(reinterpret_cast<Bytes16*>(p + j), Pack<S>(x));
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (Inside(v, k)) Narrow(x[k], p + j + k);
    }
  }

  const SoftmaxCeArgs& args_;
  const SoftmaxCeTerms<C> cap_;
  const int64_t first_, begin_;
  const int count_;
  const int shift_;    // elements before the part in its first aligned vector
  const int vectors_;  // that the part touches
  double* const sums_;
  C* const z_;  // shared: capped logits, then without a cap their exponentials
  C exp_shift_ = 0;
};

// What the label, the weight and the log-sum-exp of a row make of it.
template <typename C>
struct Row {
  bool skip;     // all results are 0
  bool valid;    // the label names a class
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

template <typename S, bool kCap>
__global__ void __launch_bounds__(kMaxRowThreads<Compute<S>>, 1) SoftmaxCeRow(const __grid_constant__ SoftmaxCeArgs args) {
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

  const SoftmaxCeTargets targets(args);
  const C target_label = C(row.weight * targets.label), target_rest = C(row.weight * targets.rest);
  const C scale = C(row.weight / sum);
  for (int64_t k = 0; k < args.tangents; ++k) {
    const double mu = (k == 0 ? dot : part.Dot(k)) / sum;
    const SoftmaxCeTerms<C> terms(args, row.kappa, mu);
    part.Product(k, scale, terms, target_label, target_rest, row.label);
  }
  // Last, since it may lie over the logits.
  if (args.grad != nullptr) {
    const SoftmaxCeTerms<C> terms(args, row.kappa, 0);
    part.Gradient(scale, terms, target_label, target_rest, row.label);
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
__global__ void __launch_bounds__(kPartThreads, 1) SoftmaxCePartSums(const __grid_constant__ SoftmaxCeArgs args) {
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
__global__ void __launch_bounds__(kPartThreads, 1) SoftmaxCePartProducts(const __grid_constant__ SoftmaxCeArgs args) {
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
  double top = -INFINITY, sum = 0, z_sum = 0, z_label = 0;
  for (int64_t p = 0; p < parts; ++p) top = Max(top, record(p)[PartRecord::kTop]);
  const auto share = [&](int64_t p) {  // of what part p has summed relative to its own maximum
    const double own = record(p)[PartRecord::kTop];
    return own == -INFINITY && top != -INFINITY ? 0.0 : double(Exp(C(own - top)));
  };
  for (int64_t p = 0; p < parts; ++p) {
    sum += record(p)[PartRecord::kSum] * share(p);
    z_sum += record(p)[PartRecord::kLogitSum];
    z_label += record(p)[PartRecord::kLabelLogit];
  }
  row.SetLogSumExp(args, top, sum);
  if (which == 0 && ThreadIndex() == 0) row.WriteScalars(args, index, z_label, z_sum);

  part.ReadLogits(nullptr);
  part.Exponentials(C(top), nullptr);
  const SoftmaxCeTargets targets(args);
  const C target_label = C(row.weight * targets.label), target_rest = C(row.weight * targets.rest);
  const C scale = C(row.weight / sum);
  for (int64_t k = 0; k < args.tangents; ++k) {
    double mu = 0;
    for (int64_t p = 0; p < parts; ++p) mu += record(p)[PartRecord::kDots + k] * share(p);
    const SoftmaxCeTerms<C> terms(args, row.kappa, mu / sum);
    part.Product(k, scale, terms, target_label, target_rest, row.label);
  }
  if (args.grad != nullptr) {
    const SoftmaxCeTerms<C> terms(args, row.kappa, 0);
    part.Gradient(scale, terms, target_label, target_rest, row.label);
  }
}

}  // namespace curvax::CURVAX_LEVEL

#endif  // CURVAX_CUDA_SOFTMAX_CE_CUH_
