// What the device code takes from CUDA: indices, barriers, shuffles, loads and stores.
//
// Everything that is not plain C++ goes through here, so that the same files run on a host under
// the emulation in tests/native/simt, which defines CURVAX_SIMT. All memory of a block that its
// threads share is dynamic, from SharedMemory(). Barriers and shuffles are for all threads of the
// block or warp: no thread may leave before the last of them.
#ifndef CURVAX_CUDA_DEVICE_CUH_
#define CURVAX_CUDA_DEVICE_CUH_

#include <cmath>

#include "common/storage.h"

#if defined(CURVAX_SIMT)
#include "simt/simt.h"
#endif

namespace curvax::CURVAX_TARGET {

constexpr int kWarpSize = 32;

// 16 bytes, the widest load and store.
struct alignas(16) Bytes16 {
  uint32_t words[4];
};
template <typename S>
constexpr int kVector = 16 / static_cast<int>(sizeof(S));

#if defined(CURVAX_SIMT)

using simt::BlockCount;
using simt::BlockIndex;
using simt::BlockSize;
using simt::CopyAsync;
using simt::SharedMemory;
using simt::ShuffleXor;
using simt::SyncThreads;
using simt::ThreadIndex;
using simt::WaitForCopies;

template <typename T>
T LoadStreaming(const T* p) {
  simt::CountRead(sizeof(T));
  return *p;
}
template <typename T>
void StoreStreaming(T* p, T v) {
  *p = v;
}
// Reads, so that an address beyond an array is found where a page that cannot be read follows it.
inline void Prefetch(const void* p) { (void)*static_cast<const volatile char*>(p); }

#else

__device__ __forceinline__ int ThreadIndex() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int BlockSize() { return static_cast<int>(blockDim.x); }
__device__ __forceinline__ int64_t BlockIndex() { return blockIdx.x; }
__device__ __forceinline__ int64_t BlockCount() { return gridDim.x; }
__device__ __forceinline__ void SyncThreads() { __syncthreads(); }
template <typename T>
__device__ __forceinline__ T ShuffleXor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
__device__ __forceinline__ char* SharedMemory() {
  extern __shared__ __align__(16) char curvax_shared[];
  return curvax_shared;
}

// For data that are used once: they are the first to leave L2.
__device__ __forceinline__ Bytes16 LoadStreaming(const Bytes16* p) {
  const uint4 v = __ldcs(reinterpret_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}
__device__ __forceinline__ float LoadStreaming(const float* p) { return __ldcs(p); }
__device__ __forceinline__ double LoadStreaming(const double* p) { return __ldcs(p); }
template <typename S>  // BFloat16 and Half
__device__ __forceinline__ S LoadStreaming(const S* p) {
  return {__ldcs(reinterpret_cast<const unsigned short*>(p))};
}
__device__ __forceinline__ void StoreStreaming(Bytes16* p, Bytes16 v) {
  __stcs(reinterpret_cast<uint4*>(p), make_uint4(v.words[0], v.words[1], v.words[2], v.words[3]));
}
__device__ __forceinline__ void StoreStreaming(float* p, float v) { __stcs(p, v); }
__device__ __forceinline__ void StoreStreaming(double* p, double v) { __stcs(p, v); }
template <typename S>
__device__ __forceinline__ void StoreStreaming(S* p, S v) {
  __stcs(reinterpret_cast<unsigned short*>(p), v.bits);
}
// Asks for the line of 128 bytes around p to be brought to L2.
__device__ __forceinline__ void Prefetch(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// Copies kBytes from global to shared memory, both at a multiple of it, without a register and
// without waiting. What has been copied is there after WaitForCopies for the thread that copied it,
// after another barrier for the block. Copies of 16 bytes leave L1 alone.
template <int kBytes>
__device__ __forceinline__ void CopyAsync(void* to, const void* from) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  } else {
    static_assert(kBytes == 4 || kBytes == 8, "an asynchronous copy of 4, 8 or 16 bytes");
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(kBytes)
                 : "memory");
  }
}
__device__ __forceinline__ void WaitForCopies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#endif  // CURVAX_SIMT

__device__ __forceinline__ float Exp(float x) { return ::expf(x); }
__device__ __forceinline__ double Exp(double x) { return ::exp(x); }
// Of two numbers, or the one beside a NaN: one instruction, where Max takes two.
__device__ __forceinline__ float Largest(float a, float b) { return ::fmaxf(a, b); }
__device__ __forceinline__ double Largest(double a, double b) { return ::fmax(a, b); }
__device__ __forceinline__ float Tanh(float x) { return ::tanhf(x); }
__device__ __forceinline__ double Tanh(double x) { return ::tanh(x); }

