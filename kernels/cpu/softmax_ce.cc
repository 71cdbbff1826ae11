// Softmax cross entropy of rows of logits: loss, gradient and Hessian products in two sweeps.
//
// The equations are those of common/softmax_ce_terms.h.
//
// Algorithm. Sweep 1 takes blocks that fit L1: e_j = e^(z_j - m_k), with m_k the maximum of block
// k, is stored in a scratch row, and the sums of e and e zd are kept per block; they are rescaled
// to the row's maximum at the end, so a logit is read and exponentiated once. Sweep 2 writes each
// product over its tangent. Memory traffic: logits read once, each tangent read and written once
// (the scratch row and the row of the first tangent stay in L2 up to V of about 50 k).
// Accumulation: float within a block of 1024 elements, double across blocks; double for double.
// Determinism: rows are independent, blocks are fixed: the result is the same for any thread count.
#include "curvax/softmax_ce.h"

#include "common/softmax_ce_terms.h"
#include "cpu/convert.h"
#include "cpu/math.h"
#include "cpu/parallel.h"
#include "cpu/softmax_ce.h"

namespace curvax::CURVAX_TARGET {
namespace {

constexpr int64_t kBlock = 1024;
// Rows are handed out in chunks of about this many elements, for vocabularies of a few classes.
constexpr int64_t kChunkElements = 65536;
// Elements of one cache line, at least.
template <typename S>
constexpr int64_t kLine = 64 / int64_t{sizeof(S)};

struct Full {};
struct Tail {
  int64_t count;
};
template <typename S>
CURVAX_INLINE Vec<Compute<S>> Load(const S* p, Full, Compute<S>) {
  return LoadAs(p);
}
template <typename S>
CURVAX_INLINE Vec<Compute<S>> Load(const S* p, Tail tail, Compute<S> fill) {
  return LoadPartial(p, tail.count, fill);
}
template <typename S>
CURVAX_INLINE void Store(S* p, Full, Vec<Compute<S>> v) {
  StoreAs(p, v);
}
template <typename S>
CURVAX_INLINE void Store(S* p, Tail tail, Vec<Compute<S>> v) {
  StorePartial(p, tail.count, v);
}

// Calls f(i, Full{}) for every whole vector in [0, count) and f(i, Tail{rest}) for what is left.
template <typename C, typename F>
CURVAX_INLINE void ForVectors(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + kLanes<C> <= count; i += kLanes<C>) f(i, Full{});
  if (i < count) f(i, Tail{count - i});
}

// Scratch memory of one worker, in elements of C and double.
struct ScratchLayout {
  int64_t row;     // one row of C, padded
  int64_t blocks;  // blocks in a row, padded
  int64_t bytes(int64_t element, bool cap) const {
    return RoundUp(row * element * (cap ? 2 : 1) + blocks * 3 * int64_t{sizeof(double)}, 64);
  }
};
ScratchLayout LayoutOf(const SoftmaxCeArgs& args) {
  return {RoundUp(args.vocab, 16), RoundUp(CeilDiv(args.vocab, kBlock), 8)};
}

template <typename S, bool kCap>
class RowKernel {
 public:
  using C = Compute<S>;

  RowKernel(const SoftmaxCeArgs& args, int64_t worker)
      : args_(args), targets_(args), cap_(args, 1, 0) {
    const ScratchLayout layout = LayoutOf(args);
    char* memory =
        static_cast<char*>(args.workspace) + worker * layout.bytes(sizeof(C), args.softcap > 0);
    block_max_ = reinterpret_cast<double*>(memory);
    block_scale_ = block_max_ + layout.blocks;
    block_dot_ = block_scale_ + layout.blocks;
    exp_ = reinterpret_cast<C*>(block_dot_ + layout.blocks);
    capped_ = exp_ + layout.row;
    blocks_ = CeilDiv(args.vocab, kBlock);
  }

