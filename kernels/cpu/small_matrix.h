// Products and triangular inverses of the small matrices of a block, in double, row major.
#ifndef CURVAX_CPU_SMALL_MATRIX_H_
#define CURVAX_CPU_SMALL_MATRIX_H_

#include "cpu/simd.h"

namespace curvax::CURVAX_LEVEL {

// c (m, n) += a (m, k) b (k, n).
CURVAX_INLINE void MultiplyAdd(int64_t m, int64_t k, int64_t n, const double* a, const double* b,
                               double* c) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t p = 0; p < k; ++p) {
      for (int64_t j = 0; j < n; ++j) c[i * n + j] += a[i * k + p] * b[p * n + j];
    }
  }
}

// c (m, n) = a (m, k) b (k, n).
CURVAX_INLINE void Multiply(int64_t m, int64_t k, int64_t n, const double* a, const double* b,
                            double* c) {
  for (int64_t i = 0; i < m * n; ++i) c[i] = 0;
  MultiplyAdd(m, k, n, a, b, c);
}

// t (b, b) = gram - c^T c, with c (m, b).
CURVAX_INLINE void PythagoreanGram(int64_t m, int64_t b, const double* c, const double* gram,
                                   double* t) {
  for (int64_t i = 0; i < b; ++i) {
    for (int64_t j = 0; j < b; ++j) {
      double sum = 0;
      for (int64_t r = 0; r < m; ++r) sum += c[r * b + i] * c[r * b + j];
      t[i * b + j] = gram[i * b + j] - sum;
    }
  }
}

// inverse (b, b) of r, which is upper triangular when rows and columns are taken in `order`.
CURVAX_INLINE void InvertTriangular(int64_t b, const int64_t* order, const double* r,
                                    double* inverse) {
  for (int64_t i = 0; i < b; ++i) {
    for (int64_t j = 0; j < b; ++j) inverse[i * b + j] = 0;
  }
  // Row p of X from X r = I, left to right.
  for (int64_t p = 0; p < b; ++p) {
    const int64_t c = order[p];
    inverse[c * b + c] = 1 / r[c * b + c];
    for (int64_t q = p + 1; q < b; ++q) {
      const int64_t d = order[q];
      double sum = 0;
      for (int64_t k = p; k < q; ++k) sum += inverse[c * b + order[k]] * r[order[k] * b + d];
      inverse[c * b + d] = -sum / r[d * b + d];
    }
  }
}

}  // namespace curvax::CURVAX_LEVEL

#endif  // CURVAX_CPU_SMALL_MATRIX_H_
