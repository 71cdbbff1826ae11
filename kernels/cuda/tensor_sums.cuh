// What a sweep of block_ortho measures, on tensor cores: inner products of rows with the columns of
// a block, and of these with each other.
//
// A warp has one strip of the panel. Where a panel has fewer strips than there are warps, those of
// the same strip, in different teams, take the tiles of rows in turn. A pair of a tile and of 8
// columns is a product of small matrices. Its sums over a strip are formed on a tensor core, those
// over panels in registers in the compute type; every kFlushPanels panels they are added up over
// the warps, in order, and to sums in double.
#ifndef CURVAX_CUDA_TENSOR_SUMS_CUH_
#define CURVAX_CUDA_TENSOR_SUMS_CUH_

#include "cuda/shapes.h"
#include "cuda/tensor_tiles.cuh"

namespace curvax::CURVAX_TARGET {

template <int kRows>
__device__ __forceinline__ int TilesOf(int count) {
  static_assert(kRows == 8 || kRows == 16, "the rows of a tile");
  return Turns(0, count, kRows == 8 ? 3 : 4);  // none or fewer, if there are no rows
}

// Which strip of a panel is a warp's, and its team.
struct TensorWarp {
  __device__ explicit TensorWarp(int log_teams)
      : log_teams(log_teams),
        strip(Warp() & ((kSweepWarps >> log_teams) - 1)),
        team(Warp() >> (kLogSweepWarps - log_teams)) {}
  // How many of the tiles of `count` rows or columns are the team's.
  template <int kRows>
  __device__ __forceinline__ int Tiles(int count) const {
    return Turns(team, TilesOf<kRows>(count), log_teams);
  }
  int log_teams, strip, team;
};

// The sums of kPairs pairs, of tiles of kRows rows; those of the team with the first 8 columns come
// first.
template <typename C, int kRows, int kSums, int kPairs>
class PairSums {
 public:
  // Calls add(tile of the team, sums) for all tiles with the column-th 8 columns, of which pairs
  // are in this round.
  template <typename AddTile>
  __device__ __forceinline__ void Add(int tiles, int column, int round, const AddTile& add) {
    const int first = column * tiles - round * kPairs;
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      if (p >= first + tiles) break;
      if (p >= first) add(p - first, sum_[p]);
    }
  }

  // Adds the sums to `total` (rows, columns), and begins anew. `exchange`: kTileExchangeBytes.
  __device__ __forceinline__ void Flush(const TensorWarp& warp, C* exchange, double* total,
                                        int rows, int columns, int round) {
    constexpr int kTogether = 4;  // pairs, of which each strip's warp adds up some
    const int tiles = warp.Tiles<kRows>(rows), strips = kSweepWarps >> warp.log_teams;
    const int tile_columns = TilesOf<kMaxTileColumns>(columns);
    // The pairs of a team with the most, and the end of this team's in this round.
    const int most = Turns(0, TilesOf<kRows>(rows), warp.log_teams) * tile_columns;
    const int end = Min(tiles * tile_columns, (round + 1) * kPairs);
#pragma unroll
    for (int p = 0; p < kPairs; p += kTogether) {
      const int first = round * kPairs + p;
      if (first >= most) break;
#pragma unroll
      for (int k = 0; k < kTogether && p + k < kPairs; ++k) {
        StoreWide(sum_[p + k], exchange + At(Warp(), k));
#pragma unroll
        for (int e = 0; e < kSums; ++e) sum_[p + k][e] = 0;
      }
      SyncThreads();
#pragma unroll 1
      for (int k = warp.strip; k < Min(kTogether, end - first); k += strips) {
        C sum[kSums] = {};
#pragma unroll 1
        for (int s = 0; s < strips; ++s) {
          C more[kSums];
          LoadWidened<C, kSums>(exchange + At(Warp() - warp.strip + s, k), more);
#pragma unroll
          for (int e = 0; e < kSums; ++e) sum[e] += more[e];
        }
        const int tile = warp.team + ((first + k) % tiles << warp.log_teams);
        const int row = tile * kRows + LaneGroup();
        const int column = (first + k) / tiles * kMaxTileColumns + 2 * LaneInGroup();
#pragma unroll
        for (int e = 0; e < kSums; ++e) {
          const int r = row + e / 2 * 8, c = column + e % 2;
          if (r < rows && c < columns) total[r * columns + c] += static_cast<double>(sum[e]);
        }
      }
      SyncThreads();
    }
  }