  void Run(int64_t row) {
    const int64_t label = args_.labels[row];
    const double weight = static_cast<const C*>(args_.weights)[row];
    const bool hessian_only = args_.grad == nullptr && args_.loss == nullptr;
    if (label == args_.ignore_index || (weight == 0 && hessian_only)) return Clear(row);
    const S* z = static_cast<const S*>(args_.logits) + row * args_.vocab;
    const bool with_tangent = args_.tangents > 0;
    const double first_dot = Statistics(z, with_tangent ? Tangent(row, 0) : nullptr);

    const double nan = __builtin_nan("");
    const bool valid = label >= 0 && label < args_.vocab;
    label_ = valid ? label : 0;
    // A label that names no class poisons its row: a silent zero would look like a masked token.
    weight_ = valid ? weight : nan;
    z_label_ = Value(z, label_);
    p_label_ = static_cast<double>(exp_[label_]) * block_scale_[label_ / kBlock];
    lse_ = max_ + Log(sum_);
    kappa_ = 1 + 2 * args_.z_loss * lse_;

    if (args_.loss != nullptr) static_cast<C*>(args_.loss)[row] = C(valid ? Loss(z) : nan);
    if (args_.lse != nullptr) static_cast<C*>(args_.lse)[row] = C(lse_);
    for (int64_t k = 0; k < args_.tangents; ++k) {
      const S* u = Tangent(row, k);
      Product(u, k == 0 ? first_dot : Dot(u), static_cast<S*>(args_.products) + Offset(row, k));
    }
    // Last, since the gradient may lie over the logits.
    if (args_.grad != nullptr) Gradient(static_cast<S*>(args_.grad) + row * args_.vocab);
  }

 private:
  int64_t Offset(int64_t row, int64_t k) const { return (k * args_.rows + row) * args_.vocab; }
  const S* Tangent(int64_t row, int64_t k) const {
    return static_cast<const S*>(args_.u) + Offset(row, k);
  }
  int64_t Count(int64_t block) const { return Min(kBlock, args_.vocab - block * kBlock); }
  // The capped logits of a block: in scratch, or the logits themselves.
  auto Source(const S* z, int64_t block) const {
    if constexpr (kCap) {
      return static_cast<const C*>(capped_ + block * kBlock);
    } else {
      return z + block * kBlock;
    }
  }
  double Value(const S* z, int64_t j) const {
    return LoadPartial(Source(z, j / kBlock) + j % kBlock, 1, C{0})[0];
  }
  Vec<C> Slope(Vec<C> z) const { return cap_.Slope(z); }

  void Clear(int64_t row) {
    const auto clear = [&](void* base, int64_t offset) {
      if (base == nullptr) return;
      S* p = static_cast<S*>(base) + offset;
      ForVectors<C>(args_.vocab, [&](int64_t j, auto tag) { Store(p + j, tag, Vec<C>{}); });
    };
    for (int64_t k = 0; k < args_.tangents; ++k) clear(args_.products, Offset(row, k));
    clear(args_.grad, row * args_.vocab);
    if (args_.loss != nullptr) static_cast<C*>(args_.loss)[row] = 0;
    if (args_.lse != nullptr) static_cast<C*>(args_.lse)[row] = 0;
  }

  // Sweep 1: exp_, max_, sum_, and block_scale_ = e^(m_k - max) / sum. Returns <p, f u> if u.
  double Statistics(const S* z, const S* u) {
    max_ = -__builtin_inf();
    for (int64_t k = 0; k < blocks_; ++k) {
      if constexpr (kCap) Cap(z + k * kBlock, capped_ + k * kBlock, Count(k));
      const double block_max = BlockMax(Source(z, k), Count(k));
      block_max_[k] = block_max;
      max_ = Max(max_, block_max);
      ExpBlock(Source(z, k), u == nullptr ? u : u + k * kBlock, k);
    }
    sum_ = 0;
    double dot = 0;
    for (int64_t k = 0; k < blocks_; ++k) {
      const double scale =
          block_max_[k] == -__builtin_inf() ? 0.0 : __builtin_exp(block_max_[k] - max_);
      sum_ += block_scale_[k] * scale;
      dot += block_dot_[k] * scale;
      block_scale_[k] = scale;
    }
    for (int64_t k = 0; k < blocks_; ++k) block_scale_[k] /= sum_;
    return dot / sum_;
  }

  void Cap(const S* a, C* z, int64_t count) const {
    const C cap = C(args_.softcap), inverse = C(1 / args_.softcap);
    ForVectors<C>(count, [&](int64_t j, auto tag) {
      Store(z + j, tag, cap * Tanh<C>(Load(a + j, tag, C{0}) * inverse));
    });
  }

