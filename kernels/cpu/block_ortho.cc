// Orthonormalises a block W (b, n) against a basis Q (m, n) and itself, into rows [m, m + b).
//
//   W_in = Q C + Q_new S,   Q Q_new^T = 0,   Q_new Q_new^T = I,   S upper triangular
//
// Algorithm: block classical Gram-Schmidt with Pythagorean inner products (BCGS-PIP+, Carson,
// Lund, Ma, Oktay 2024), each pass measuring what the one before has left. One pass:
//   measure C1 = Q^T W, G = W^T W;   R^T R = G - C1^T C1;   W <- (W - Q C1) R^-1
// Passes end when the measured deviation from orthonormality before an update is small enough for
// the update to finish. Usually that is the second, and as a pass's update and the next one's
// measurement share a sweep, the basis is read three times: measure, update + measure, update +
// store.  Bytes: 3 m s n for a basis of s-byte elements, and about 6 b n elements of the block.
//
// Accumulation: products in the compute type within a panel, double across panels; everything of
// size m x b or b x b in double. C and S are accumulated from the coefficients as rounded for the
// sweeps, so W_in = Q C + Q_new S holds to the rounding of the sweeps themselves.
// Determinism: bitwise equal for any thread count (block_ortho_sweep.h).
//
// Ill-conditioned blocks. A pivot of R below what the measurement resolves is raised to that floor:
// its column comes out short, and is measured afresh and normalised by the next pass. A direction
// whose norm has fallen to a small multiple of the rounding error of its input column is noise: it
// is replaced by a random one. Replaced directions go last in the order of the factorisation, so
// the others never depend on them and their rows of S stay 0.
#include "curvax/block_ortho.h"

#include "common/philox.h"
#include "cpu/block_ortho_level.h"
#include "cpu/block_ortho_sweep.h"
#include "cpu/small_matrix.h"

namespace curvax::CURVAX_LEVEL {
namespace {

constexpr int kMaxPasses = 12;
// A deviation of at most this before an update leaves only rounding errors after it.
constexpr double kFinalDeviation = 1e-2;

template <typename S>
struct Precision;
// pivot_floor: the smallest squared norm, relative to the column's, that a measurement resolves:
// rounding of the panel sums, and for 16-bit rows their own departure from orthonormality.
template <>
struct Precision<float> {
  static constexpr double kEps = 0x1p-23, kPivotFloor = 1e-7;
  static constexpr double kSmallest = 1e-28, kLargest = 1e34;
};
template <>
struct Precision<Half> : Precision<float> {
  static constexpr double kPivotFloor = 2e-3;
};
template <>
struct Precision<BFloat16> : Precision<float> {
  static constexpr double kPivotFloor = 1e-2;
};
template <>
struct Precision<double> {
  static constexpr double kEps = 0x1p-52, kPivotFloor = 1e-12;
  static constexpr double kSmallest = 1e-290, kLargest = 1e300;
};

// Where everything lies in the workspace.
struct Layout {
  SweepPlan plan;
  int64_t sums, result, coefficients, a, mix, bytes;
  Layout(const BlockOrthoArgs& args, int64_t max_workers) {
    const int64_t m = args.used, b = args.block;
    const int64_t element = args.dtype == DType::kF64 ? sizeof(double) : sizeof(float);
    const int64_t tile = Min<int64_t>(b, kMaxTileColumns);
    plan = PlanSweep(args.n, m + b, b + DotRows(static_cast<int>(tile)), element, (m + b) * b);
    int64_t at = max_workers * plan.worker_bytes;
    const auto take = [&at](int64_t bytes) {
      const int64_t begin = at;
      at = RoundUp(at + bytes, 64);
      return begin;
    };
    sums = take(plan.chunks * plan.sums * 8);
    result = take(plan.sums * 8);
    coefficients = take(m * b * 8);
    a = take(m * b * element);
    mix = take(b * b * element);
    bytes = at;
  }
};

template <typename S>
class BlockOrthoRun {
 public:
  using C = Compute<S>;
  using P = Precision<S>;

  BlockOrthoRun(const BlockOrthoArgs& args, const ParallelFor& pool)
      : args_(args),
        pool_(pool),
        layout_(args, pool.max_workers),
        memory_(static_cast<char*>(args.workspace)),
        sweep_(args, layout_.plan, At<double>(layout_.sums), memory_),
        m_(args.used),
        b_(args.block) {
    c1_ = At<double>(layout_.result);
    gram_ = c1_ + m_ * b_;
  }

