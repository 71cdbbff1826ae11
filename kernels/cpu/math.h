// exp and tanh on vectors, the same operations in the same order for any length and thread count.
//
// exp takes arguments x at most 0, which is all that a softmax needs. In double it is about 1 ulp;
// in float within (2 + |x| / 4) 2^-23 of the value, or three times that for a target whose products
// are not fused. tanh is within 4 ulp in float, 2 in double.
#ifndef CURVAX_CPU_MATH_H_
#define CURVAX_CPU_MATH_H_

#include "cpu/simd.h"

namespace curvax::CURVAX_TARGET {

// Evaluates c[0] x^(n-1) + ... + c[n-1].
template <typename V, typename T, int n>
CURVAX_INLINE V Horner(V x, const T (&c)[n]) {
  V y = V{} + c[0];
#pragma GCC unroll 16
  for (int i = 1; i < n; ++i) y = y * x + c[i];
  return y;
}

// e^x for x <= 0 (or NaN). Exactly 0 below -87, where float results would be subnormal.
//   x log2 e = n + f, |f| <= 1/2;   e^x = 2^n 2^f, 2^f by its minimax polynomial (9e-8 relative).
// The fused product leaves in f an error of |x| 2^-25, no more than the rounding of x itself. The
// polynomial is evaluated by Estrin's scheme: Horner's is a chain that the processor cannot
// overlap.
CURVAX_INLINE Vec<float> ExpNonPositive(Vec<float> x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  constexpr float kLog2E = 1.44269504088896341f;
  const Vec<int32_t> vanishes = x < -87.0f;
  const Vec<float> shifted = x * kLog2E + kRound;
  const Vec<float> n = shifted - kRound;
  const Vec<float> f = x * kLog2E - n;
  const Vec<float> f2 = f * f;
  const Vec<float> low = f * 0.69314700f + 1.0f;
  const Vec<float> middle = f * 5.5507336e-2f + 2.4022242e-1f;
  const Vec<float> high = f * 1.3264727e-3f + 9.6715130e-3f;
  const Vec<float> e = (high * f2 + middle) * f2 + low;
  // Unsigned: below -87, and for NaN, the sum passes the end of the signed range.
  const Vec<uint32_t> bits = BitCast<Vec<uint32_t>>(e) + (BitCast<Vec<uint32_t>>(shifted) << 23);
  return BitCast<Vec<float>>(vanishes ? Vec<uint32_t>{} : bits);
}

// As above in double; 0 below -708. Taylor's polynomial of degree 13 leaves 4e-18 at |r| = ln2 / 2.
CURVAX_INLINE Vec<double> ExpNonPositive(Vec<double> x) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kPoly[] = {1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0,
                                     1.0 / 3628800.0,    1.0 / 362880.0,    1.0 / 40320.0,
                                     1.0 / 5040.0,       1.0 / 720.0,       1.0 / 120.0,
                                     1.0 / 24.0,         1.0 / 6.0,         0.5};
  const Vec<int64_t> vanishes = x < -708.0;
  x = vanishes ? Splat(-708.0) : x;
  const Vec<double> shifted = x * 1.44269504088896340736 + kRound;
  const Vec<double> n = shifted - kRound;
  const Vec<double> r = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
  const Vec<double> e = Horner(r, kPoly) * (r * r) + r + 1.0;
  const Vec<uint64_t> bits = BitCast<Vec<uint64_t>>(e) + (BitCast<Vec<uint64_t>>(shifted) << 52);
  return BitCast<Vec<double>>(vanishes ? Vec<uint64_t>{} : bits);
}

// tanh x / x on x^2 <= 0.625^2, as polynomials in x^2 (Cephes).
CURVAX_INLINE Vec<float> TanhRatioNearZero(Vec<float> x2) {
  static constexpr float kPoly[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f,
                                    1.33314422036e-1f, -3.33332819422e-1f};
  return Horner(x2, kPoly) * x2 + 1.0f;
}
CURVAX_INLINE Vec<double> TanhRatioNearZero(Vec<double> x2) {
  static constexpr double kP[] = {-9.64399179425052238628e-1, -9.92877231001918586564e1,
                                  -1.61468768441708447952e3};
  static constexpr double kQ[] = {1.0, 1.12811678491632931402e2, 2.23548839060100448583e3,
                                  4.84406305325125486048e3};
  return Horner(x2, kP) * x2 / Horner(x2, kQ) + 1.0;
}

// tanh x: the ratio above near zero, where (1 - e) / (1 + e) would cancel; that quotient elsewhere.
template <typename T>
CURVAX_INLINE Vec<T> Tanh(Vec<T> x) {
  const Vec<T> size = x < T{0} ? -x : x;
  const Vec<T> e = ExpNonPositive(size * T{-2});
  const Vec<T> far = (T{1} - e) / (T{1} + e);
  const Vec<T> signed_far = x < T{0} ? -far : far;
  return size < T(0.625) ? x * TanhRatioNearZero(x * x) : signed_far;
}

// log of a positive double: one call per row, so the library's is used.
CURVAX_INLINE double Log(double x) { return __builtin_log(x); }

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CPU_MATH_H_