__device__ __forceinline__ int Lane() { return ThreadIndex() % kWarpSize; }
__device__ __forceinline__ int Warp() { return ThreadIndex() / kWarpSize; }
__device__ __forceinline__ int Warps() { return BlockSize() / kWarpSize; }

template <typename S>
__device__ __forceinline__ void Unpack(const Bytes16& bytes, Compute<S> (&out)[kVector<S>]) {
  S stored[kVector<S>];
  __builtin_memcpy(stored, &bytes, sizeof(bytes));
#pragma unroll
  for (int k = 0; k < kVector<S>; ++k) out[k] = Widen(stored[k]);
}
template <typename S>
__device__ __forceinline__ Bytes16 Pack(const Compute<S> (&in)[kVector<S>]) {
  S stored[kVector<S>];
#pragma unroll
  for (int k = 0; k < kVector<S>; ++k) Narrow(in[k], &stored[k]);
  Bytes16 bytes;
  __builtin_memcpy(&bytes, stored, sizeof(bytes));
  return bytes;
}

// N values that begin at a multiple of their size, in pieces of 16 bytes where that is as many.
template <int N, typename C>
__device__ __forceinline__ void LoadAligned(const C* p, C (&out)[N]) {
  constexpr int kPieces = N * static_cast<int>(sizeof(C)) / 16;
  if constexpr (kPieces > 0) {
    Bytes16 pieces[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) pieces[i] = reinterpret_cast<const Bytes16*>(p)[i];
    __builtin_memcpy(out, pieces, sizeof(pieces));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = p[i];
  }
}

// N stored elements, which begin at a multiple of their size, widened.
template <typename S, int N>
__device__ __forceinline__ void LoadWidened(const S* p, Compute<S> (&out)[N]) {
  struct alignas(N * sizeof(S)) Stored {
    S v[N];
  };
  const Stored stored = *reinterpret_cast<const Stored*>(p);
#pragma unroll
  for (int k = 0; k < N; ++k) out[k] = Widen(stored.v[k]);
}

// N values, to a multiple of their size.
template <int N, typename C>
__device__ __forceinline__ void StoreWide(const C (&in)[N], C* p) {
  struct alignas(N * sizeof(C)) Together {
    C v[N];
  } together;
  __builtin_memcpy(&together, in, sizeof(together));
  *reinterpret_cast<Together*>(p) = together;
}

template <typename T>
__device__ __forceinline__ T WarpSum(T v) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) v += ShuffleXor(v, mask);
  return v;
}
template <typename T>
__device__ __forceinline__ T WarpMax(T v) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) v = Max(v, ShuffleXor(v, mask));
  return v;
}

// The largest of `v` over the block's threads, for each of them. `memory` holds one T per warp, and
// may be used again after the next barrier.
template <typename T>
__device__ __forceinline__ T BlockMax(T v, T* memory) {
  v = WarpMax(v);
  SyncThreads();
  if (Lane() == 0) memory[Warp()] = v;
  SyncThreads();
  return WarpMax(memory[Lane() < Warps() ? Lane() : 0]);
}

// Reductions over the block's threads, of which each gets the result, always in the same order.
// They take turns with two halves of `memory`, so that one barrier each is enough: a half is
// written again only behind the barrier of the reduction in between.
class BlockReducer {
 public:
  static constexpr int kMostSums = 2;
  static constexpr int64_t kBytes = 2 * kMostSums * kWarpSize * int64_t{sizeof(double)};

  explicit __device__ BlockReducer(char* memory)
      : memory_(reinterpret_cast<double*>(memory)), other_(memory_ + kMostSums * kWarpSize) {}

  template <int N>
  __device__ __forceinline__ void Sum(double (&values)[N]) {
    static_assert(N <= kMostSums, "more memory is needed");
    double* memory = Turn();
#pragma unroll
    for (int i = 0; i < N; ++i) {
      values[i] = WarpSum(values[i]);
      if (Lane() == 0) memory[i * kWarpSize + Warp()] = values[i];
    }
    SyncThreads();
#pragma unroll
    for (int i = 0; i < N; ++i) {
      values[i] = WarpSum(Lane() < Warps() ? memory[i * kWarpSize + Lane()] : 0.0);
    }
  }
  __device__ __forceinline__ double Sum(double v) {
    double values[1] = {v};
    Sum(values);
    return values[0];
  }
  template <typename T>
  __device__ __forceinline__ T Max(T v) {
    T* memory = reinterpret_cast<T*>(Turn());
    v = WarpMax(v);
    if (Lane() == 0) memory[Warp()] = v;
    SyncThreads();
    return WarpMax(memory[Lane() < Warps() ? Lane() : 0]);
  }

 private:
  __device__ double* Turn() {
    double* memory = memory_;
    memory_ = other_;
    other_ = memory;
    return memory;
  }
  double* memory_;
  double* other_;
};

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CUDA_DEVICE_CUH_
