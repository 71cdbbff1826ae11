// A row of logits, or a part of it, and the block of threads that works on it.
//
// softmax_ce.cuh describes the algorithm, the bytes that it moves and its determinism.
//
// A warp takes tiles of 128 neighbouring vectors of 16 bytes, four per lane, so that four loads of
// a thread are in flight at distances that are constants. Tiles that lie in the part as a whole go
// through a loop without a check; those that the part's borders cut, and all where an operand's row
// starts elsewhere in a vector than the logits' row, go through one that checks every element.
#ifndef CURVAX_CUDA_SOFTMAX_CE_ROW_CUH_
#define CURVAX_CUDA_SOFTMAX_CE_ROW_CUH_

#include <type_traits>

#include "common/softmax_ce_terms.h"
#include "cuda/device.cuh"
#include "cuda/shapes.h"

namespace curvax::CURVAX_TARGET {

// What products and gradient take from the row: its terms, of which kappa and the constant have
// been multiplied by w / sum e, so that e does for p; w t of the label and of the others; and the
// label's place in the part, if it is there.
template <typename C>
struct RowFactors {
  SoftmaxCeTerms<C> terms;
  C target_label, target_rest;
  int label;
};

// Elements [begin, begin + count) of one row.
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
        z_(reinterpret_cast<C*>(SharedMemory() + kReduceBytes)) {}

  __device__ C Cap(C a) const { return kCap ? C(args_.softcap) * Tanh(a * cap_.inverse_cap) : a; }
  // Where element j of the row is in the part; no element's place if it is elsewhere.
  __device__ int Place(int64_t j) const {
    return j >= begin_ && j < begin_ + count_ ? static_cast<int>(j - begin_) : -V;
  }

