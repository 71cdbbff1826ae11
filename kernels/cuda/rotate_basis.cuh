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
#include "cuda/shapes.h"
#include "curvax/block_ortho.h"

namespace curvax::CURVAX_TARGET {

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

// Copies a panel of the used rows to shared memory, as it is stored: a row by neighbouring threads,
// and kCopyLoads rows of a thread together, so that as many loads are in flight. Those past the
// last row load the first one again: under a condition each load would wait for a branch.
template <typename S, typename Piece>
__device__ __forceinline__ void CopyPanel(const RotateBasisLaunch& launch, int used, int64_t begin,
                                          int width, S* rows) {
  constexpr int V = static_cast<int>(sizeof(Piece) / sizeof(S)), kCopyLoads = 8;
  const int panel = static_cast<int>(launch.panel), across = panel / V;  // powers of two
  const int shift = 31 - __builtin_clz(static_cast<unsigned>(across));
  const int i = (ThreadIndex() & (across - 1)) * V, step = BlockSize() >> shift;
  if (i >= width) return;
  const int64_t n = launch.args.n;
  const S* from = static_cast<const S*>(launch.args.basis) + begin + i;
  for (int r = ThreadIndex() >> shift; r < used; r += kCopyLoads * step) {
    Piece pieces[kCopyLoads];
#pragma unroll
    for (int j = 0; j < kCopyLoads; ++j) {
      const int row = r + j * step < used ? r + j * step : r;
      pieces[j] = LoadStreaming(reinterpret_cast<const Piece*>(from + row * n));
    }
#pragma unroll
    for (int j = 0; j < kCopyLoads; ++j) {
      const int row = r + j * step;
      if (row < used) *reinterpret_cast<Piece*>(rows + row * panel + i) = pieces[j];
    }
  }
}

// What the threads of RotatePanels share after the copy.
template <typename S>
struct RotationPanel {
  const RotateBasisLaunch& launch;
  const S* rows;  // shared
  S* basis;       // at the panel's begin
  int used, kept, width, panel;
  bool possible;
};

// Elements first + e stride, e < kElements, of the new rows of group g.
template <int kElements, typename S>
__device__ __forceinline__ void CombineRows(const RotationPanel<S>& p, int g, int first,
                                            int stride) {
  using C = Compute<S>;
  int at[kElements];  // within the panel
#pragma unroll
  for (int e = 0; e < kElements; ++e) at[e] = Min(first + e * stride, p.width - 1);
  const C* entry = static_cast<const C*>(p.launch.args.workspace) + int64_t{g} * p.used * kEntry<C>;
  const S* row = p.rows;
  C sum[kRotateRows][kElements] = {};
  for (int r = 0; r < p.used; ++r, entry += kEntry<C>, row += p.panel) {
    C factors[kEntry<C>];
    LoadAligned<kEntry<C>>(entry, factors);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const C q = Widen(row[at[e]]);
#pragma unroll
      for (int k = 0; k < kEntry<C>; ++k) sum[k % kRotateRows][e] += factors[k] * q;
    }
  }
#pragma unroll
  for (int k = 0; k < kRotateRows; ++k) {
    const int64_t j = int64_t{g} * kRotateRows + k;
    if (j >= p.kept) continue;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      if (first + e * stride >= p.width) continue;
      Narrow(p.possible ? sum[k][e] : C(NAN), p.basis + j * p.launch.args.n + at[e]);
    }
  }
}

template <typename S>
__global__ void __launch_bounds__(kRotateThreads, kRotateResidents<S>)
    RotatePanels(const __grid_constant__ RotateBasisLaunch launch) {
  constexpr int V = kVector<S>;
  const int64_t n = launch.args.n, begin = BlockIndex() * launch.panel;
  const int panel = static_cast<int>(launch.panel);
  const int width = static_cast<int>(Min(launch.panel, n - begin));
  const bool possible = Possible(launch);
  const int used = possible ? *launch.used : 0;
  const int kept = possible ? *launch.kept : static_cast<int>(launch.args.rows);
  S* rows = reinterpret_cast<S*>(SharedMemory());
  if (n % V == 0 && panel % V == 0 && reinterpret_cast<uintptr_t>(launch.args.basis) % 16 == 0) {
    CopyPanel<S, Bytes16>(launch, used, begin, width, rows);
  } else {
    CopyPanel<S, S>(launch, used, begin, width, rows);
  }
  SyncThreads();

  // `stride` threads go over the panel, `teams` of them over the groups of new rows. What is left
  // after whole rounds is split by elements too, so that fewer teams are idle.
  const int stride = Max(panel / kRotateElements, 1), teams = BlockSize() / stride;
  const int team = ThreadIndex() / stride, i = ThreadIndex() % stride;
  const RotationPanel<S> p = {
      launch, rows, static_cast<S*>(launch.args.basis) + begin, used, kept, width, panel, possible};
  const int groups = (kept + kRotateRows - 1) / kRotateRows, whole = groups / teams * teams;
  for (int g = team; g < whole; g += teams) CombineRows<kRotateElements>(p, g, i, stride);
  const int left = groups - whole;
  const int split = left * 4 <= teams ? 4 : left * 2 <= teams ? 2 : 1;
  if (team >= left * split) return;
  const int g = whole + team / split, first = i + team % split * (kRotateElements / split) * stride;
  if (split == 4) {
    CombineRows<kRotateElements / 4>(p, g, first, stride);
  } else if (split == 2) {
    CombineRows<kRotateElements / 2>(p, g, first, stride);
  } else {
    CombineRows<kRotateElements>(p, g, first, stride);
  }
}

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CUDA_ROTATE_BASIS_CUH_