  template <typename Z>
  double BlockMax(const Z* z, int64_t count) const {
    constexpr int64_t kStep = 4 * kLanes<C>;
    const auto raise = [](Vec<C> v, Vec<C> w) { return v < w ? w : v; };
    Vec<C> best[4];
    for (Vec<C>& b : best) b = Splat(C(-__builtin_inf()));
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) best[k] = raise(best[k], LoadAs(z + i + k * kLanes<C>));
    }
    ForVectors<C>(count - i, [&](int64_t j, auto tag) {
      best[0] = raise(best[0], Load(z + i + j, tag, C(-__builtin_inf())));
    });
    best[0] = raise(raise(best[0], best[1]), raise(best[2], best[3]));
    return MaxLanes<C>(best[0]);
  }

  // exp_ of block k; the sums of e and of e f u go to block_scale_ and block_dot_.
  template <typename Z>
  void ExpBlock(const Z* z, const S* u, int64_t k) {
    // A block of -inf alone would give -inf + inf; any finite reference makes its exponentials 0.
    const C shift = block_max_[k] == -__builtin_inf() ? C{0} : C(block_max_[k]);
    C* e = exp_ + k * kBlock;
    Vec<C> sum = {}, dot = {};
    if (u == nullptr) {
      ForVectors<C>(Count(k), [&](int64_t j, auto tag) {
        const Vec<C> v = ExpNonPositive(Load(z + j, tag, C(-__builtin_inf())) - shift);
        sum += v;
        Store(e + j, tag, v);
      });
    } else {
      ForVectors<C>(Count(k), [&](int64_t j, auto tag) {
        // The arithmetic of this block hides the memory of the next: the hardware's prefetcher
        // stops at the page that a block of floats fills. A prefetch past the end is harmless.
        // The logits are not read again: kept out of L2 they leave it to the tangents and e.
        if (j % kLine<S> == 0) {
          __builtin_prefetch(z + j + kBlock, 0, 0);
          __builtin_prefetch(u + j + kBlock);
        }
        const Vec<C> logit = Load(z + j, tag, C(-__builtin_inf()));
        const Vec<C> v = ExpNonPositive(logit - shift);
        sum += v;
        Store(e + j, tag, v);
        Vec<C> tangent = Load(u + j, tag, C{0});
        // The lanes past a tail hold -inf, whose slope is NaN: read them as 0 instead.
        if constexpr (kCap) tangent *= Slope(Load(z + j, tag, C{0}));
        dot += v * tangent;
      });
    }
    block_scale_[k] = SumLanes(sum);
    block_dot_[k] = SumLanes(dot);
  }

  double Dot(const S* u) const {  // <p, f u>
    double total = 0;
    for (int64_t k = 0; k < blocks_; ++k) {
      const C* e = exp_ + k * kBlock;
      const C* z = capped_ + k * kBlock;
      Vec<C> dot = {};
      ForVectors<C>(Count(k), [&](int64_t j, auto tag) {
        Vec<C> v = Load(e + j, tag, C{0});
        if constexpr (kCap) v *= Slope(Load(z + j, tag, C{0}));
        dot += v * Load(u + k * kBlock + j, tag, C{0});
      });
      total += SumLanes(dot) * block_scale_[k];
    }
    return total;
  }

  double Loss(const S* z) const {
    double total = 0;
    for (int64_t k = 0; args_.label_smoothing != 0 && k < blocks_; ++k) {
      Vec<C> sum = {};
      ForVectors<C>(Count(k),
                    [&](int64_t j, auto tag) { sum += Load(Source(z, k) + j, tag, C{0}); });
      total += SumLanes(sum);
    }
    return SoftmaxCeLoss(args_, lse_, z_label_, total);
  }

  void Product(const S* u, double mu, S* out) const {
    const SoftmaxCeTerms<C> terms(args_, kappa_, mu);
    const C target = C(weight_ * targets_.rest);
    const double u_label = LoadPartial(u + label_, 1, C{0})[0];
    // Backwards: the end of the row is what the last sweep has left in L2.
    for (int64_t k = blocks_ - 1; k >= 0; --k) {
      const C scale = C(weight_ * block_scale_[k]);
      const C* e = exp_ + k * kBlock;
      const C* capped = capped_ + k * kBlock;
      ForVectors<C>(Count(k), [&](int64_t j, auto tag) {
        if (j % kLine<S> == 0 && k > 0) {  // as in sweep 1, now from L2
          __builtin_prefetch(e + j - kBlock);
          __builtin_prefetch(u + k * kBlock + j - kBlock);
        }
        const Vec<C> p = Load(e + j, tag, C{0}) * scale;
        const Vec<C> tangent = Load(u + k * kBlock + j, tag, C{0});
        const Vec<C> z = kCap ? Load(capped + j, tag, C{0}) : Vec<C>{};
        Store(out + k * kBlock + j, tag, terms.template Product<kCap>(p, tangent, z, target));
      });
    }
    if constexpr (kCap) {  // the label's own term of t, which the loop has left out
      const SoftmaxCeTerms<double> wide(args_, kappa_, mu);
      const double value =
          wide.Product<kCap>(weight_ * p_label_, u_label, z_label_, weight_ * targets_.label);
      StorePartial(out + label_, 1, Splat(C(value)));
    }
  }

  void Gradient(S* out) const {
    const SoftmaxCeTerms<C> terms(args_, kappa_, 0);
    const C target = C(weight_ * targets_.rest);
    for (int64_t k = 0; k < blocks_; ++k) {
      const C scale = C(weight_ * block_scale_[k]);
      const C* e = exp_ + k * kBlock;
      const C* capped = capped_ + k * kBlock;
      ForVectors<C>(Count(k), [&](int64_t j, auto tag) {
        const Vec<C> p = Load(e + j, tag, C{0}) * scale;
        const Vec<C> z = kCap ? Load(capped + j, tag, C{0}) : Vec<C>{};
        Store(out + k * kBlock + j, tag, terms.template Gradient<kCap>(p, z, target));
      });
    }
    const SoftmaxCeTerms<double> wide(args_, kappa_, 0);
    const double value =
        wide.Gradient<kCap>(weight_ * p_label_, z_label_, weight_ * targets_.label);
    StorePartial(out + label_, 1, Splat(C(value)));
  }

  const SoftmaxCeArgs& args_;
  const SoftmaxCeTargets targets_;
  const SoftmaxCeTerms<C> cap_;
  C *exp_, *capped_;
  double *block_max_, *block_scale_, *block_dot_;
  int64_t blocks_;
  double max_ = 0, sum_ = 0, lse_ = 0, kappa_ = 0;
  int64_t label_ = 0;
  double weight_ = 0, z_label_ = 0, p_label_ = 0;
};

