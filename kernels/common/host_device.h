// What code that is compiled for both a host and a device needs: function qualifiers, sizes.
//
// CURVAX_HOST_DEVICE: may be called on either. CURVAX_TEAM: of whichever the code is compiled for.
//
// Like all code of a target, it lives in the namespace that CURVAX_TARGET names: base, v3 and v4 on
// a CPU, cuda on a GPU.
#ifndef CURVAX_COMMON_HOST_DEVICE_H_
#define CURVAX_COMMON_HOST_DEVICE_H_

#include <cstdint>

#if defined(__CUDACC__)
#define CURVAX_HOST_DEVICE __host__ __device__ __forceinline__
#define CURVAX_TEAM __device__ __forceinline__
#else
#define CURVAX_HOST_DEVICE inline __attribute__((always_inline))
#define CURVAX_TEAM CURVAX_HOST_DEVICE
#endif

namespace curvax::CURVAX_TARGET {

template <typename T>
CURVAX_HOST_DEVICE constexpr T Min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
CURVAX_HOST_DEVICE constexpr T Max(T a, T b) {
  return a < b ? b : a;
}
CURVAX_HOST_DEVICE constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
CURVAX_HOST_DEVICE constexpr int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

template <typename To, typename From>
CURVAX_HOST_DEVICE To BitCast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "BitCast between types of different size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_COMMON_HOST_DEVICE_H_
