// The update of a panel of the block in a sweep of block_ortho (row_update.cuh), on tensor cores:
// the sharers are teams of warps, each warp with a strip of tiles of 8 columns. Factors are in the
// order of lanes.
#ifndef CURVAX_CUDA_TENSOR_UPDATE_CUH_
#define CURVAX_CUDA_TENSOR_UPDATE_CUH_

#include "cuda/row_update.cuh"
#include "cuda/tensor_sums.cuh"

namespace curvax::CURVAX_TARGET {

template <typename S>
__device__ __forceinline__ void ShareUpdate(const SweepShape& shape, const TensorWorker<S>& worker,
                                            const UpdateTerms<S, true>& terms,
                                            Compute<S>* exchange) {
  using Worker = TensorWorker<S>;
  constexpr int kRows = kTileRows<S>;
  const int teams = 1 << worker.log_teams;
  Compute<S>* out = exchange + worker.team * (shape.tiles * kMaxTileColumns << shape.log_panel);
#pragma unroll 1
  for (int tile = 0; tile < shape.tiles; ++tile) {
    typename Tensor<S>::Update update;
#pragma unroll 2
    for (int r = worker.team; r * kRows < terms.count; r += teams) {
      update.AddRows(worker.lanes, terms.rows.begin + r * Worker::kRowTile,
                     terms.factors + (r * shape.tiles + tile) * kRows * kMaxTileColumns);
    }
#pragma unroll 1
    for (int k = worker.team; k * kMaxTileColumns < terms.columns; k += teams) {
      update.AddBlock(worker.lanes, terms.block.begin + k * Worker::kBlockTile,
                      terms.mix + (k * shape.tiles + tile) * kMaxTileColumns * kMaxTileColumns);
    }
    update.Store(worker.lanes, out + tile * Worker::kBlockTile);
  }
}

template <typename S, typename F>
__device__ __forceinline__ void AddShares(const SweepShape& shape, const TensorWorker<S>& worker,
                                          Compute<S>* block, const Compute<S>* exchange,
                                          const F& finish) {
  using C = Compute<S>;
  constexpr int N = 16 / sizeof(C);
  const int teams = 1 << worker.log_teams, share = shape.tiles * kMaxTileColumns << shape.log_panel;
  const int i = (worker.strip << Panel<C>::kLogStrip) + Lane() % 8 * N;
  int at = worker.lanes.vector;
  // Each of a strip's 8 lanes has 16 bytes of every fourth column, and each team some of these.
#pragma unroll 2
  for (int turn = 0; turn < 2 * shape.tiles; ++turn, at += 4 * Panel<C>::kStrip) {
    const int c = 4 * turn + Lane() / 8;
    if ((turn & (teams - 1)) != worker.team || c >= shape.columns) continue;
    C x[N] = {};
#pragma unroll 1
    for (int k = 0; k < teams; ++k) {
      C more[N];
      LoadAligned<N>(exchange + k * share + at, more);
#pragma unroll
      for (int e = 0; e < N; ++e) x[e] += more[e];
    }
    finish(c, i, block + at, x);
  }
}

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CUDA_TENSOR_UPDATE_CUH_
