// What a warp multiplies on tensor cores in a sweep of block_ortho: tiles of a panel's rows and 8
// columns of the block, over one strip (panel.cuh).
//
// Tensor<S> has, for rows stored as S:
//   Lanes              where this lane's elements are in a panel of rows and one of the block
//   Columns            its elements of 8 columns of the block, ready to be B
//   AddProducts        sums (kTileRows x 8) += rows times columns
//   AddGram            sums (8 x 8) += columns times columns, as of rows 0 to 7
//   Update             8 columns: += kTileRows rows, or 8 columns, times their factors
// A place in a panel is an offset; 8 or 16 rows further it is that many strips' rows further. The
// order in which a strip's elements go through K is the same for rows and columns, and free
// otherwise.
#ifndef CURVAX_CUDA_TENSOR_TILES_CUH_
#define CURVAX_CUDA_TENSOR_TILES_CUH_

#include "cuda/mma.cuh"
#include "cuda/panel.cuh"

namespace curvax::CURVAX_TARGET {

// A of 16 rows and 16 elements in K, from registers as `ldmatrix` leaves them, by instructions of
// which each takes a part of K.
template <typename S>
struct Operands;
template <>
struct Operands<BFloat16> {
  using Mma = Bf16;
  static __device__ __forceinline__ void A(const uint32_t (&loaded)[4], int, uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = loaded[i];
  }
};
// Half has the 11 bits of tf32, but not the range of bf16. The elements 2t and 2t + 1 of a register
// are the elements t and t + 4 of K.
template <>
struct Operands<Half> {
  using Mma = Tf32;
  static __device__ __forceinline__ void A(const uint32_t (&loaded)[4], int part,
                                           uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = loaded[2 * part + i % 2];
      const Half element = {static_cast<uint16_t>(i / 2 == 0 ? pair : pair >> 16)};
      a[i] = BitCast<uint32_t>(Widen(element));
    }
  }
};

// Where the factor of column k of the block for its new column c is: a lane has those of columns t
// and t + 4 of 8.
__device__ __forceinline__ int BlockFactorAt(int k, int c, int tiles) {
  return ((k / 8 * tiles + c / 8) * kWarpSize + c % 8 * 4 + k % 4) * 2 + k % 8 / 4;
}

template <typename S>
class Tensor {
 public:
  using Mma = typename Operands<S>::Mma;
  static constexpr int kSums = 4;
  static constexpr int kSteps = 2;  // of 16 elements of a strip
  static constexpr int kSplits = 4 / Mma::kElements;

  struct Lanes {
    // Of the row whose address this lane gives, for products and transposed; 16 elements further
    // with the bit of 16 changed.
    int row, update;
    int column;   // (g, 2t) of the block, and with the bits of 8 and 16 changed
    int mixed;    // (t, g) of the block, the same, and 4 rows further
    int updated;  // (2t, g), and a row further, with the bits of 4 and 8 changed
    int vector;   // 16 bytes of a column that this lane finishes, and of 4 columns further
    __device__ Lanes(const Panel<S, true>& rows, const Panel<float, true>& block, int i)
        : row(rows.Offset(Lane() % 16, i + Lane() / 16 * 8)),
          update(rows.Offset(Lane() % 8 + Lane() / 16 * 8, i + Lane() % 16 / 8 * 8)),
          column(block.Offset(LaneGroup(), i + 2 * LaneInGroup())),
          mixed(block.Offset(LaneInGroup(), i + LaneGroup())),
          updated(block.Offset(2 * LaneInGroup(), i + LaneGroup())),
          vector(block.Offset(Lane() / 8, i + Lane() % 8 * 4)) {}
  };

