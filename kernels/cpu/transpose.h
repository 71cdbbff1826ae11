// Transposes as many vectors as a vector has elements, in registers.
#ifndef CURVAX_CPU_TRANSPOSE_H_
#define CURVAX_CPU_TRANSPOSE_H_

#include "cpu/simd.h"

namespace curvax::CURVAX_TARGET {

template <int... kIndices>
struct Indices {
  // Elements of x and y in turn, from element `kFirst` on.
  template <int kFirst, typename V>
  static CURVAX_INLINE V Interleave(V x, V y) {
    return __builtin_shufflevector(
        x, y, (kFirst + kIndices / 2 + kIndices % 2 * static_cast<int>(sizeof...(kIndices)))...);
  }
};
template <int kCount, int... kIndices>
struct IndicesUpTo : IndicesUpTo<kCount - 1, kCount - 1, kIndices...> {};
template <int... kIndices>
struct IndicesUpTo<0, kIndices...> : Indices<kIndices...> {};

// Each step interleaves the first half of the vectors with the second: a rotation by one bit of an
// element's place, which is (vector, lane). After log2(lanes) of them the two have changed places.
template <typename T>
CURVAX_INLINE void Transpose(Vec<T> (&v)[kLanes<T>]) {
  constexpr int kL = kLanes<T>, kHalf = kL / 2;
  for (int step = 1; step < kL; step *= 2) {
    Vec<T> next[kL];
    for (int i = 0; i < kHalf; ++i) {
      next[2 * i] = IndicesUpTo<kL>::template Interleave<0>(v[i], v[i + kHalf]);
      next[2 * i + 1] = IndicesUpTo<kL>::template Interleave<kHalf>(v[i], v[i + kHalf]);
    }
    for (int i = 0; i < kL; ++i) v[i] = next[i];
  }
}

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CPU_TRANSPOSE_H_