  void Run() {
    Initialise();
    sweep_.Measure(pool_, c1_);
    if (!InRange()) {
      if (!Rescale()) return Fail();
      sweep_.Measure(pool_, c1_);
    }
    for (int pass = 1;; ++pass) {
      if (!Finite()) return Fail();
      for (int64_t i = 0; i < m_ * b_; ++i) c1_[i] /= args_.scale;
      const double deviation = Deviation();
      const bool complete = Factorise();
      const bool last = (complete && deviation <= kFinalDeviation) || pass == kMaxPasses;
      Accumulate();
      args_.info[0] = pass;
      args_.info[1] = replaced_;
      args_.info[2] = deviation;
      if (last) {
        sweep_.UpdateAndStore(pool_, At<C>(layout_.a), At<C>(layout_.mix));
        break;
      }
      sweep_.UpdateAndMeasure(pool_, At<C>(layout_.a), At<C>(layout_.mix), c1_);
    }
    for (int64_t c = 0; c < b_; ++c) {
      for (int64_t r = 0; r < m_; ++r) args_.coefficients[r * b_ + c] *= column_scale_[c];
      for (int64_t r = 0; r < b_; ++r) args_.factor[r * b_ + c] *= column_scale_[c];
    }
  }

 private:
  template <typename T>
  T* At(int64_t offset) {
    return reinterpret_cast<T*>(memory_ + offset);
  }
  C* Column(int64_t c) const { return static_cast<C*>(args_.w) + c * args_.n; }

  void Initialise() {
    for (int64_t i = 0; i < args_.rows * b_; ++i) args_.coefficients[i] = 0;
    for (int64_t i = 0; i < b_ * b_; ++i) args_.factor[i] = i / b_ == i % b_;
    for (int i = 0; i < 4; ++i) args_.info[i] = 0;
    for (int64_t c = 0; c < b_; ++c) {
      column_scale_[c] = 1;
      order_[c] = c;
      Restart(c, false);
    }
    replaced_ = 0;
  }
  // Column c starts afresh: its norm is taken at the next measurement.
  void Restart(int64_t c, bool random) {
    surviving_[c] = 1;
    initial_[c] = -1;
    random_[c] = random;
  }

  bool Finite() const {
    double total = 0;
    for (int64_t i = 0; i < (m_ + b_) * b_; ++i) total += c1_[i] * 0;
    return total == 0;
  }
  // Whether squares of the elements neither vanished nor overflowed.
  bool InRange() const {
    for (int64_t c = 0; c < b_; ++c) {
      const double square = gram_[c * b_ + c];
      if (!(square >= P::kSmallest * args_.n && square <= P::kLargest)) return false;
    }
    return Finite();
  }

  // Scales each column to a largest element in [1, 2), by a power of two; false if not finite.
  bool Rescale() {
    double* chunk_max = At<double>(layout_.sums);
    const int64_t chunk = layout_.plan.panel * layout_.plan.chunk_panels;
    for (int64_t c = 0; c < b_; ++c) {
      C* w = Column(c);
      For(pool_, layout_.plan.chunks, [&](int64_t, int64_t k) {
        Int<C> best = 0;  // of the bits: a NaN is above infinity
        const int64_t end = Min(args_.n, (k + 1) * chunk);
        for (int64_t i = k * chunk; i < end; ++i) {
          const C size = w[i] < 0 ? -w[i] : w[i];
          best = Max(best, static_cast<Int<C>>(BitCast<Int<C>>(size) & kMagnitude));
        }
        chunk_max[k] = BitCast<C>(best);
      });
      double largest = 0;
      for (int64_t k = 0; k < layout_.plan.chunks; ++k) {
        if (!(chunk_max[k] - chunk_max[k] == 0)) return false;
        largest = Max(largest, chunk_max[k]);
      }
      if (largest == 0) continue;
      const int exponent = __builtin_ilogb(largest);
      column_scale_[c] = __builtin_ldexp(1.0, exponent);
      // Two factors, since one alone may overflow or be subnormal.
      const C half = C(__builtin_ldexp(1.0, -exponent / 2));
      const C rest = C(__builtin_ldexp(1.0, -exponent - (-exponent / 2)));
      For(pool_, layout_.plan.chunks, [&](int64_t, int64_t k) {
        const int64_t end = Min(args_.n, (k + 1) * chunk);
        for (int64_t i = k * chunk; i < end; ++i) w[i] = w[i] * half * rest;
      });
    }
    return true;
  }

