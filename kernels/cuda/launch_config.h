// How many threads, blocks and bytes of shared memory the device code takes: plain functions of
// sizes, so that the same sums are formed in the same order on every device.
#ifndef CURVAX_CUDA_LAUNCH_CONFIG_H_
#define CURVAX_CUDA_LAUNCH_CONFIG_H_

#include "common/storage.h"

namespace curvax::CURVAX_LEVEL {

struct LaunchShape {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
};

// The most shared memory that every device of compute capability 8.0 and above gives to a block.
constexpr int64_t kSharedBytes = 99 << 10;

// softmax_ce.

// At the start of shared memory, for sums and maxima over a block.
constexpr int64_t kReduceBytes = 1024;
// As many as leave each the registers that it needs: 96, 128 for 16-bit vectors, 168 for doubles. A
// quarter of a processor has 16384 for its share of the warps, hence multiples of four warps.
template <typename S>
constexpr int kMaxRowThreads = sizeof(S) == 4   ? 640
                               : sizeof(S) == 2 ? 512
                                                : 384;
constexpr int kPartThreads = 256;
// Blocks that a processor holds at least, so that one reads while another computes.
template <typename C>
constexpr int kPartSumsResidents = sizeof(C) == 8 ? 1 : 3;
template <typename C>
constexpr int kPartProductsResidents = sizeof(C) == 8 ? 1 : 2;
template <typename C>
constexpr int64_t kPartElements = (32 << 10) / static_cast<int64_t>(sizeof(C));

// For rows of `count` elements, computed in C, whose first may lie anywhere in a vector.
template <typename S>
constexpr int64_t RowSharedBytes(int64_t count) {
  constexpr int64_t kVector = 16 / sizeof(S);
  return kReduceBytes + (CeilDiv(count, kVector) + 1) * kVector * int64_t{sizeof(Compute<S>)};
}
// No fewer bytes for any storage type.
constexpr int64_t MostRowSharedBytes(int64_t count, int64_t compute_bytes) {
  return kReduceBytes + (count + 16) * compute_bytes;
}
// About four vectors per thread and sweep: that many loads are in flight.
template <typename S>
constexpr int RowThreads(int64_t vocab) {
  const int64_t warps = CeilDiv(vocab, 4 * (16 / sizeof(S)) * 32);
  return static_cast<int>(Min<int64_t>(warps * 32, kMaxRowThreads<S>));
}
constexpr int64_t RowParts(int64_t vocab, int64_t compute_bytes) {
  return CeilDiv(vocab, (32 << 10) / compute_bytes);
}

// block_ortho.

constexpr int kSweepThreads = 256;
constexpr int kSweepWarps = kSweepThreads / 32;
// Elements of every vector that a block works on at once, one per thread: with 64 rows of float
// that is 64 KB, and the panels of all blocks in flight fit half of the L2 of an H100.
constexpr int64_t kPanel = kSweepThreads;
// Columns of the block whose sums are in registers together.
constexpr int kMaxTileColumns = 8;
CURVAX_HOST_DEVICE constexpr int TileColumns(int64_t block) {
  return block > 4 ? 8 : block > 2 ? 4 : static_cast<int>(block);
}
// Columns with padding to whole tiles.
CURVAX_HOST_DEVICE constexpr int64_t PaddedColumns(int64_t block) {
  return RoundUp(block, TileColumns(block));
}

// Blocks that split n, each with sums of its own; fewer where those take much memory.
constexpr int64_t kMostSweepBlocks = 2048;
constexpr int64_t SweepBlocks(int64_t n, int64_t sums, int64_t most) {
  constexpr int64_t kMostBytes = 32 << 20, kFewestBlocks = 256;
  const int64_t afford = Max(kFewestBlocks, kMostBytes / (sums * int64_t{sizeof(double)}));
  return Min(CeilDiv(n, kPanel), Min(most, afford));
}
// Panels that one of them takes.
CURVAX_HOST_DEVICE constexpr int64_t BlockPanels(int64_t n, int64_t blocks) {
  return CeilDiv(CeilDiv(n, kPanel), blocks);
}

// The block's panel, and the warps' updates of one strip of a tile of columns.
template <typename S>
constexpr int64_t SweepSharedBytes(int64_t block) {
  constexpr int64_t kStrip = 32 * (16 / sizeof(S));
  return (PaddedColumns(block) * kPanel + kSweepWarps * TileColumns(block) * kStrip) *
         int64_t{sizeof(Compute<S>)};
}
static_assert(SweepSharedBytes<float>(32) <= kSharedBytes &&
                  SweepSharedBytes<double>(32) <= kSharedBytes &&
                  SweepSharedBytes<Half>(32) <= kSharedBytes,
              "the widest block must fit every device");
// Blocks of a sweep that a processor holds: 128 registers per thread, or 255 where many columns of
// 16-bit vectors, or of doubles, need them.
template <typename S, int B>
constexpr int kSweepResidents = (sizeof(S) == 2 && B >= 2) || (sizeof(S) == 8 && B == 8) ? 1 : 2;

constexpr int kCombineThreads = 256;
constexpr int kCombineEntries = 32;  // sums per block
constexpr int kDecideThreads = 256;

// rotate_basis.

constexpr int kRotateThreads = 256;
// Blocks that a processor holds: 80 registers per thread, or 128 for doubles.
template <typename S>
constexpr int kRotateResidents = sizeof(S) == 8 ? 2 : 3;
// What a thread forms together: elements of new rows. A load of an element from shared memory, or
// of an entry of the rotation, then serves this many products; with one element the loads, not the
// arithmetic, would set the pace.
constexpr int kRotateRows = 4, kRotateElements = 4;
// Elements of every row that a block works on at once; 0 if so many rows cannot be held.
constexpr int64_t RotatePanel(int64_t rows, int64_t compute_bytes) {
  for (int64_t panel = kRotateThreads; panel >= 1; panel /= 2) {
    // Two blocks on a processor, where the panel would not become too narrow.
    const int64_t limit = panel > 32 ? kSharedBytes / 2 : kSharedBytes;
    if (rows * panel * compute_bytes <= limit) return panel;
  }
  return 0;
}

}  // namespace curvax::CURVAX_LEVEL

#endif  // CURVAX_CUDA_LAUNCH_CONFIG_H_