  // Keeps the part's logits, and asks for the first tangent. Returns the largest of this thread.
  __device__ C ReadLogits() {
    C top = C(-INFINITY);
    const S* logits = static_cast<const S*>(args_.logits) + first_;
    const S* ahead = args_.tangents > 0 ? Tangent(0) : nullptr;
    ForVectors<true, kUnroll>(logits, true, ahead, [&](int v, C(&x)[V], auto whole) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        x[k] = whole.value || Inside(v, k) ? Cap(x[k]) : C(-INFINITY);
        top = Largest(top, x[k]);
      }
      Keep(v, x);
    });
    return top;
  }
  // Of what ReadLogits has kept for this thread.
  __device__ double LogitSum() const {
    C total = 0;
    ForKept(true, [&](int v, auto whole) {
      C z[V];
      Kept(v, z);
#pragma unroll
      for (int k = 0; k < V; ++k) total += whole.value || Inside(v, k) ? z[k] : C{0};
    });
    return total;
  }

  // Replaces what is kept by exponentials relative to `shift`, for the functions below; sums[0] is
  // this thread's sum of them. With kDot sums[1] is that of e f u_0, and the first half of the
  // logits at `next` is asked for, if that is not null.
  template <bool kDot>
  __device__ void Exponentials(C shift, const S* next, double (&sums)[2]) {
    // Nothing but -inf would give -inf + inf; any finite reference makes the exponentials 0.
    exp_shift_ = shift == C(-INFINITY) ? C{0} : shift;
    C sum = 0, weighted = 0;
    const auto add = [&](int v, const C* u, auto whole) {
      C z[V], e[V];
      Kept(v, z);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        e[k] = Exp(z[k] - exp_shift_);
        sum += e[k];
        // A lane past the border holds -inf, whose slope is not finite.
        if (kDot && (whole.value || Inside(v, k))) weighted += e[k] * Sloped(z[k], u[k]);
      }
      if constexpr (!kCap) Keep(v, e);
    };
    if constexpr (kDot) {
      const S* u = Tangent(0);
      ForVectors<false, kUnroll / 2>(u, Aligned(u), next,
                                     [&](int v, C(&x)[V], auto whole) { add(v, x, whole); });
    } else {
      ForKept(true, [&](int v, auto whole) { add(v, nullptr, whole); });
    }
    sums[0] = sum;
    sums[1] = weighted;
  }

  // This thread's sum of e f u_k.
  __device__ double Dot(int64_t k) const {
    C weighted = 0;
    const S* u = Tangent(k);
    ForVectors<false, 0>(u, Aligned(u), nullptr, [&](int v, C(&x)[V], auto whole) {
      C z[V];
      Kept(v, z);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (whole.value || Inside(v, i)) weighted += Exponential(z[i]) * Sloped(z[i], x[i]);
      }
    });
    return weighted;
  }

  __device__ void Product(int64_t k, const RowFactors<C>& row) const {
    const S* u = Tangent(k);
    const S* ahead = k + 1 < args_.tangents ? Tangent(k + 1) : nullptr;
    S* out = static_cast<S*>(args_.products) + Offset(k);
    const bool aligned = Aligned(u) && Aligned(out);
    ForVectors<true, kUnroll>(u, aligned, ahead, [&](int v, C(&x)[V], auto whole) {
      C z[V];
      Kept(v, z);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        x[i] = row.terms.template Product<kCap>(Exponential(z[i]), x[i], z[i], Target(row, v, i));
      }
      Write(out, v, x, whole);
    });
  }

  __device__ void Gradient(const RowFactors<C>& row) const {
    S* out = static_cast<S*>(args_.grad) + first_;
    ForKept(Aligned(out), [&](int v, auto whole) {
      C z[V];
      Kept(v, z);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        z[i] = row.terms.template Gradient<kCap>(Exponential(z[i]), z[i], Target(row, v, i));
      }
      Write(out, v, z, whole);
    });
  }

  // Makes the results zeros.
  __device__ void Clear() const {
    const C zeros[V] = {};
    const auto clear = [&](S* out) {
      ForKept(Aligned(out), [&](int v, auto whole) { Write(out, v, zeros, whole); });
    };
    for (int64_t k = 0; k < args_.tangents; ++k) {
      clear(static_cast<S*>(args_.products) + Offset(k));
    }
    if (args_.grad != nullptr) clear(static_cast<S*>(args_.grad) + first_);
  }

 private:
  static constexpr int kUnroll = 4;                  // loads in flight per thread
  static constexpr int kTile = kUnroll * kWarpSize;  // vectors

  // The first element of this part in tangent or product k.
  __device__ int64_t Offset(int64_t k) const { return k * args_.rows * args_.vocab + first_; }
  __device__ const S* Tangent(int64_t k) const {
    return static_cast<const S*>(args_.u) + Offset(k);
  }
  __device__ static int Misalignment(const S* p) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(S) % V);
  }
  // Vectors of the logits are vectors there too.
  __device__ bool Aligned(const S* p) const { return Misalignment(p) == shift_; }
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
  __device__ C Target(const RowFactors<C>& row, int v, int k) const {
    return Element(v) + k == row.label ? row.target_label : row.target_rest;
  }

  // Calls cut(tile) for those of this warp's tiles that have to be checked, then whole(tile) for
  // the others. `aligned`: vectors of the logits are vectors of the other operands too. The slow
  // ones go first, while other warps have the fast ones to do.
  template <typename Whole, typename Cut>
  __device__ void ForTiles(bool aligned, const Whole& whole, const Cut& cut) const {
    const int warps = Warps();
    const int begin = shift_ > 0 ? 1 : 0, end = aligned ? (shift_ + count_) / (kTile * V) : 0;
#pragma unroll 1
    for (int tile = Warp(); tile * kTile < vectors_; tile += warps) {
      if (tile < begin || tile >= end) cut(tile);
    }
#pragma unroll 1
    for (int tile = Warp() < begin ? Warp() + warps : Warp(); tile < end; tile += warps) {
      whole(tile);
    }
  }
  // Calls f(v, whole) for this thread's vectors; whole: a type whose value says that the vector is
  // in the part, and that all operands are aligned.
  template <typename F>
  __device__ void ForKept(bool aligned, const F& f) const {
    ForTiles(
        aligned,
        [&](int tile) {
#pragma unroll
          for (int i = 0; i < kUnroll; ++i) f(First(tile) + i * kWarpSize, std::true_type{});
        },
        [&](int tile) {
          for (int v = First(tile); v < End(tile); v += kWarpSize) f(v, std::false_type{});
        });
  }
  // Calls f(v, x, whole) likewise, with elements of `p` in x, 0 outside the part. kLast: they are
  // not read again. Asks for kAhead of every four vectors of `ahead` from its begin, if not null.
  template <bool kLast, int kAhead, typename F>
  __device__ void ForVectors(const S* p, bool aligned, const S* ahead, const F& f) const {
    ForTiles(
        aligned,
        [&](int tile) {
          Bytes16 raw[kUnroll];
#pragma unroll
          for (int i = 0; i < kUnroll; ++i) {
            raw[i] = ReadVector<kLast>(p, First(tile) + i * kWarpSize);
          }
          if (kAhead > 0 && ahead != nullptr) {
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
              Prefetch(ahead + Element((tile * kAhead + i) * kWarpSize + Lane()));
            }
          }
#pragma unroll
          for (int i = 0; i < kUnroll; ++i) {
            C x[V];
            Unpack<S>(raw[i], x);
            f(First(tile) + i * kWarpSize, x, std::true_type{});
          }
        },
        [&](int tile) {
#pragma unroll 1
          for (int v = First(tile); v < End(tile); v += kWarpSize) {
            // Those of the next row are not worth a check.
            if (kAhead == kUnroll && ahead != nullptr && Inside(v, 0)) {
              Prefetch(ahead + Element(v));
            }
            C x[V];
            Unpack<S>(Read<kLast>(p, v), x);
            f(v, x, std::false_type{});
          }
        });
  }
  __device__ int First(int tile) const { return tile * kTile + Lane(); }
  __device__ int End(int tile) const { return Min(vectors_, (tile + 1) * kTile); }

  template <bool kLast>
  __device__ Bytes16 ReadVector(const S* p, int v) const {
    const Bytes16* vector = reinterpret_cast<const Bytes16*>(p + Element(v));
    return kLast ? LoadStreaming(vector) : *vector;
  }
  template <bool kLast>
  __device__ Bytes16 Read(const S* p, int v) const {
    if (Aligned(p) && Whole(v)) return ReadVector<kLast>(p, v);
    S elements[V] = {};
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (Inside(v, k)) elements[k] = p[Element(v) + k];
    }
    Bytes16 bytes;
    __builtin_memcpy(&bytes, elements, sizeof(bytes));
    return bytes;
  }
  __device__ void Write(S* p, int v, const C (&x)[V], std::true_type) const {
    StoreStreaming(reinterpret_cast<Bytes16*>(p + Element(v)), Pack<S>(x));
  }
  __device__ void Write(S* p, int v, const C (&x)[V], std::false_type) const {
    if (Aligned(p) && Whole(v)) return Write(p, v, x, std::true_type{});
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (Inside(v, k)) Narrow(x[k], p + Element(v) + k);
    }
  }

  const SoftmaxCeArgs& args_;
  const SoftmaxCeTerms<C> cap_;
  const int64_t first_, begin_;
  const int count_;
  const int shift_;    // elements before the part in its first aligned vector
  const int vectors_;  // that the part touches
  C* const z_;         // shared: capped logits, then without a cap their exponentials
  C exp_shift_ = 0;
};

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CUDA_SOFTMAX_CE_ROW_CUH_