  struct Columns {
    Parts parts[kSteps][kSplits];
    // `block`: from the first of the columns on.
    __device__ __forceinline__ Columns(const Lanes& lanes, const float* block) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        float x[4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float pair[2];
          LoadWidened<float, 2>(block + (lanes.column ^ (16 * s + 8 * h)), pair);
          x[2 * h] = pair[0];
          x[2 * h + 1] = pair[1];
        }
        Split(x, parts[s]);
      }
    }
  };

  // `rows`: from the first of the tile on.
  static __device__ __forceinline__ void AddProducts(const Lanes& lanes, const S* rows,
                                                     const Columns& columns, float (&sum)[4]) {
    float d[kSteps][4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      uint32_t loaded[4];
      LoadMatrices<false>(rows + (lanes.row ^ 16 * s), loaded);
      uint32_t a[kSplits][4];
#pragma unroll
      for (int k = 0; k < kSplits; ++k) Operands<S>::A(loaded, k, a[k]);
      MultiplySplit<Mma>(d[s], a, columns.parts[s]);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) sum[k] += d[0][k] + d[1][k];
  }
  static __device__ __forceinline__ void AddGram(const Columns& rows, const Columns& columns,
                                                 float (&sum)[2]) {
    float d[kSteps][4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) MultiplyStacked<Mma>(d[s], rows.parts[s], columns.parts[s]);
#pragma unroll
    for (int k = 0; k < 2; ++k) sum[k] += (d[0][k] + d[0][k + 2]) + (d[1][k] + d[1][k + 2]);
  }

  // The transpose: rows of the product are elements of the strip, so that `ldmatrix` transposes
  // rows.
  class Update {
   public:
    // `factors`: of 16 rows and 8 columns, in the order of FactorAt.
    __device__ __forceinline__ void AddRows(const Lanes& lanes, const S* rows,
                                            const float* factors) {
      float x[4];
      LoadAligned<4>(factors + 4 * Lane(), x);
      Parts parts[kSplits];
      Split(x, parts);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        uint32_t loaded[4];
        LoadMatrices<true>(rows + (lanes.update ^ 16 * s), loaded);
        float d[4] = {};
        uint32_t a[kSplits][4];
#pragma unroll
        for (int k = 0; k < kSplits; ++k) Operands<S>::A(loaded, k, a[k]);
        MultiplySplit<Mma>(d, a, parts);
#pragma unroll
        for (int k = 0; k < 4; ++k) rows_[s][k] += d[k];
      }
    }
    // All products of parts but those below 2^-23.
    __device__ __forceinline__ void AddBlock(const Lanes& lanes, const float* block,
                                             const float* factors) {
      float x[2];
      LoadWidened<float, 2>(factors + 2 * Lane(), x);
      const Parts parts = Tf32::Split(x);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        uint32_t high[4], middle[4], low[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int at = (lanes.mixed ^ (16 * s + k % 2 * 8)) + k / 2 * 4 * kStrip;
          Tf32::SplitOne(block[at], &high[k], &middle[k], &low[k]);
        }
        Tf32::Multiply(block_[s], low, parts.high);
        Tf32::Multiply(block_[s], high, parts.low);
        Tf32::Multiply(block_[s], middle, parts.middle);
        Tf32::Multiply(block_[s], middle, parts.high);
        Tf32::Multiply(block_[s], high, parts.middle);
        Tf32::Multiply(block_[s], high, parts.high);
      }
    }
    __device__ __forceinline__ void Store(const Lanes& lanes, float* out) const {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int at = (lanes.updated ^ 16 * s ^ k / 2 * 8 ^ k % 2 * 12) + k % 2 * kStrip;
          out[at] = block_[s][k] + rows_[s][k];
        }
      }
    }

   private:
    static constexpr int kStrip = Panel<float>::kStrip;
    float rows_[kSteps][4] = {}, block_[kSteps][4] = {};  // (16 elements, 8 columns)
  };

  // Where the factor of row r and column c is: a lane has those of rows 2t, 2t + 1, 2t + 8, 2t + 9
  // of a tile.
  static __device__ int FactorAt(int r, int c, int tiles) {
    const int t = r % 8 / 2, k = r % 2 + r % 16 / 8 * 2;
    return ((r / 16 * tiles + c / 8) * kWarpSize + c % 8 * 4 + t) * 4 + k;
  }

 private:
  static __device__ __forceinline__ void Split(const float (&x)[4], Parts (&parts)[kSplits]) {
#pragma unroll
    for (int k = 0; k < kSplits; ++k) parts[k] = Mma::Split(&x[k * Mma::kElements]);
  }
};

template <>
class Tensor<double> {
 public:
  static constexpr int kSums = 2;

  struct Lanes {
    int row;     // (g, 4t), and with the bit of 2 changed
    int column;  // the same of the block
    int update;  // (t, 2g)
    int mixed;   // the same of the block
    int vector;  // 16 bytes of a column that this lane finishes, and of 4 columns further
    __device__ Lanes(const Panel<double, true>& rows, const Panel<double, true>& block, int i)
        : row(rows.Offset(LaneGroup(), i + 4 * LaneInGroup())),
          column(block.Offset(LaneGroup(), i + 4 * LaneInGroup())),
          update(rows.Offset(LaneInGroup(), i + 2 * LaneGroup())),
          mixed(block.Offset(LaneInGroup(), i + 2 * LaneGroup())),
          vector(block.Offset(Lane() / 8, i + Lane() % 8 * 2)) {}
  };

  struct Columns {
    double x[4];
    __device__ __forceinline__ Columns(const Lanes& lanes, const double* block) {
      LoadQuarter(block, lanes.column, x);
    }
  };

  static __device__ __forceinline__ void AddProducts(const Lanes& lanes, const double* rows,
                                                     const Columns& columns, double (&sum)[2]) {
    double q[4];
    LoadQuarter(rows, lanes.row, q);
#pragma unroll
    for (int k = 0; k < 4; ++k) MultiplyF64(sum, q[k], columns.x[k]);
  }
  static __device__ __forceinline__ void AddGram(const Columns& rows, const Columns& columns,
                                                 double (&sum)[2]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) MultiplyF64(sum, rows.x[k], columns.x[k]);
  }

  class Update {
   public:
    __device__ __forceinline__ void AddRows(const Lanes& lanes, const double* rows,
                                            const double* factors) {
      Add(rows + lanes.update, factors);
    }
    __device__ __forceinline__ void AddBlock(const Lanes& lanes, const double* block,
                                             const double* factors) {
      Add(block + lanes.mixed, factors);
    }
    // Element 2g + j of a strip is column g of sum_[j].
    __device__ __forceinline__ void Store(const Lanes& lanes, double* out) const {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        StoreWide<2>({sum_[0][k], sum_[1][k]}, out + (lanes.column ^ 2 * k));
      }
    }

   private:
    __device__ __forceinline__ void Add(const double* rows, const double* factors) {
      double a[2];
      LoadAligned<2>(factors + 2 * Lane(), a);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        double q[2];
        LoadAligned<2>(rows + 4 * h * Panel<double>::kStrip, q);
#pragma unroll
        for (int j = 0; j < 2; ++j) MultiplyF64(sum_[j], a[h], q[j]);
      }
    }

    double sum_[2][2] = {};
  };
  static __device__ int FactorAt(int r, int c, int tiles) { return BlockFactorAt(r, c, tiles); }

 private:
  static __device__ __forceinline__ void LoadQuarter(const double* from, int at, double (&x)[4]) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      double pair[2];
      LoadAligned<2>(from + (at ^ 2 * k), pair);
      x[2 * k] = pair[0];
      x[2 * k + 1] = pair[1];
    }
  }
};

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CUDA_TENSOR_TILES_CUH_
