// Rotates a basis in place on a GPU: row j <- sum_{i < used} rotation[i, j] row i, for j < kept.
//
// Algorithm (K4): PackRotation lays the entries out as the threads read them. RotatePanels: one
// block per panel of elements; it copies the panel of the used rows to shared memory, and each
// thread forms kRotateElements elements of kRotateRows new rows at a time from there, over the old
// ones. Bytes from device memory: the used rows once, the kept ones once; nothing of size n is
// allocated. Accumulation: the compute type over `used` terms; for float an entry is split in two
// floats, since rounding it to one would leave the rows orthonormal only to 1e-7 after every
// restart, an error that is the same for all elements and so adds up. Determinism: elements are
// independent.
#ifndef CURVAX_CUDA_ROTATE_BASIS_CUH_
#define CURVAX_CUDA_ROTATE_BASIS_CUH_

#include "cuda/device.cuh"
#include "cuda/launch_config.h"
#include "curvax/block_ortho.h"

namespace curvax::CURVAX_LEVEL {

// `args.used` and `args.kept` are on the device. An impossible pair leaves NaN in all rows.
struct RotateBasisLaunch {
  RotateBasisArgs args;
  const int32_t *used, *kept;
  int64_t panel;
};

// Entries of one old row for kRotateRows new ones; for float the rounding errors behind the values.
template <typename C>
constexpr int kEntryParts = sizeof(C) == sizeof(float) ? 2 : 1;
template <typename C>
constexpr int kEntry = kRotateRows * kEntryParts<C>;

inline __device__ bool Possible(const RotateBasisLaunch& launch) {
  return *launch.kept >= 0 && *launch.kept <= *launch.used && *launch.used <= launch.args.rows;
}

// (group of new rows, old row, kEntry), in the workspace.
template <typename C>
__global__ void __launch_bounds__(kRotateThreads)
    PackRotation(const __grid_constant__ RotateBasisLaunch launch) {
  if (!Possible(launch)) return;
  const int64_t used = *launch.used, kept = *launch.kept, rows = launch.args.rows;
  const int64_t count = CeilDiv(kept, kRotateRows) * kRotateRows * used;
  const int64_t stride = BlockCount() * BlockSize();
  C* entries = static_cast<C*>(launch.args.workspace);
  for (int64_t e = BlockIndex() * BlockSize() + ThreadIndex(); e < count; e += stride) {
    const int64_t k = e % kRotateRows, i = e / kRotateRows % used;
    const int64_t j = e / kRotateRows / used * kRotateRows + k;
    const double value = j < kept ? launch.args.rotation[i * rows + j] : 0.0;
    C* entry = entries + e / kRotateRows * kEntry<C>;
    entry[k] = C(value);
    if constexpr (kEntryParts<C> == 2) entry[kRotateRows + k] = C(value - double(entry[k]));
  }
}

template <typename S>
__device__ __forceinline__ void CopyPanel(const RotateBasisLaunch& launch, int64_t used,
                                          int64_t begin, int64_t width, Compute<S>* rows) {
  constexpr int V = kVector<S>;
  const int64_t n = launch.args.n, panel = launch.panel;
  const S* basis = static_cast<const S*>(launch.args.basis) + begin;
  if (n % V == 0 && panel % V == 0 && reinterpret_cast<uintptr_t>(launch.args.basis) % 16 == 0) {
    const int64_t vectors = width / V;
    for (int64_t e = ThreadIndex(); e < used * vectors; e += BlockSize()) {
      const int64_t r = e / vectors, i = e % vectors * V;
      Compute<S> x[V];
      Unpack<S>(LoadStreaming(reinterpret_cast<const Bytes16*>(basis + r * n + i)), x);
#pragma unroll
      for (int k = 0; k < V; ++k) rows[r * panel + i + k] = x[k];
    }
  } else {
    for (int64_t e = ThreadIndex(); e < used * width; e += BlockSize()) {
      const int64_t r = e / width, i = e % width;
      rows[r * panel + i] = Widen(LoadStreaming(basis + r * n + i));
    }
  }
}

template <typename S>
__global__ void __launch_bounds__(kRotateThreads)
    RotatePanels(const __grid_constant__ RotateBasisLaunch launch) {
  using C = Compute<S>;
  const int64_t n = launch.args.n, panel = launch.panel, begin = BlockIndex() * panel;
  const int64_t width = Min(panel, n - begin);
  const bool possible = Possible(launch);
  const int64_t used = possible ? *launch.used : 0;
  const int64_t kept = possible ? *launch.kept : launch.args.rows;
  C* rows = reinterpret_cast<C*>(SharedMemory());
  CopyPanel<S>(launch, used, begin, width, rows);
  SyncThreads();

  const int64_t stride = Max<int64_t>(panel / kRotateElements, 1), lanes = BlockSize() / stride;
  const int64_t i = ThreadIndex() % stride;
  S* basis = static_cast<S*>(launch.args.basis) + begin;
  if (i >= width) return;
  for (int64_t g = ThreadIndex() / stride; g * kRotateRows < kept; g += lanes) {
    const C* entry = static_cast<const C*>(launch.args.workspace) + g * used * kEntry<C>;
    C sum[kRotateRows][kRotateElements] = {};
    for (int64_t r = 0; r < used; ++r, entry += kEntry<C>) {
      C factors[kEntry<C>];
      LoadAligned<kEntry<C>>(entry, factors);
#pragma unroll
      for (int e = 0; e < kRotateElements; ++e) {
        const C q = rows[r * panel + Min(i + e * stride, width - 1)];
#pragma unroll
        for (int k = 0; k < kEntry<C>; ++k) sum[k % kRotateRows][e] += factors[k] * q;
      }
    }
#pragma unroll
    for (int k = 0; k < kRotateRows; ++k) {
      const int64_t j = g * kRotateRows + k;
      if (j >= kept) continue;
#pragma unroll
      for (int e = 0; e < kRotateElements; ++e) {
        const int64_t at = i + e * stride;
        if (at < width) Narrow(possible ? sum[k][e] : C(NAN), basis + j * n + at);
      }
    }
  }
}

}  // namespace curvax::CURVAX_LEVEL

#endif  // CURVAX_CUDA_ROTATE_BASIS_CUH_
