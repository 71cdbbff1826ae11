// Storage types, the types that they are computed in, and conversions of one element.
//
// Widening is exact; narrowing rounds to nearest, ties to even, everywhere.
#ifndef CURVAX_COMMON_STORAGE_H_
#define CURVAX_COMMON_STORAGE_H_

#include "common/host_device.h"

namespace curvax::CURVAX_TARGET {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename S>
struct ComputeTypeOf {
  using type = float;
};
template <>
struct ComputeTypeOf<double> {
  using type = double;
};
// The type that elements stored as S are computed in.
template <typename S>
using Compute = typename ComputeTypeOf<S>::type;

CURVAX_HOST_DEVICE float Widen(float x) { return x; }
CURVAX_HOST_DEVICE double Widen(double x) { return x; }
CURVAX_HOST_DEVICE float Widen(BFloat16 x) { return BitCast<float>(uint32_t{x.bits} << 16); }
CURVAX_HOST_DEVICE float Widen(Half x) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
#else
  const uint32_t magnitude = uint32_t{x.bits & 0x7fffu} << 13;
  // Rebias the exponent by a multiplication, which makes normal numbers of subnormal ones too.
  const uint32_t finite = BitCast<uint32_t>(BitCast<float>(magnitude) * 0x1p112f);
  const uint32_t bits = (x.bits & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : finite;
  return BitCast<float>(bits | uint32_t{x.bits & 0x8000u} << 16);
#endif
}

CURVAX_HOST_DEVICE void Narrow(float x, float* out) { *out = x; }
CURVAX_HOST_DEVICE void Narrow(double x, double* out) { *out = x; }
CURVAX_HOST_DEVICE void Narrow(float x, BFloat16* out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#else
  const uint32_t bits = BitCast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  out->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
#endif
}
CURVAX_HOST_DEVICE void Narrow(float x, Half* out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#else
  const uint32_t bits = BitCast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  uint32_t half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves a subnormal half's bits, rounded by the addition, at the low end.
  if (magnitude < 0x38800000u)
    half = BitCast<uint32_t>(BitCast<float>(magnitude) + 0.5f) - 0x3f000000u;
  if (magnitude >= 0x47800000u) half = 0x7c00u;
  if (magnitude > 0x7f800000u) half = 0x7e00u;
  out->bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
#endif
}

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_COMMON_STORAGE_H_
