// Vectors as wide as the target has, from GCC and Clang's vector extensions.
//
// Everything here is forced inline inside the target's own namespace, and no standard header with
// inline functions is included: a function emitted once per target must never be merged with that
// of another target.
#ifndef CURVAX_CPU_SIMD_H_
#define CURVAX_CPU_SIMD_H_

#include <cstddef>
#include <cstdint>

#include "common/host_device.h"

#define CURVAX_INLINE inline __attribute__((always_inline))

namespace curvax::CURVAX_TARGET {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// A vector of kVectorBytes / sizeof(T) elements.
template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vec = typename VectorOf<T>::type;
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// A vector with as many elements as Vec<C>, whatever their size.
template <typename T, typename C>
struct MatchingVector {
  typedef T type __attribute__((vector_size(kLanes<C> * sizeof(T))));
};

// The signed integer as wide as T.
template <typename T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};
template <typename T>
using Int = typename IntegerOf<T>::type;

template <typename T>
CURVAX_INLINE Vec<T> Splat(T x) {
  return x - Vec<T>{};  // x - 0, since x + 0 would lose the sign of -0
}
template <typename T>
CURVAX_INLINE Vec<T> LoadVec(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <typename T>
CURVAX_INLINE void StoreVec(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// Sum of the lanes, in double and in one fixed order.
CURVAX_INLINE double SumLanes(Vec<float> v) {
  typedef double Wide __attribute__((vector_size(2 * kVectorBytes)));
  const Wide wide = __builtin_convertvector(v, Wide);
  const Vec<double>* half = reinterpret_cast<const Vec<double>*>(&wide);
  const Vec<double> sum = half[0] + half[1];
  double total = sum[0];
  for (int i = 1; i < kLanes<double>; ++i) total += sum[i];
  return total;
}
CURVAX_INLINE double SumLanes(Vec<double> v) {
  double total = v[0];
  for (int i = 1; i < kLanes<double>; ++i) total += v[i];
  return total;
}
template <typename T>
CURVAX_INLINE T MaxLanes(Vec<T> v) {
  T best = v[0];
  for (int i = 1; i < kLanes<T>; ++i) best = Max(best, static_cast<T>(v[i]));
  return best;
}

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CPU_SIMD_H_
