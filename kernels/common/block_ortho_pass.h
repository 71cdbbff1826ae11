// One pass of block_ortho between two sweeps: from what a sweep has measured to what the next does.
//
//   W_in = Q C + Q_new S,   Q Q_new^T = 0,   Q_new Q_new^T = I,   S upper triangular
//
// Block classical Gram-Schmidt with Pythagorean inner products (BCGS-PIP+, Carson, Lund, Ma, Oktay
// 2024), each pass measuring what the one before has left. One pass:
//   measure C1 = Q^T W, G = W^T W;   R^T R = G - C1^T C1;   W <- (W - Q C1) R^-1
// Passes end when the measured deviation from orthonormality before an update is small enough for
// the update to finish, usually with the second.
//
// With `lazy_below` > 0 the last update is W <- W R^-1 alone, and the basis is not read again,
// where the measured deviation d is below it. Scaled to norm 1, |<q, w>| <= d and |<w, w'>| <= d,
// so R is the identity to b d, and the new rows keep |<q, q_new>| <= d (1 + b d), while R^T R = W^T
// W - C1^T C1 makes them orthonormal among themselves to m d^2. With 4 eps of the compute type,
// what rounding leaves after an update is a few times eps already: the coefficients are rounded to
// it. Rows are then orthonormal to 5e-7 in float, far below sqrt(eps), where a recurrence is as
// good as with exact orthogonality (Simon 1984). Rows of 16 bits depart from that by their own
// rounding, of norm 0.2 eps; what is left below a quarter of it, eps / 16, is no larger than what
// storing the new row adds, and W is not cleaned of more by an update with such rows. W_in = Q C +
// Q_new S holds as ever: what is not subtracted is not added to C.
//
// Everything of size m x b or b x b is in double. C and S are accumulated from the coefficients as
// rounded for the sweeps, so W_in = Q C + Q_new S holds to the rounding of the sweeps themselves.
//
// Ill-conditioned blocks. A pivot of R below what the measurement resolves is raised to that floor:
// its column comes out short, and is measured afresh and normalised by the next pass. A direction
// whose norm has fallen to a small multiple of the rounding error of its input column is noise: it
// is replaced by a random one. Replaced directions go last in the order of the factorisation, so
// the others never depend on them and their rows of S stay 0.
#ifndef CURVAX_COMMON_BLOCK_ORTHO_PASS_H_
#define CURVAX_COMMON_BLOCK_ORTHO_PASS_H_

#include "common/philox.h"
#include "common/small_matrix.h"
#include "common/storage.h"
#include "curvax/block_ortho.h"

namespace curvax::CURVAX_TARGET {

// The constants of the passes; ops/block_ortho/reference.py has the same, but for the pivot floor
// of float, whose measurement there is coarser.
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

// The memory of the passes of one call, between sweeps.
struct BlockOrthoState {
  int64_t used, pass, replaced, attempts;
  int32_t incomplete;              // whether a pivot of the last factorisation was unresolved
  int32_t mix_alone;               // whether the next sweep needs no `a`
  int32_t skip_row;                // whether the current one is
  double column_scale[kMaxBlock];  // W_in = W diag(column_scale)
  double initial[kMaxBlock];       // norm of the column when it started, -1: not measured
  double surviving[kMaxBlock];     // product of its pivots since
  int32_t random[kMaxBlock];       // whether it has been replaced
  int32_t dying[kMaxBlock];        // whether it is being replaced
  int32_t attempt[kMaxBlock];      // the draw that replaces a dying column
  int64_t order[kMaxBlock];        // of the factorisation: given columns, then replaced ones
  double t[kMaxBlock * kMaxBlock], r[kMaxBlock * kMaxBlock], inverse[kMaxBlock * kMaxBlock];
};

// An element of a direction that replaces a column, from its word.
CURVAX_HOST_DEVICE double RandomElement(uint32_t word, int64_t n) {
  const double size = 2 * __builtin_sqrt(3.0 / static_cast<double>(n));
  return size * (word * 0x1p-32 - 0.5);
}
// The words of elements 4 (i / 4) to 4 (i / 4) + 3 of column c of a block above `used` rows.
CURVAX_HOST_DEVICE Philox4 RandomWords(const BlockOrthoState& state, uint64_t seed, int64_t c,
                                       int64_t i) {
  const int64_t first = i / 4 * 4;
  const Philox4 counter = {{static_cast<uint32_t>(first), static_cast<uint32_t>(first >> 32),
                            static_cast<uint32_t>(state.used + c),
                            static_cast<uint32_t>(state.attempt[c])}};
  return Philox(counter, seed);
}

template <typename S, typename Team>
class BlockOrthoPass {
 public:
  using C = Compute<S>;
  using P = Precision<S>;

