// A row of logits, or a part of it, and the block of threads that works on it.
//
// softmax_ce.cuh describes the algorithm, the bytes that it moves and its determinism.
#ifndef CURVAX_CUDA_SOFTMAX_CE_ROW_CUH_
#define CURVAX_CUDA_SOFTMAX_CE_ROW_CUH_

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

  __device__ C Cap(C a) const { return kCap ? C(args_.softcap) * Tanh(a * cap_.inverse_cap) : a; }
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

}  // namespace curvax::CURVAX_LEVEL

#endif  // CURVAX_CUDA_SOFTMAX_CE_ROW_CUH_