  // Largest |<q, w>| and |<w, w'>| over the columns scaled to norm 1.
  double Deviation() const {
    double worst = 0;
    for (int64_t c = 0; c < b_; ++c) {
      const double square = gram_[c * b_ + c];
      if (square == 0) return 1;
      const double norm = __builtin_sqrt(square);
      for (int64_t r = 0; r < m_; ++r) {
        worst = Max(worst, __builtin_fabs(c1_[r * b_ + c]) / norm);
      }
      for (int64_t k = 0; k < c; ++k) {
        const double product = __builtin_fabs(gram_[k * b_ + c]);
        worst = Max(worst, product / (norm * __builtin_sqrt(gram_[k * b_ + k])));
      }
    }
    return worst;
  }

  // r_ from the measurement, in the order order_[], so that W = Q C1 + W' r_ with orthonormal W'.
  // Marks columns that are only rounding noise as dying: their column of r_ is kept, their diagonal
  // entry is 1 and their row otherwise 0. Returns whether every pivot was resolved.
  bool Factorise() {
    PythagoreanGram(m_, b_, c1_, gram_, t_);
    bool complete = true;
    for (int64_t i = 0; i < b_ * b_; ++i) r_[i] = 0;
    for (int64_t p = 0; p < b_; ++p) {
      const int64_t c = order_[p];
      const double square = gram_[c * b_ + c];
      if (initial_[c] < 0) initial_[c] = __builtin_sqrt(square);
      double pivot = t_[c * b_ + c];
      for (int64_t k = 0; k < p; ++k) pivot -= r_[order_[k] * b_ + c] * r_[order_[k] * b_ + c];
      const double floor = P::kPivotFloor * square;
      const double norm = __builtin_sqrt(Max(pivot, floor));
      dying_[c] = surviving_[c] * norm <= NoiseLevel() * initial_[c];
      r_[c * b_ + c] = dying_[c] ? 1 : norm;
      if (!dying_[c]) surviving_[c] *= norm;
      if (dying_[c] || pivot <= floor) {
        // An unresolved pivot's products with later columns are noise as well, and divided by the
        // floor they would grow from column to column. The next pass sees them better.
        complete = false;
        continue;
      }
      for (int64_t q = p + 1; q < b_; ++q) {
        const int64_t d = order_[q];
        double sum = t_[c * b_ + d];
        for (int64_t k = 0; k < p; ++k) sum -= r_[order_[k] * b_ + c] * r_[order_[k] * b_ + d];
        r_[c * b_ + d] = sum / norm;
      }
    }
    return complete;
  }

  // The relative size below which what is left of a column is rounding error: each of m + b
  // subtractions rounds, independently.
  double NoiseLevel() const { return (8 + __builtin_sqrt(double(m_ + b_))) * P::kEps; }

  // Fills column c with random numbers, and moves it to the end of the order.
  void Replace(int64_t c) {
    if (!random_[c]) ++replaced_;
    const uint32_t attempt = attempts_++;
    C* w = Column(c);
    const double size = 2 * __builtin_sqrt(3.0 / args_.n);
    constexpr int64_t kChunk = 1 << 16;
    For(pool_, CeilDiv(args_.n, kChunk), [&](int64_t, int64_t chunk) {
      const int64_t end = Min(args_.n, (chunk + 1) * kChunk);
      for (int64_t i = chunk * kChunk; i < end; i += 4) {
        const Philox4 counter = {{static_cast<uint32_t>(i), static_cast<uint32_t>(i >> 32),
                                  static_cast<uint32_t>(args_.used + c), attempt}};
        const Philox4 words = Philox(counter, args_.seed);
        for (int64_t k = 0; k < 4 && i + k < end; ++k) {
          w[i + k] = C(size * (words.v[k] * 0x1p-32 - 0.5));
        }
      }
    });
    int64_t p = 0;
    while (order_[p] != c) ++p;
    for (; p + 1 < b_; ++p) order_[p] = order_[p + 1];
    order_[b_ - 1] = c;
    Restart(c, true);
  }