  // c1 (m + b, b): what a sweep has measured, of stored rows; left (m, b): scratch; a (m, stride)
  // and mix (b, b): the coefficients of the next sweep, W <- W mix + Q a.
  CURVAX_TEAM BlockOrthoPass(const BlockOrthoArgs& args, const Team& team, BlockOrthoState* state,
                             double* c1, double* left, C* a, int64_t stride, C* mix)
      : args_(args),
        team_(team),
        s_(*state),
        c1_(c1),
        left_(left),
        a_(a),
        mix_(mix),
        stride_(stride),
        m_(state->used),
        b_(args.block) {}

  // Clears the results and the state but for `used`.
  CURVAX_TEAM void Begin() const {
    team_.For(args_.rows * b_, [&](int64_t i) { args_.coefficients[i] = 0; });
    team_.For(b_ * b_, [&](int64_t i) { args_.factor[i] = i / b_ == i % b_; });
    team_.For(b_, [&](int64_t c) {
      s_.column_scale[c] = 1;
      s_.order[c] = c;
      s_.dying[c] = 0;
      Restart(c, false);
    });
    team_.Once([&] {
      s_.pass = s_.replaced = s_.attempts = 0;
      for (int i = 0; i < 4; ++i) args_.info[i] = 0;
    });
  }

  CURVAX_TEAM bool Finite() const {
    return team_.Max((m_ + b_) * b_, [&](int64_t i) { return c1_[i] * 0 == 0 ? 0.0 : 1.0; }) == 0;
  }
  // Whether squares of the elements neither vanished nor overflowed.
  CURVAX_TEAM bool InRange() const {
    const double outside = team_.Max(b_, [&](int64_t c) {
      const double square = Gram()[c * b_ + c];
      return square >= P::kSmallest * args_.n && square <= P::kLargest ? 0.0 : 1.0;
    });
    return outside == 0 && Finite();
  }

  // One pass, whose coefficients are then in `a` and `mix`; whether the update is the last one.
  CURVAX_TEAM bool Run() const {
    team_.For(m_ * b_, [&](int64_t i) { c1_[i] /= args_.scale; });
    const double deviation = Deviation();
    PythagoreanGram(team_, m_, b_, c1_, Gram(), s_.t);
    team_.For(b_ * b_, [&](int64_t i) { s_.r[i] = 0; });
    team_.Once([&] {
      ++s_.pass;
      s_.incomplete = 0;
    });
    for (int64_t p = 0; p < b_; ++p) FactorisePivot(p);
    team_.Once([&] { s_.mix_alone = s_.incomplete == 0 && deviation < args_.lazy_below; });
    Accumulate();
    const bool last = (s_.incomplete == 0 && deviation <= kFinalDeviation) || s_.pass == kMaxPasses;
    team_.Once([&] {
      for (int64_t c = 0; c < b_; ++c) {
        if (s_.dying[c] != 0) Replace(c);
      }
      args_.info[0] = static_cast<double>(s_.pass);
      args_.info[1] = static_cast<double>(s_.replaced);
      args_.info[2] = deviation;
    });
    return last;
  }

  // Undoes the scaling of columns in the results.
  CURVAX_TEAM void End() const {
    team_.For(m_ * b_, [&](int64_t i) { args_.coefficients[i] *= s_.column_scale[i % b_]; });
    team_.For(b_ * b_, [&](int64_t i) { args_.factor[i] *= s_.column_scale[i % b_]; });
  }

  // Not finite: says so in every result but the basis. `rows`: of the coefficients.
  CURVAX_TEAM void Poison(int64_t rows) const {
    const double nan = __builtin_nan("");
    team_.For(rows * b_, [&](int64_t i) { args_.coefficients[i] = nan; });
    team_.For(b_ * b_, [&](int64_t i) { args_.factor[i] = nan; });
    team_.Once([&] { args_.info[2] = nan; });
  }

 private:
  CURVAX_TEAM double* Gram() const { return c1_ + m_ * b_; }

  // Column c starts afresh: its norm is taken at the next measurement.
  CURVAX_TEAM void Restart(int64_t c, bool random) const {
    s_.surviving[c] = 1;
    s_.initial[c] = -1;
    s_.random[c] = random;
  }

  // Largest |<q, w>| and |<w, w'>| over the columns scaled to norm 1.
  CURVAX_TEAM double Deviation() const {
    const double* gram = Gram();
    return team_.Max((m_ + b_) * b_, [&](int64_t i) {
      const int64_t r = i / b_, c = i % b_;
      const double square = gram[c * b_ + c];
      if (square == 0) return 1.0;
      const double size = __builtin_fabs(c1_[i]) / __builtin_sqrt(square);
      if (r < m_) return size;
      const double other = gram[(r - m_) * b_ + r - m_];
      return r - m_ < c && other > 0 ? size / __builtin_sqrt(other) : 0.0;
    });
  }

