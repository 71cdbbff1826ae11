// The update of a panel of the block in a sweep of block_ortho: what each sharer of the rows adds
// to it, and the sum of that.
#ifndef CURVAX_CUDA_ROW_UPDATE_CUH_
#define CURVAX_CUDA_ROW_UPDATE_CUH_

#include "cuda/panel.cuh"
#include "cuda/shapes.h"

namespace curvax::CURVAX_TARGET {

// The first `count` rows times their factors, plus the first `columns` columns of the block times
// theirs.
template <typename S, bool kTensor>
struct UpdateTerms {
  Panel<S, kTensor> rows;
  int count;
  Panel<Compute<S>, kTensor> block;
  int columns;
  const Compute<S>*factors, *mix;
};

// By threads: the sharers are threads, each with 16 bytes of tiles of B columns. Factors are in
// rows.

// Adds the rows first, first + 2^log_step, ... below `end`, N elements of each, times kColumns
// factors, which are `padded` apart.
template <typename T, typename C, int kColumns, int N>
__device__ __forceinline__ void AddProducts(const T* rows, const C* factors, int padded, int first,
                                            int end, int log_step, C (&sum)[kColumns][N]) {
  const int count = Turns(first, end, log_step);
#pragma unroll 4
  for (int k = 0; k < count; ++k) {
    C q[N], factor[kColumns];
    LoadWidened<T, N>(rows, q);
    LoadAligned<kColumns>(factors, factor);
    rows += Panel<T>::kStrip << log_step;
    factors += padded << log_step;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int e = 0; e < N; ++e) sum[c][e] += factor[c] * q[e];
    }
  }
}

// The sharers are threads, each with 16 bytes of tiles of B columns.
template <int B, typename S>
__device__ __forceinline__ void ShareUpdate(const SweepShape& shape,
                                            const UpdateTerms<S, false>& terms,
                                            const Panel<Compute<S>>& exchange) {
  using C = Compute<S>;
  constexpr int N = 1 << kLogWide<C>, kColumns = kUpdateColumns<B>;
  const int log_wides = shape.log_panel - kLogWide<C>, log_units = shape.log_units;
  const int padded = shape.tiles * B, step = shape.log_sharers;
  const int sharer = ThreadIndex() >> log_units;
  for (int u = ThreadIndex() & ((1 << log_units) - 1); u < 1 << log_units; u += kSweepThreads) {
    const int i = (u & ((1 << log_wides) - 1)) * N, first = (u >> log_wides) * kColumns;
    if (first >= padded) break;
    const int factor = sharer * padded + first;
    C sum[kColumns][N] = {};
    AddProducts(terms.rows.At(sharer, i), terms.factors + factor, padded, sharer, terms.count, step,
                sum);
    AddProducts(terms.block.At(sharer, i), terms.mix + factor, padded, sharer, terms.columns, step,
                sum);
    C* out = exchange.At(first, i) + sharer * (padded << shape.log_panel);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) StoreWide(sum[c], out + c * Panel<C>::kStrip);
  }
}

// Calls finish(c, i, at, x) with the sums of neighbouring elements of the columns, of which the
// first is the i-th of the panel and is at `at` in the block's.
template <typename C, typename F>
__device__ __forceinline__ void AddShares(const SweepShape& shape, const Panel<C>& block,
                                          const Panel<C>& exchange, const F& finish) {
  constexpr int N = 1 << kLogWide<C>;
  const int log_wides = shape.log_panel - kLogWide<C>;
  const int i = (ThreadIndex() & ((1 << log_wides) - 1)) * N;
  // Of a sharer, strips that are `apart` elements apart.
  const int share = exchange.apart << (shape.log_panel - Panel<C>::kLogStrip);
  for (int c = ThreadIndex() >> log_wides; c < shape.columns; c += kSweepThreads >> log_wides) {
    C x[N] = {};
    const C* shares = exchange.At(c, i);
#pragma unroll 4
    for (int k = 0; k < 1 << shape.log_sharers; ++k) {
      C more[N];
      LoadAligned<N>(shares, more);
      shares += share;
#pragma unroll
      for (int e = 0; e < N; ++e) x[e] += more[e];
    }
    finish(c, i, block.At(c, i), x);
  }
}

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CUDA_ROW_UPDATE_CUH_
