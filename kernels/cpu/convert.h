// Conversion of vectors of storage types to and from the type that arithmetic uses.
//
// Widening is exact; narrowing rounds to nearest, ties to even, for every target.
#ifndef CURVAX_CPU_CONVERT_H_
#define CURVAX_CPU_CONVERT_H_

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "common/storage.h"
#include "cpu/simd.h"

namespace curvax::CURVAX_TARGET {

using HalfWords = MatchingVector<uint16_t, float>::type;

CURVAX_INLINE Vec<float> LoadAs(const float* p) { return LoadVec(p); }
CURVAX_INLINE Vec<double> LoadAs(const double* p) { return LoadVec(p); }
CURVAX_INLINE void StoreAs(float* p, Vec<float> v) { StoreVec(p, v); }
CURVAX_INLINE void StoreAs(double* p, Vec<double> v) { StoreVec(p, v); }

// 16-bit words as 32-bit ones. With intrinsics, since GCC 12 widens half a vector at a time; of
// AVX-512 the masked form, since it warns of an uninitialised operand inside its own unmasked one.
CURVAX_INLINE Vec<uint32_t> LoadWords(const BFloat16* p) {
#if defined(__AVX512F__)
  return BitCast<Vec<uint32_t>>(
      _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return BitCast<Vec<uint32_t>>(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  HalfWords words;
  __builtin_memcpy(&words, p, sizeof(words));
  return __builtin_convertvector(words, Vec<uint32_t>);
#endif
}
CURVAX_INLINE Vec<float> LoadAs(const BFloat16* p) {
  return BitCast<Vec<float>>(LoadWords(p) << 16);
}
CURVAX_INLINE void StoreAs(BFloat16* p, Vec<float> v) {
  const Vec<uint32_t> bits = BitCast<Vec<uint32_t>>(v);
  const Vec<uint32_t> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Vec<uint32_t> quiet_nan = (bits >> 16) | 0x40u;
  const Vec<uint32_t> result = (bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded;
  const HalfWords words = __builtin_convertvector(result, HalfWords);
  __builtin_memcpy(p, &words, sizeof(words));
}

#if defined(__AVX512F__)
// The masked forms, as above.
CURVAX_INLINE Vec<float> LoadAs(const Half* p) {
  return BitCast<Vec<float>>(
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
CURVAX_INLINE void StoreAs(Half* p, Vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, BitCast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
CURVAX_INLINE Vec<float> LoadAs(const Half* p) {
  return BitCast<Vec<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
CURVAX_INLINE void StoreAs(Half* p, Vec<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(BitCast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
}
#else
CURVAX_INLINE Vec<float> LoadAs(const Half* p) {
  HalfWords words;
  __builtin_memcpy(&words, p, sizeof(words));
  const Vec<uint32_t> h = __builtin_convertvector(words, Vec<uint32_t>);
  const Vec<uint32_t> magnitude = (h & 0x7fffu) << 13;
  // Rebias the exponent by a multiplication, which makes normal numbers of subnormal ones too.
  const Vec<float> scaled = BitCast<Vec<float>>(magnitude) * 0x1p112f;
  const Vec<uint32_t> finite = BitCast<Vec<uint32_t>>(scaled);
  const Vec<uint32_t> special = magnitude | 0x7f800000u;
  const Vec<uint32_t> bits = (h & 0x7c00u) == 0x7c00u ? special : finite;
  return BitCast<Vec<float>>(bits | ((h & 0x8000u) << 16));
}
CURVAX_INLINE void StoreAs(Half* p, Vec<float> v) {
  const Vec<uint32_t> bits = BitCast<Vec<uint32_t>>(v);
  const Vec<uint32_t> magnitude = bits & 0x7fffffffu;
  const Vec<uint32_t> normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves a subnormal half's bits, rounded by the addition, at the low end.
  const Vec<uint32_t> subnormal =
      BitCast<Vec<uint32_t>>(BitCast<Vec<float>>(magnitude) + 0.5f) - 0x3f000000u;
  const Vec<uint32_t> infinity = Vec<uint32_t>{} + 0x7c00u;
  const Vec<uint32_t> quiet_nan = Vec<uint32_t>{} + 0x7e00u;
  Vec<uint32_t> result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x47800000u ? infinity : result;
  result = magnitude > 0x7f800000u ? quiet_nan : result;
  result |= (bits >> 16) & 0x8000u;
  const HalfWords words = __builtin_convertvector(result, HalfWords);
  __builtin_memcpy(p, &words, sizeof(words));
}
#endif

// As many elements as a vector of doubles has, as floats.
using Floats = MatchingVector<float, double>::type;

CURVAX_INLINE Floats LoadFloats(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
CURVAX_INLINE Floats LoadFloats(const BFloat16* p) {
  MatchingVector<uint16_t, double>::type words;
  __builtin_memcpy(&words, p, sizeof(words));
  using Bits = MatchingVector<uint32_t, double>::type;
  return BitCast<Floats>(__builtin_convertvector(words, Bits) << 16);
}
CURVAX_INLINE Floats LoadFloats(const Half* p) {
#if defined(__AVX512F__)
  return BitCast<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__F16C__)
  return BitCast<Floats>(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  Floats v;
  for (int i = 0; i < kLanes<double>; ++i) v[i] = Widen(p[i]);
  return v;
#endif
}

// The same as doubles. By name, since GCC 12 takes the conversion of a vector apart.
CURVAX_INLINE Vec<double> LoadWide(const double* p) { return LoadVec(p); }
template <typename S>
CURVAX_INLINE Vec<double> LoadWide(const S* p) {
  const Floats v = LoadFloats(p);
#if defined(__AVX512F__)
  return BitCast<Vec<double>>(_mm512_maskz_cvtps_pd(0xff, BitCast<__m256>(v)));
#elif defined(__AVX2__)
  return BitCast<Vec<double>>(_mm256_cvtps_pd(BitCast<__m128>(v)));
#else
  return __builtin_convertvector(v, Vec<double>);
#endif
}

// The first `count` elements at p, which may be fewer than a vector; `fill` in the other lanes.
template <typename S>
CURVAX_INLINE Vec<Compute<S>> LoadPartial(const S* p, int64_t count, Compute<S> fill) {
  using C = Compute<S>;
  S padded[kLanes<C>] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
  Vec<C> v = LoadAs(padded);
  for (int64_t i = count; i < kLanes<C>; ++i) v[i] = fill;
  return v;
}
template <typename S>
CURVAX_INLINE void StorePartial(S* p, int64_t count, Vec<Compute<S>> v) {
  S padded[kLanes<Compute<S>>];
  StoreAs(padded, v);
  for (int64_t i = 0; i < count; ++i) p[i] = padded[i];
}

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CPU_CONVERT_H_