  // Row `order[p]` of r, so that W = Q C1 + W' r with orthonormal W'. Marks columns that are only
  // rounding noise as dying: their column of r is kept, their diagonal entry is 1 and their row
  // otherwise 0.
  CURVAX_TEAM void FactorisePivot(int64_t p) const {
    team_.Once([&] {
      const int64_t c = s_.order[p];
      const double square = Gram()[c * b_ + c];
      if (s_.initial[c] < 0) s_.initial[c] = __builtin_sqrt(square);
      double pivot = s_.t[c * b_ + c];
      for (int64_t k = 0; k < p; ++k) {
        pivot -= s_.r[s_.order[k] * b_ + c] * s_.r[s_.order[k] * b_ + c];
      }
      const double floor = P::kPivotFloor * square;
      const double norm = __builtin_sqrt(Max(pivot, floor));
      s_.dying[c] = s_.surviving[c] * norm <= NoiseLevel() * s_.initial[c];
      s_.r[c * b_ + c] = s_.dying[c] != 0 ? 1 : norm;
      if (s_.dying[c] == 0) s_.surviving[c] *= norm;
      // An unresolved pivot's products with later columns are noise as well, and divided by the
      // floor they would grow from column to column. The next pass sees them better.
      const bool resolved = s_.dying[c] == 0 && pivot > floor;
      s_.skip_row = !resolved;
      if (!resolved) s_.incomplete = 1;
    });
    if (s_.skip_row != 0) return;
    team_.For(b_ - p - 1, [&](int64_t i) {
      const int64_t c = s_.order[p], d = s_.order[p + 1 + i];
      double sum = s_.t[c * b_ + d];
      for (int64_t k = 0; k < p; ++k) {
        sum -= s_.r[s_.order[k] * b_ + c] * s_.r[s_.order[k] * b_ + d];
      }
      s_.r[c * b_ + d] = sum / s_.r[c * b_ + c];
    });
  }

  // The relative size below which what is left of a column is rounding error: each of m + b
  // subtractions rounds, independently.
  CURVAX_TEAM double NoiseLevel() const {
    return (8 + __builtin_sqrt(static_cast<double>(m_ + b_))) * P::kEps;
  }

  // Draws column c, and moves it to the end of the order. The sweep that follows fills it.
  CURVAX_TEAM void Replace(int64_t c) const {
    if (s_.random[c] == 0) ++s_.replaced;
    s_.attempt[c] = static_cast<int32_t>(s_.attempts++);
    int64_t p = 0;
    while (s_.order[p] != c) ++p;
    for (; p + 1 < b_; ++p) s_.order[p] = s_.order[p + 1];
    s_.order[b_ - 1] = c;
    Restart(c, true);
  }

  // Rounds the update's coefficients to the compute type, and adds to C and S what they undo:
  //   W' = W B - Q A  with B = r^-1, A = C1 B as rounded, so  W = Q A B^-1 + W' B^-1.
  // A dying column is left alone by the update (it is replaced before), and what it was,
  //   w_c = Q C1_c + sum_k w'_k r_kc,  is accounted for without its own residual.
  CURVAX_TEAM void Accumulate() const {
    const int32_t* dying = s_.dying;
    team_.For(b_ * b_, [&](int64_t i) {
      s_.t[i] = dying[i % b_] != 0 ? static_cast<double>(i / b_ == i % b_) : s_.r[i];
    });
    InvertTriangular(team_, b_, s_.order, s_.t, s_.inverse);
    team_.For(b_ * b_, [&](int64_t i) { s_.inverse[i] = mix_[i] = C(s_.inverse[i]); });
    InvertTriangular(team_, b_, s_.order, s_.inverse, s_.t);
    Multiply<false>(team_, m_, b_, b_, c1_, s_.inverse, left_);
    team_.For(m_ * stride_, [&](int64_t i) {
      const int64_t r = i / stride_, c = i % stride_;
      const bool alive = c < b_ && dying[c] == 0 && s_.mix_alone == 0;
      a_[i] = alive ? C(-left_[r * b_ + c] / args_.scale) : C{0};
      if (c < b_) left_[r * b_ + c] = -double(a_[i]) * args_.scale;
    });
    team_.For(b_ * b_, [&](int64_t i) {
      if (dying[i % b_] != 0) s_.t[i] = s_.r[i];
    });
    // Of columns that are left alone, whose entries no other one reads.
    team_.For(m_ * b_, [&](int64_t i) {
      const int64_t r = i / b_, c = i % b_;
      if (dying[c] == 0) return;
      double rest = c1_[i];
      for (int64_t k = 0; k < b_; ++k) {
        if (dying[k] == 0) rest -= left_[r * b_ + k] * s_.r[k * b_ + c];
      }
      left_[i] = rest;
    });
    Multiply<false>(team_, b_, b_, b_, s_.t, args_.factor, s_.r);
    Multiply<true>(team_, m_, b_, b_, left_, s_.r, args_.coefficients);
    team_.For(b_ * b_, [&](int64_t i) { args_.factor[i] = dying[i / b_] != 0 ? 0.0 : s_.r[i]; });
  }

  const BlockOrthoArgs& args_;
  const Team& team_;
  BlockOrthoState& s_;
  double *c1_, *left_;
  C *a_, *mix_;
  const int64_t stride_, m_, b_;
};

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_COMMON_BLOCK_ORTHO_PASS_H_
