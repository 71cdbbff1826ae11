// Products of small matrices on tensor cores, by all lanes of a warp together.
//
// D (M x N) += A (M x K) B (K x N). Every lane holds some elements of each matrix; with g = lane /
// 4 and t = lane % 4 these are, as (row, column), in the order of the registers:
//
//   shape           A                                B                        C and D
//   m16n8k16 bf16   (g, 2t) (g, 2t+1)                (2t, g) (2t+1, g)        (g, 2t) (g, 2t+1)
//                   (g+8, 2t) (g+8, 2t+1)            (2t+8, g) (2t+9, g)      (g+8, 2t) (g+8, 2t+1)
//                   (g, 2t+8) (g, 2t+9)
//                   (g+8, 2t+8) (g+8, 2t+9)
//   m16n8k8 tf32    (g, t) (g+8, t)                  (t, g) (t+4, g)          the same
//                   (g, t+4) (g+8, t+4)
//   m8n8k4 f64      (g, t)                           (t, g)                   (g, 2t) (g, 2t+1)
//
// A register of bf16 has two elements, the first in its low half; one of tf32 has a float whose low
// 13 bits are 0. `ldmatrix.x4` loads four matrices of 8 x 8 elements of 16 bits: lanes 8i to 8i + 7
// give the addresses of the rows of the i-th, whose register has (g, 2t) (g, 2t+1), or (2t, g)
// (2t+1, g) with `.trans`. Source: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point
// type", "Matrix Fragments for mma.m16n8k8", "Matrix Fragments for mma.m8n8k4 with .f64 floating
// point type", and "ldmatrix".
//
// Products of bf16 and of tf32 are exact; their sums are not rounded but truncated, to about 24
// bits of the largest term. So few of them are added on a tensor core before the sum goes to a
// register.
#ifndef CURVAX_CUDA_MMA_CUH_
#define CURVAX_CUDA_MMA_CUH_

#include "cuda/device.cuh"

namespace curvax::CURVAX_TARGET {

#if defined(CURVAX_SIMT)

using simt::LoadMatrices;
using simt::MultiplyBf16;
using simt::MultiplyF64;
using simt::MultiplyTf32;

#else

__device__ __forceinline__ void MultiplyBf16(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void MultiplyTf32(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void MultiplyF64(double (&d)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(d[0]), "+d"(d[1])
               : "d"(a), "d"(b));
}
// `row`: in shared memory, 16 bytes at a multiple of 16.
template <bool kTransposed>
__device__ __forceinline__ void LoadMatrices(const void* row, uint32_t (&out)[4]) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
  }
}

#endif  // CURVAX_SIMT

// Which lane this is, as in the table.
__device__ __forceinline__ int LaneGroup() { return Lane() / 4; }
__device__ __forceinline__ int LaneInGroup() { return Lane() % 4; }

// A float is the sum of three parts, each of which has the leading bits of what the ones before
// leave, and no rounding anywhere: 8 + 8 + 8 bits in bf16, 11 + 11 + 2 in tf32. NaN and infinity
// become NaN. Parts of elements of A or B that one instruction takes, in its registers.
struct Parts {
  uint32_t high[2], middle[2], low[2];
};
constexpr uint32_t kBf16Bits = 0xffff0000u, kTf32Bits = 0xffffe000u;

// The leading bits of x, of which the rest stays.
template <uint32_t kBits>
__device__ __forceinline__ uint32_t TakeBits(float* x) {
  const uint32_t bits = BitCast<uint32_t>(*x) & kBits;
  *x -= BitCast<float>(bits);
  return bits;
}

// Four elements, two to a register.
struct Bf16 {
  static constexpr int kElements = 4;
  static __device__ __forceinline__ void Multiply(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
    MultiplyBf16(d, a, b);
  }
  static __device__ __forceinline__ Parts Split(const float* x) {
    Parts parts;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float first = x[2 * i], second = x[2 * i + 1];
      parts.high[i] = TakePair(&first, &second);
      parts.middle[i] = TakePair(&first, &second);
      parts.low[i] = TakePair(&first, &second);
    }
    return parts;
  }

 private:
  static __device__ __forceinline__ uint32_t TakePair(float* first, float* second) {
    const uint32_t low = TakeBits<kBf16Bits>(first) >> 16;
    return low | TakeBits<kBf16Bits>(second);
  }
};
// Two elements.
struct Tf32 {
  static constexpr int kElements = 2;
  static __device__ __forceinline__ void Multiply(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
    MultiplyTf32(d, a, b);
  }
  static __device__ __forceinline__ Parts Split(const float* x) {
    Parts parts;
#pragma unroll
    for (int i = 0; i < 2; ++i) SplitOne(x[i], &parts.high[i], &parts.middle[i], &parts.low[i]);
    return parts;
  }
  static __device__ __forceinline__ void SplitOne(float x, uint32_t* high, uint32_t* middle,
                                                  uint32_t* low) {
    *high = TakeBits<kTf32Bits>(&x);
    *middle = TakeBits<kTf32Bits>(&x);
    *low = BitCast<uint32_t>(x);
  }
};

// d += A B over kCount operands, of which B is split. Small terms come first, while truncation
// takes little of the sum.
template <typename Mma, int kCount>
__device__ __forceinline__ void MultiplySplit(float (&d)[4], const uint32_t (&a)[kCount][4],
                                              const Parts (&b)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) Mma::Multiply(d, a[k], b[k].low);
#pragma unroll
  for (int k = 0; k < kCount; ++k) Mma::Multiply(d, a[k], b[k].middle);
#pragma unroll
  for (int k = 0; k < kCount; ++k) Mma::Multiply(d, a[k], b[k].high);
}
// d += A B, of which A has 8 rows and both are split: all products of parts but for low ones with
// low or middle ones of B. Rows 8 to 15 of d get those of middle parts, to be added to the others
// in the end.
template <typename Mma, int kCount>
__device__ __forceinline__ void MultiplyStacked(float (&d)[4], const Parts (&a)[kCount],
                                                const Parts (&b)[kCount]) {
  uint32_t stacked[kCount][4];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    stacked[k][0] = a[k].high[0];
    stacked[k][1] = a[k].middle[0];
    stacked[k][2] = a[k].high[1];
    stacked[k][3] = a[k].middle[1];
    Mma::Multiply(d, {a[k].low[0], 0, a[k].low[1], 0}, b[k].high);
  }
  MultiplySplit<Mma>(d, stacked, b);
}

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CUDA_MMA_CUH_