  // Rounds the update's coefficients to the compute type, and adds to C and S what they undo:
  //   W' = W B - Q A  with B = r_^-1, A = C1 B as rounded, so  W = Q A B^-1 + W' B^-1.
  // A dying column is left alone by the update (it is replaced before), and what it was,
  //   w_c = Q C1_c + sum_k w'_k r_kc,  is accounted for without its own residual.
  void Accumulate() {
    C* a = At<C>(layout_.a);
    C* mix = At<C>(layout_.mix);
    double* left = At<double>(layout_.coefficients);  // A
    for (int64_t i = 0; i < b_ * b_; ++i) t_[i] = dying_[i % b_] ? i / b_ == i % b_ : r_[i];
    InvertTriangular(b_, order_, t_, inverse_);
    for (int64_t i = 0; i < b_ * b_; ++i) inverse_[i] = mix[i] = C(inverse_[i]);
    InvertTriangular(b_, order_, inverse_, t_);
    Multiply(m_, b_, b_, c1_, inverse_, left);
    for (int64_t i = 0; i < m_ * b_; ++i) {
      a[i] = dying_[i % b_] ? C{0} : C(-left[i] / args_.scale);
      left[i] = -double(a[i]) * args_.scale;
    }
    for (int64_t c = 0; c < b_; ++c) {
      if (!dying_[c]) continue;
      for (int64_t k = 0; k < b_; ++k) t_[k * b_ + c] = r_[k * b_ + c];
      for (int64_t i = 0; i < m_; ++i) {
        double rest = c1_[i * b_ + c];
        for (int64_t k = 0; k < b_; ++k) {
          if (k != c) rest -= left[i * b_ + k] * r_[k * b_ + c];
        }
        left[i * b_ + c] = rest;
      }
    }
    Multiply(b_, b_, b_, t_, args_.factor, r_);
    MultiplyAdd(m_, b_, b_, left, r_, args_.coefficients);
    for (int64_t i = 0; i < b_ * b_; ++i) args_.factor[i] = dying_[i / b_] ? 0.0 : r_[i];
    for (int64_t c = 0; c < b_; ++c) {
      if (dying_[c]) Replace(c);
    }
  }

  // Not finite: says so everywhere that the caller may look.
  void Fail() {
    const double nan = __builtin_nan("");
    for (int64_t i = 0; i < m_ * b_; ++i) args_.coefficients[i] = nan;
    for (int64_t i = 0; i < b_ * b_; ++i) args_.factor[i] = nan;
    args_.info[2] = nan;
    S bad;
    StorePartial(&bad, 1, Splat(C(nan)));
    S* slot = static_cast<S*>(args_.basis) + m_ * args_.n;
    for (int64_t i = 0; i < b_ * args_.n; ++i) slot[i] = bad;
  }

  static constexpr Int<C> kMagnitude = static_cast<Int<C>>(~(uint64_t{1} << (8 * sizeof(C) - 1)));

  const BlockOrthoArgs& args_;
  const ParallelFor& pool_;
  const Layout layout_;
  char* const memory_;
  const Sweep<S> sweep_;
  const int64_t m_, b_;
  double *c1_, *gram_;

  double column_scale_[kMaxBlock];  // W_in = W diag(column_scale)
  double initial_[kMaxBlock];       // norm of the column when it started, -1: not measured
  double surviving_[kMaxBlock];     // product of its pivots since
  bool random_[kMaxBlock];          // whether it has been replaced
  bool dying_[kMaxBlock];           // whether it is being replaced
  int64_t order_[kMaxBlock];        // of the factorisation: given columns, then replaced ones
  int64_t replaced_ = 0;
  uint32_t attempts_ = 0;
  double t_[kMaxBlock * kMaxBlock], r_[kMaxBlock * kMaxBlock], inverse_[kMaxBlock * kMaxBlock];
};

}  // namespace

int64_t BlockOrthoWorkspaceBytes(const BlockOrthoArgs& args, int64_t max_workers) {
  return Layout(args, max_workers).bytes;
}

void BlockOrtho(const BlockOrthoArgs& args, const ParallelFor& pool) {
  switch (args.dtype) {
    case DType::kF32:
      return BlockOrthoRun<float>(args, pool).Run();
    case DType::kF64:
      return BlockOrthoRun<double>(args, pool).Run();
    case DType::kBF16:
      return BlockOrthoRun<BFloat16>(args, pool).Run();
    case DType::kF16:
      return BlockOrthoRun<Half>(args, pool).Run();
  }
}

}  // namespace curvax::CURVAX_LEVEL