 private:
  __device__ static int At(int warp, int k) {
    return ((warp * 4 + k) * kWarpSize + Lane()) * kSums;
  }

  C sum_[kPairs][kSums] = {};
};

// A warp's part of every panel of a sweep.
template <typename S>
struct TensorWorker : TensorWarp {
  using C = Compute<S>;
  __device__ explicit TensorWorker(const SweepShape& shape)
      : TensorWarp(shape.log_sharers),
        lanes({nullptr, shape.strip}, {nullptr, shape.tiles * kBlockTile},
              strip << Panel<C>::kLogStrip) {}
  // Where the factor of a row or of a column of the block is for column c, of `padded`.
  __device__ static int FactorAt(int r, int c, int padded) {
    return Tensor<S>::FactorAt(r, c, padded / kMaxTileColumns);
  }
  __device__ static int MixAt(int k, int c, int padded) {
    return BlockFactorAt(k, c, padded / kMaxTileColumns);
  }
  // From 8 columns of a panel of the block to the next.
  static constexpr int kBlockTile = kMaxTileColumns * Panel<C>::kStrip;
  // From one tile of a panel of rows to the next.
  static constexpr int kRowTile = kTileRows<S> * Panel<C>::kStrip;

  typename Tensor<S>::Lanes lanes;
};

// All sums of a sweep.
template <typename S>
class TensorSums {
 public:
  using C = Compute<S>;

  __device__ TensorSums(const TensorWorker<S>& worker, const SweepShape& shape)
      : worker_(worker), shape_(shape) {}

  // Adds the products of one panel's `count` rows with the block, and of the block's first
  // `gram_rows` columns with all, of the pairs of a round.
  __device__ __forceinline__ void Add(const Panel<S, true>& rows, int count,
                                      const Panel<C, true>& block, int gram_rows, int round) {
    const int tiles = worker_.template Tiles<kTileRows<S>>(count);
    const int gram_tiles = worker_.template Tiles<kMaxTileColumns>(gram_rows);
#pragma unroll 1
    for (int column = 0; column < shape_.tiles; ++column) {
      const Columns loaded(worker_.lanes, block.begin + column * kBlockTile);
      const S* at = rows.begin + worker_.team * kRowTile;
      products_.Add(tiles, column, round, [&](int tile, C(&sum)[Tensor<S>::kSums]) {
        Tensor<S>::AddProducts(worker_.lanes, at + (tile << worker_.log_teams) * kRowTile, loaded,
                               sum);
      });
      gram_.Add(gram_tiles, column, round, [&](int tile, C(&sum)[2]) {
        const int other = worker_.team + (tile << worker_.log_teams);
        if (other == column) {
          Tensor<S>::AddGram(loaded, loaded, sum);
        } else {
          Tensor<S>::AddGram(Columns(worker_.lanes, block.begin + other * kBlockTile), loaded, sum);
        }
      });
    }
  }
  // Adds the sums to `total`, and begins anew.
  __device__ __forceinline__ void FlushProducts(double* total, int rows, int round) {
    products_.Flush(worker_, Exchange(), total, rows, shape_.columns, round);
  }
  __device__ __forceinline__ void FlushGram(double* total, int rows, int round) {
    gram_.Flush(worker_, Exchange(), total, rows, shape_.columns, round);
  }

 private:
  using Columns = typename Tensor<S>::Columns;
  static constexpr int kBlockTile = TensorWorker<S>::kBlockTile,
                       kRowTile = TensorWorker<S>::kRowTile;

  __device__ C* Exchange() const {
    return reinterpret_cast<C*>(SharedMemory() + shape_.exchange_begin);
  }

  const TensorWorker<S>& worker_;
  const SweepShape& shape_;
  PairSums<C, kTileRows<S>, Tensor<S>::kSums, kProductPairs<S>> products_;
  PairSums<C, kMaxTileColumns, 2, kGramPairs> gram_;
};

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CUDA_TENSOR_SUMS_CUH_
