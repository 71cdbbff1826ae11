// What a sweep of block_ortho measures, over one panel after another: inner products of rows with
// the columns of a block, and the largest elements of these.
//
// A thread has the sums of kRows rows and a tile of B columns in registers, over the elements of
// its lane; 8 to 32 lanes share them. They stay there from panel to panel, in the compute type, and
// are added to sums in double every kFlushPanels panels. An element of a row that is loaded from
// shared memory serves B products, one of the block kRows.
#ifndef CURVAX_CUDA_ROW_SUMS_CUH_
#define CURVAX_CUDA_ROW_SUMS_CUH_

#include "cuda/device.cuh"
#include "cuda/panel.cuh"
#include "cuda/shapes.h"

namespace curvax::CURVAX_TARGET {

// Adds up B values per lane over 2^log_lanes neighbouring lanes, at least B. Afterwards v[0] of a
// lane is the sum of the values with index OwnedValue. Halving: each step sends the half of the
// values that the partner will own.
template <int B, typename T>
__device__ __forceinline__ void SumOverLanes(int log_lanes, T (&v)[B]) {
  int mask = 1 << log_lanes >> 1;
#pragma unroll
  for (int held = B / 2; held > 0; held /= 2) {
    const bool upper = (Lane() & mask) != 0;
#pragma unroll
    for (int i = 0; i < held; ++i) {
      const T mine = upper ? v[i + held] : v[i], theirs = upper ? v[i] : v[i + held];
      v[i] = mine + ShuffleXor(theirs, mask);
    }
    mask >>= 1;
  }
  for (; mask > 0; mask >>= 1) v[0] += ShuffleXor(v[0], mask);
}

template <typename S, int kRows, int B>
class RowSums {
 public:
  using C = Compute<S>;

  // Adds the products of one panel of `rows` with one of the block, of the rows of a round. The
  // panel holds whole sets of kTogether rows for each thread; what is beyond `rows` is in sums that
  // nobody asks for.
  __device__ __forceinline__ void Add(const SumsShape& shape, int log_panel, const Panel<S>& panel,
                                      int rows, const Panel<C>& block, int round) {
    constexpr int kLogLanes = 3;  // of a strip
    const int begin = round * kRows << shape.log_apart;
    const int i = (SharedLane(shape) & 7) * N, step = 1 << (shape.log_lanes - kLogLanes);
    int strip = SharedLane(shape) >> kLogLanes;
    const S* first = panel.At(begin + FirstRow(shape), i) + strip * panel.apart;
    const C* w = block.At(Tile(shape) * B, i) + strip * block.apart;
    // Loops that are known to be entered need no copies of the sums.
#pragma unroll 1
    do {
      const S* row = first;
      C x[B][N];
#pragma unroll
      for (int c = 0; c < B; ++c) LoadAligned<N>(w + c * Panel<C>::kStrip, x[c]);
#pragma unroll
      for (int j = 0; j < kRows; j += kTogether) {
        if (begin + (j << shape.log_apart) >= rows) break;
        C q[kTogether][N];
#pragma unroll
        for (int t = 0; t < kTogether; ++t) {
          LoadWidened<S, N>(row, q[t]);
          row += Panel<S>::kStrip << shape.log_apart;
        }
#pragma unroll
        for (int t = 0; t < kTogether; ++t) {
#pragma unroll
          for (int c = 0; c < B; ++c) {
#pragma unroll
            for (int k = 0; k < N; ++k) sum_[j + t][c] += q[t][k] * x[c][k];
          }
        }
      }
      first += step * panel.apart;
      w += step * block.apart;
      strip += step;
    } while (strip < 1 << (log_panel - Panel<C>::kLogStrip));
  }

  // Adds the sums to `total` (rows, columns), and begins anew.
  __device__ __forceinline__ void Flush(const SumsShape& shape, double* total, int rows,
                                        int columns, int round) {
    const int log_owned = shape.log_lanes - kLog<B>;  // lanes that have the same value
    const int lane = SharedLane(shape), column = Tile(shape) * B + (lane >> log_owned);
    const bool owner = (lane & ((1 << log_owned) - 1)) == 0 && column < columns;
    const int first = (round * kRows << shape.log_apart) + FirstRow(shape);
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int row = first + (j << shape.log_apart);
      SumOverLanes(shape.log_lanes, sum_[j]);
      if (owner && row < rows) total[row * columns + column] += static_cast<double>(sum_[j][0]);
#pragma unroll
      for (int c = 0; c < B; ++c) sum_[j][c] = 0;
    }
  }

 private:
  template <int n>
  static constexpr int kLog = n == 8   ? 3
                              : n == 4 ? 2
                              : n == 2 ? 1
                                       : 0;
  static constexpr int N = 1 << kLogWide<C>;
  // Rows whose elements are in registers together.
  static constexpr int kTogether = 2;

  // Which of the lanes that share rows this is, its first row, and its tile; where that is none,
  // the columns are none of the block's.
  __device__ static int SharedLane(const SumsShape& shape) {
    return Lane() & ((1 << shape.log_lanes) - 1);
  }
  __device__ static int FirstRow(const SumsShape& shape) {
    return ThreadIndex() >> shape.log_lanes & ((1 << shape.log_apart) - 1);
  }
  __device__ static int Tile(const SumsShape& shape) {
    return ThreadIndex() >> (shape.log_lanes + shape.log_apart);
  }

  C sum_[kRows][B] = {};
};

// Without tensor cores no thread has a place of its own; factors are in rows of `padded`.
struct ThreadWorker {
  __device__ explicit ThreadWorker(const SweepShape&) {}
  __device__ static int FactorAt(int r, int c, int padded) { return r * padded + c; }
  __device__ static int MixAt(int k, int c, int padded) { return k * padded + c; }
};

// The largest elements of the columns of a block. The warps take columns in turn, and each lane has
// one of its warp's. A NaN counts as infinity.
template <typename C>
class BlockMaxima {
 public:
  template <bool kSwizzled>
  __device__ __forceinline__ void Raise(const Panel<C, kSwizzled>& w, int columns, int log_panel) {
    for (int c = Warp(); c < columns; c += kSweepWarps) {
      C largest = 0;
      for (int i = Lane(); i < 1 << log_panel; i += kWarpSize) {
        const C x = *w.At(c, i), size = x < 0 ? -x : x;
        largest = Max(largest, size == size ? size : C(INFINITY));
      }
      largest = WarpMax(largest);
      if (Lane() == c / kSweepWarps) largest_ = Max(largest_, largest);
    }
  }
  __device__ __forceinline__ void Store(double* out, int columns) const {
    const int c = Warp() + Lane() * kSweepWarps;
    if (c < columns) out[c] = static_cast<double>(largest_);
  }

 private:
  C largest_ = 0;
};

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CUDA_ROW_SUMS_CUH_
