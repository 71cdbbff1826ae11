// How many threads, blocks and bytes of shared memory the device code takes: plain functions of
// sizes, so that the same sums are formed in the same order on every device.
//
// What they are given to is a launcher (stream_launcher.h, loader.h and, in tests, that of the
// emulated GPU), which has
//   int64_t SharedLimit()                      the most shared memory that a block can have
//   int64_t MostSweepBlocks()                  kMostSweepBlocks; fewer only in tests
//   int64_t Residents(kernel, threads, bytes)  blocks that the device holds at once
//   bool Launch(kernel, LaunchShape, args)     false if it failed; the launcher knows why
#ifndef CURVAX_CUDA_SHAPES_H_
#define CURVAX_CUDA_SHAPES_H_

#include "common/storage.h"

namespace curvax::CURVAX_TARGET {

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

// Few, so that each has work enough to spread what a panel costs besides, and up to 255 registers:
// asynchronous copies need no warps to be in flight.
constexpr int kLogSweepThreads = 7, kSweepThreads = 1 << kLogSweepThreads;
constexpr int kLogSweepWarps = kLogSweepThreads - 5, kSweepWarps = 1 << kLogSweepWarps;
// Columns of the block whose sums are in registers together.
constexpr int kMaxTileColumns = 8;
CURVAX_HOST_DEVICE constexpr int TileColumns(int64_t block) {
  return block > 4 ? 8 : block > 2 ? 4 : static_cast<int>(block);
}
// Columns with padding to whole tiles.
CURVAX_HOST_DEVICE constexpr int64_t PaddedColumns(int64_t block) {
  return RoundUp(block, TileColumns(block));
}
// The elements of every vector that a block of threads works on at once are a panel. Their number
// is a power of two; the fewest are 128 bytes of the compute type, so that 8 lanes share them.
constexpr int kLogLongestPanel = kLogSweepThreads;
template <typename C>
constexpr int kLogShortestPanel = sizeof(C) == 8 ? 4 : 5;
template <typename C>
constexpr int kLogWide = sizeof(C) == 8 ? 1 : 2;
// Columns of the block that a thread updates together.
template <int B>
constexpr int kUpdateColumns = B;
// Rows whose sums, of a tile of columns, a thread has in registers.
template <typename C, int B>
constexpr int kSumRows = B * sizeof(C) >= 64   ? 6
                         : B * sizeof(C) >= 32 ? 12
                                               : 16;
constexpr int kGramRows = 2;  // of the block with itself

// Sweeps whose products of rows with blocks of more than four vectors are made on tensor cores, for
// which 16-bit rows are exact operands. Products of float would have to be split on both sides.
template <typename S, int B>
constexpr bool kOnTensorCores = B == kMaxTileColumns && sizeof(S) != 4;
// Rows of a tile, and pairs of a tile with 8 columns whose sums a warp has in registers: at least
// those of 8 vectors and all rows of two stages. Operands made of Half take more registers.
template <typename S>
constexpr int kTileRows = sizeof(S) == 8 ? 8 : 16;
template <typename S>
constexpr int kProductPairs = 12;
template <>
constexpr int kProductPairs<double> = 16;
template <>
constexpr int kProductPairs<Half> = 10;
constexpr int kGramPairs = 4;
// To add up four pairs over the warps, 16 bytes of each lane.
constexpr int64_t kTileExchangeBytes = kSweepWarps * 4 * 32 * 16;

// How threads share the sums of rows with the tiles of a block: 2^log_lanes lanes the elements, and
// 2^log_apart threads the rows, whose own are that far apart. `rounds`: how often they must take
// other rows, for all to have been taken.
struct SumsShape {
  int log_lanes, log_apart, rounds;
};
constexpr SumsShape ShapeSums(int64_t rows, int rows_of_thread, int tiles, int log_wides) {
  int log_lanes = Min(5, log_wides);
  const int64_t slots = CeilDiv(rows, rows_of_thread) * tiles;
  while (log_lanes > 3 && (kSweepThreads >> log_lanes) < slots) --log_lanes;
  int log_apart = 0;
  while (tiles << (log_apart + 1) <= kSweepThreads >> log_lanes) ++log_apart;
  return {log_lanes, log_apart,
          static_cast<int>(Max<int64_t>(1, CeilDiv(rows, int64_t{rows_of_thread} << log_apart)))};
}
// On tensor cores: the threads of as many warps as a panel has strips share the elements,
// 2^log_apart teams of them the rows, in tiles. A round has `pairs` of a tile and 8 columns.
constexpr SumsShape ShapeTensorSums(int64_t rows, int tile_rows, int tiles, int pairs,
                                    int log_strips) {
  const int log_teams = kLogSweepWarps - log_strips;
  const int64_t of_team = CeilDiv(CeilDiv(rows, tile_rows), int64_t{1} << log_teams);
  return {5 + log_strips, log_teams,
          static_cast<int>(Max<int64_t>(1, CeilDiv(of_team * tiles, pairs)))};
}

// A sweep of a block of `columns` vectors, `tiles` tiles of them, over panels of which `stages` are
// in shared memory, with all rows or groups of them, strips of `strip` elements. There, from these
// bytes on: panels of the rows; of the block; factors of these rows and of the block, on tensor
// cores with zeros for whole tiles; what the 2^log_sharers threads, or teams of warps, exchange
// that update the same elements, one of 2^log_units units. Between strips of 16 bits, so that 16
// lanes at two of them touch all banks.
constexpr int64_t kStripPadding = 32;
struct SweepShape {
  int log_panel, stages, group, strip, groups, columns, tiles;
  int factor_rows, mix_rows;
  int log_units, log_sharers;
  int w_begin, factors_begin, exchange_begin;
  int64_t bytes;
  SumsShape products, gram;
};
template <typename S, int B>
constexpr SweepShape ShapeSweep(int64_t rows, int64_t group, int64_t block, int log_panel,
                                int stages) {
  using C = Compute<S>;
  constexpr bool kTensor = kOnTensorCores<S, B>;
  constexpr int64_t kSize = sizeof(C);
  const int columns = static_cast<int>(PaddedColumns(block)), tiles = columns / B;
  const int log_wides = log_panel - kLogWide<C>, log_strips = log_panel - kLogShortestPanel<C>;
  int log_units = log_wides;
  while (1 << (log_units - log_wides) < columns / kUpdateColumns<B>) ++log_units;
  const int log_sharers =
      kTensor ? kLogSweepWarps - log_strips : Max(0, kLogSweepThreads - log_units);
  SumsShape products = ShapeSums(group, kSumRows<C, B>, tiles, log_wides);
  SumsShape gram = ShapeSums(block, kGramRows, tiles, log_wides);
  const int64_t held = RoundUp(group, kTensor ? kTileRows<S> : int64_t{2} << products.log_apart);
  const int64_t strip = (held << kLogShortestPanel<C>)+(sizeof(S) == 2 ? kStripPadding : 0);
  const int64_t w = stages * (strip << log_strips) * int64_t{sizeof(S)};
  const int64_t factors = w + stages * (columns << log_panel) * kSize;
  const int64_t factor_rows = kTensor ? held : group, mix_rows = kTensor ? columns : block;
  const int64_t exchange = RoundUp(factors + (factor_rows + mix_rows) * columns * kSize, 16);
  const int64_t exchanged = (columns << (log_sharers + log_panel)) * kSize;
  const int64_t bytes = exchange + (kTensor ? Max(exchanged, kTileExchangeBytes) : exchanged);
  if (kTensor) {
    products = ShapeTensorSums(group, kTileRows<S>, tiles, kProductPairs<S>, log_strips);
    gram = ShapeTensorSums(block, kMaxTileColumns, tiles, kGramPairs, log_strips);
  }
  return {log_panel,
          stages,
          static_cast<int>(group),
          static_cast<int>(strip),
          static_cast<int>(Max<int64_t>(1, CeilDiv(rows, Max<int64_t>(group, 1)))),
          static_cast<int>(block),
          tiles,
          static_cast<int>(factor_rows),
          static_cast<int>(mix_rows),
          log_units,
          log_sharers,
          static_cast<int>(w),
          static_cast<int>(factors),
          static_cast<int>(exchange),
          bytes,
          products,
          gram};
}
// The longest panel of which two stages fit in `limit` bytes, so that one is loaded while the other
// is used; or one stage of the shortest; or, where not even that holds all rows, two stages of a
// group of them.
constexpr int64_t kFewestRows = 16;
template <typename S, int B>
constexpr SweepShape ShapeSweep(int64_t rows, int64_t block, int64_t limit) {
  constexpr int kShortest = kLogShortestPanel<Compute<S>>;
  // On tensor cores no more than a strip for each warp.
  const int longest = kOnTensorCores<S, B> ? kShortest + kLogSweepWarps : kLogLongestPanel;
  for (int log_panel = longest; log_panel >= kShortest; --log_panel) {
    const SweepShape shape = ShapeSweep<S, B>(rows, rows, block, log_panel, 2);
    if (shape.bytes <= limit) return shape;
  }
  const SweepShape one = ShapeSweep<S, B>(rows, rows, block, kShortest, 1);
  if (one.bytes <= limit) return one;
  const auto of_group = [&](int64_t group) {
    return ShapeSweep<S, B>(rows, group, block, kShortest, 2);
  };
  int64_t group = kFewestRows;
  while (of_group(group + kFewestRows).bytes <= limit) group += kFewestRows;
  return of_group(group);
}
static_assert(ShapeSweep<float, 8>(1 << 20, 32, kSharedBytes).bytes <= kSharedBytes &&
                  ShapeSweep<double, 8>(1 << 20, 32, kSharedBytes).bytes <= kSharedBytes &&
                  ShapeSweep<Half, 8>(1 << 20, 32, kSharedBytes).bytes <= kSharedBytes,
              "the widest block must fit every device");

// Blocks that split n, each with sums of its own; fewer where those take much memory.
constexpr int64_t kMostSweepBlocks = 2048;
constexpr int64_t SweepBlocks(int64_t n, int64_t sums, int64_t most) {
  constexpr int64_t kMostBytes = 32 << 20, kFewestBlocks = 256;
  const int64_t afford = Max(kFewestBlocks, kMostBytes / (sums * int64_t{sizeof(double)}));
  return Min(CeilDiv(n, 1 << kLogLongestPanel), Min(most, afford));
}
// After the usual passes there is nothing to do, as a rule, and launches of few blocks cost less.
constexpr int kUsualPasses = 2;
constexpr int64_t kFewSweepBlocks = 512;
// Panels after which the sums in registers are added to those in double.
constexpr int kFlushPanels = 16;
// Blocks of a sweep that a processor should hold.
template <typename S, int B>
constexpr int kSweepResidents = kOnTensorCores<S, B> ? 3 : 2;

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

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CUDA_SHAPES_H_
