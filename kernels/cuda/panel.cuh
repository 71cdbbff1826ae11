// Panels of vectors in shared memory, and the way there.
//
// A panel has the same elements of many rows, strip by strip: a strip is 128 bytes of the compute
// type's elements, of one row after another. The rows of a strip lie at a distance that the
// compiler knows, and 8 lanes that take 16 bytes each touch all banks once, however long the panel
// is.
#ifndef CURVAX_CUDA_PANEL_CUH_
#define CURVAX_CUDA_PANEL_CUH_

#include "cuda/device.cuh"
#include "cuda/shapes.h"

namespace curvax::CURVAX_TARGET {

// For tensor cores (`kSwizzled`), whose operands are taken from up to 8 rows at a time, the 16-byte
// pieces of a row's strip change places, depending on the row: those at one place of rows 0 to 7,
// where a row's strip has 64 bytes, then touch all banks once, and where it has 128, so do two
// pieces side by side of rows 0 to 3, and every second one of rows 0 and 1. The places are the same
// 8 rows further, or 4, which the steps of LoadVectors are multiples of.
template <typename T, bool kSwizzled = false>
struct Panel {
  static constexpr int kLogStrip = kLogShortestPanel<Compute<T>>, kStrip = 1 << kLogStrip;

  T* begin;
  int apart;  // elements between strips

  __device__ __forceinline__ int Offset(int row, int i) const {
    return (i >> kLogStrip) * apart + row * kStrip + Place(row, i & (kStrip - 1));
  }
  __device__ __forceinline__ T* At(int row, int i) const { return begin + Offset(row, i); }

 private:
  __device__ static int Place(int row, int i) {
    if (!kSwizzled) return i;
    constexpr int kPiece = 16 / static_cast<int>(sizeof(T));
    return i ^ kPiece * (sizeof(T) == 2 ? row >> 1 & 3 : (row & 3) << 1 | (row & 1));
  }
};

// How many of first, first + 2^log_step, ... are below `end`.
__device__ __forceinline__ int Turns(int first, int end, int log_step) {
  return (end - first + (1 << log_step) - 1) >> log_step;
}

template <typename T, bool kSwizzled>
__device__ __forceinline__ void LoadVectors(const T* from, int64_t stride, int rows, int log_panel,
                                            const Panel<T, kSwizzled>& to) {
  constexpr int kLogVector = sizeof(T) == 8 ? 1 : sizeof(T) == 4 ? 2 : 3;
  const int log_vectors = log_panel - kLogVector, log_step = kLogSweepThreads - log_vectors;
  const int first = ThreadIndex() >> log_vectors;
  const int i = (ThreadIndex() & ((1 << log_vectors) - 1)) << kLogVector;
  from += first * stride + i;
  stride <<= log_step;
  T* at = to.At(first, i);
  const int count = Turns(first, rows, log_step);
#pragma unroll 4
  for (int k = 0; k < count; ++k) {
    CopyAsync<16>(at, from);
    from += stride;
    at += Panel<T>::kStrip << log_step;
  }
}

// The first `left` elements of rows that are not aligned, or end within the panel; then 0.
template <typename T, bool kSwizzled>
__device__ __forceinline__ void LoadElements(const T* from, int64_t stride, int rows, int log_panel,
                                             int64_t left, const Panel<T, kSwizzled>& to) {
  constexpr int kTogether = 4;  // loads in flight, of elements that are too short for CopyAsync
  const int i = ThreadIndex() & ((1 << log_panel) - 1), step = kSweepThreads >> log_panel;
  for (int r = ThreadIndex() >> log_panel; r < rows; r += kTogether * step) {
    T x[kTogether] = {};
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int row = r + k * step;
      if (row >= rows) continue;
      if (i >= left) {
        *to.At(row, i) = T{};
      } else if constexpr (sizeof(T) >= 4) {
        CopyAsync<sizeof(T)>(to.At(row, i), from + row * stride + i);
      } else {
        x[k] = LoadStreaming(from + row * stride + i);
      }
    }
    if constexpr (sizeof(T) < 4) {
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (r + k * step < rows) *to.At(r + k * step, i) = x[k];
      }
    }
  }
}

// Begins to copy a panel of rows, of which `left` elements are there: by 16 bytes if they are
// aligned to that. It has arrived after WaitForCopies and a barrier.
template <typename T, bool kSwizzled>
__device__ __forceinline__ void LoadPanel(bool aligned, const T* from, int64_t stride, int rows,
                                          int log_panel, int64_t left,
                                          const Panel<T, kSwizzled>& to) {
  if (aligned && left >= 1 << log_panel) {
    LoadVectors(from, stride, rows, log_panel, to);
  } else {
    LoadElements(from, stride, rows, log_panel, left, to);
  }
}

// The first `left` of N elements, together where the address allows it.
template <typename T, int N>
__device__ __forceinline__ void StoreElements(const Compute<T> (&x)[N], int64_t left, T* out) {
  struct alignas(N * sizeof(T)) Stored {
    T v[N];
  } stored;
#pragma unroll
  for (int k = 0; k < N; ++k) Narrow(x[k], &stored.v[k]);
  if (left >= N && reinterpret_cast<uintptr_t>(out) % sizeof(stored) == 0) {
    *reinterpret_cast<Stored*>(out) = stored;
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (k < left) out[k] = stored.v[k];
    }
  }
}

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CUDA_PANEL_CUH_