template <typename S, bool kCap>
void RunRows(const SoftmaxCeArgs& args, const ParallelFor& pool) {
  const int64_t rows = Max<int64_t>(1, kChunkElements / Max<int64_t>(1, args.vocab));
  For(pool, CeilDiv(args.rows, rows), [&](int64_t worker, int64_t chunk) {
    RowKernel<S, kCap> kernel(args, worker);
    const int64_t end = Min(args.rows, (chunk + 1) * rows);
    for (int64_t row = chunk * rows; row < end; ++row) kernel.Run(row);
  });
}

template <typename S>
void RunCapped(const SoftmaxCeArgs& args, const ParallelFor& pool) {
  if (args.softcap > 0) return RunRows<S, true>(args, pool);
  return RunRows<S, false>(args, pool);
}

}  // namespace

int64_t SoftmaxCeWorkspaceBytes(const SoftmaxCeArgs& args, int64_t max_workers) {
  const int64_t element = args.dtype == DType::kF64 ? sizeof(double) : sizeof(float);
  return max_workers * LayoutOf(args).bytes(element, args.softcap > 0);
}

void SoftmaxCe(const SoftmaxCeArgs& args, const ParallelFor& pool) {
  if (args.rows == 0 || args.vocab == 0) return;
  switch (args.dtype) {
    case DType::kF32:
      return RunCapped<float>(args, pool);
    case DType::kF64:
      return RunCapped<double>(args, pool);
    case DType::kBF16:
      return RunCapped<BFloat16>(args, pool);
    case DType::kF16:
      return RunCapped<Half>(args, pool);
  }
}

}  // namespace curvax::CURVAX_TARGET
