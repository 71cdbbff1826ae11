// The inner loops of block_ortho: R basis rows against B block columns over one panel.
//
// A panel is `width` consecutive elements of every vector, a multiple of one cache line of rows.
// Rows of 16 bits are widened in registers: copying them in float took 1.4 times as long.
// With B = 4 there are as many accumulators (dots) or coefficients (updates) as leave registers for
// operands; a narrower block takes more rows at a time. What stands `ahead` elements from the rows,
// the next tile's rows, is prefetched meanwhile: so many short streams are beyond the hardware's
// prefetcher. Into L1: fetched into L2 only, or less far ahead, they made a sweep 15-30 % slower.
#ifndef CURVAX_CPU_BLOCK_ORTHO_TILES_H_
#define CURVAX_CPU_BLOCK_ORTHO_TILES_H_

#include "cpu/convert.h"

namespace curvax::CURVAX_TARGET {

constexpr int kMaxTileColumns = 4;
constexpr int kMaxTileRows = 8;

// Rows in a tile of B columns.
constexpr int DotRows(int columns) {
  return columns == 1 ? 8 : columns == 2 ? 5 : columns == 3 ? 4 : 3;
}
constexpr int UpdateRows(int columns) {
  return columns == 1 ? 8 : columns == 2 ? 5 : columns == 3 ? 4 : 3;
}

// Elements in a cache line.
template <typename T>
constexpr int kLine = 64 / static_cast<int>(sizeof(T));

// out[r * out_stride + c] += <rows[r], w_c>, with w_c at w + c * w_stride.
template <int R, int B, typename S, typename C>
void DotTile(const S* const* rows, int64_t ahead, const C* w, int64_t w_stride, int64_t width,
             double* out, int64_t out_stride) {
  const S* row[R];  // a copy, which no store can be thought to change
  for (int r = 0; r < R; ++r) row[r] = rows[r];
  Vec<C> sum[R][B] = {};
  for (int64_t i = 0; i < width; i += kLine<S>) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) __builtin_prefetch(row[r] + ahead + i);
#pragma GCC unroll 4
    for (int v = 0; v < kLine<S>; v += kLanes<C>) {
      Vec<C> q[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) q[r] = LoadAs(row[r] + i + v);
#pragma GCC unroll 4
      for (int c = 0; c < B; ++c) {
        const Vec<C> x = LoadVec(w + c * w_stride + i + v);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sum[r][c] += q[r] * x;
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < B; ++c) out[r * out_stride + c] += SumLanes(sum[r][c]);
  }
}

// w_c += sum_r a[r * a_stride + c] rows[r].
template <int R, int B, typename S, typename C>
void UpdateTile(const S* const* rows, int64_t ahead, const C* a, int64_t a_stride, int64_t width,
                C* w, int64_t w_stride) {
  const S* row[R];
  for (int r = 0; r < R; ++r) row[r] = rows[r];
  Vec<C> k[R][B];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < B; ++c) k[r][c] = Splat(a[r * a_stride + c]);
  }
  for (int64_t i = 0; i < width; i += kLine<S>) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) __builtin_prefetch(row[r] + ahead + i);
#pragma GCC unroll 4
    for (int v = 0; v < kLine<S>; v += kLanes<C>) {
      Vec<C> q[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) q[r] = LoadAs(row[r] + i + v);
#pragma GCC unroll 4
      for (int c = 0; c < B; ++c) {
        C* p = w + c * w_stride + i + v;
        Vec<C> x = LoadVec(p);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) x += k[r][c] * q[r];
        StoreVec(p, x);
      }
    }
  }
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls f(Constant<value>{}), for 1 <= value <= kMax.
template <int kMax, typename F>
CURVAX_INLINE void WithConstant(int64_t value, const F& f) {
  if constexpr (kMax > 1) {
    if (value < kMax) return WithConstant<kMax - 1>(value, f);
  }
  f(Constant<kMax>{});
}

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CPU_BLOCK_ORTHO_TILES_H_
