// Products and triangular inverses of the small matrices of a block, in double, row major.
//
// A Team is what carries them out: one thread of a CPU, or the threads of one block on a GPU.
//   team.For(count, f)            calls f(i) for every i in [0, count); all have returned after it
//   team.Sums(count, n, term, f)  calls f(i, sum over k < n of term(i, k)) likewise
//   team.Max(count, f)            the largest of f(i), at least 0, for every member
//   team.Once(f)                  calls f once; it has returned after it
#ifndef CURVAX_COMMON_SMALL_MATRIX_H_
#define CURVAX_COMMON_SMALL_MATRIX_H_

#include "common/host_device.h"

namespace curvax::CURVAX_TARGET {

// c (m, n) = [c +] a (m, k) b (k, n).
template <bool kAdd, typename Team>
CURVAX_TEAM void Multiply(const Team& team, int64_t m, int64_t k, int64_t n, const double* a,
                          const double* b, double* c) {
  team.For(m * n, [=](int64_t e) {
    const int64_t i = e / n, j = e % n;
    double sum = kAdd ? c[e] : 0.0;
    for (int64_t p = 0; p < k; ++p) sum += a[i * k + p] * b[p * n + j];
    c[e] = sum;
  });
}

// t (b, b) = gram - c^T c, with c (m, b).
template <typename Team>
CURVAX_TEAM void PythagoreanGram(const Team& team, int64_t m, int64_t b, const double* c,
                                 const double* gram, double* t) {
  team.Sums(
      b * b, m, [=](int64_t e, int64_t r) { return c[r * b + e / b] * c[r * b + e % b]; },
      [=](int64_t e, double sum) { t[e] = gram[e] - sum; });
}

// inverse (b, b) of r, which is upper triangular when rows and columns are taken in `order`.
template <typename Team>
CURVAX_TEAM void InvertTriangular(const Team& team, int64_t b, const int64_t* order,
                                  const double* r, double* inverse) {
  // Row p of X from X r = I, left to right.
  team.For(b, [=](int64_t p) {
    const int64_t c = order[p];
    for (int64_t q = 0; q < p; ++q) inverse[c * b + order[q]] = 0;
    inverse[c * b + c] = 1 / r[c * b + c];
    for (int64_t q = p + 1; q < b; ++q) {
      const int64_t d = order[q];
      double sum = 0;
      for (int64_t k = p; k < q; ++k) sum += inverse[c * b + order[k]] * r[order[k] * b + d];
      inverse[c * b + d] = -sum / r[d * b + d];
    }
  });
}

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_COMMON_SMALL_MATRIX_H_
