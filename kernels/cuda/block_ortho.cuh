// Orthonormalises a block W (b, n) against a basis Q (m, n) on a GPU, into rows [m, m + b).
//
// Algorithm: the passes of common/block_ortho_pass.h. What a pass decides is only known on the
// device, and a captured graph launches the same kernels every time: the launches for the most
// passes are always made, and those after the last one return at once.
//   BlockOrthoBegin    checks `used`, clears the results
//   Measure            K1: C = Q^T W, G = W^T W, and the largest element of each column
//   UpdateSweep        K2: W <- W mix + Q a, then C and G of the new W
//                      K3: the new W to the basis, or W mix alone, where the deviation is small
//                      enough to be left (`lazy_below`)
//   CombineSums        adds up what the blocks of a sweep have summed
//   Decide             one block: the pass; what the next sweep does, in BlockOrthoDevice::next
// A sweep deals panels of all vectors to blocks of threads in turn, so that those at work read
// neighbouring bytes of the same rows. A block copies the next panel to shared memory by
// asynchronous copies while it uses the present one, first for the update, then for the products,
// whose sums stay in registers from panel to panel (panel.cuh, row_update.cuh, row_sums.cuh). With
// rows in 16 bits or double and b > 4 both are made on tensor cores (mma.cuh, tensor_*.cuh). These
// take doubles and 16-bit rows as they are, but floats, of the block and the coefficients, in three
// parts that add up to them without rounding. Each sweep reads Q once: with r rows of s-byte
// elements besides the block, 3 r s n bytes from device memory in the usual two passes (2 with
// `lazy_below`), and about 5 b n elements of the block. How many rows a panel can hold, of 128
// bytes each at least, is up to ShapeSweep (shapes.h): for b <= 8 at least 512 in float, 944 in 16
// bits, 472 in double. With more, panels hold groups of rows, and K2, whose products need the whole
// update, reads Q twice. Copies are of 16 bytes where the rows are aligned, else of one element.
// Accumulation: the compute type over kFlushPanels panels (on tensor cores, sums of floats are
// truncated over 16 rows of an update or the 32 elements of a strip, and rounded from there on),
// double across these and across blocks; everything of size m x b or b x b in double. Determinism:
// the division of the work depends on sizes alone and all sums are in a fixed order: bitwise
// repeatable. Rows that are not used are never read.
#ifndef CURVAX_CUDA_BLOCK_ORTHO_CUH_
#define CURVAX_CUDA_BLOCK_ORTHO_CUH_

#include "cuda/block_ortho_sweep.cuh"

namespace curvax::CURVAX_TARGET {

// The small matrices' work on one block of threads.
struct BlockTeam {
  template <typename F>
  __device__ __forceinline__ void For(int64_t count, const F& f) const {
    for (int64_t i = ThreadIndex(); i < count; i += BlockSize()) f(i);
    SyncThreads();
  }
  template <typename Term, typename F>
  __device__ __forceinline__ void Sums(int64_t count, int64_t n, const Term& term,
                                       const F& f) const {
    for (int64_t i = Warp(); i < count; i += Warps()) {
      double sum = 0;
      for (int64_t k = Lane(); k < n; k += kWarpSize) sum += term(i, k);
      sum = WarpSum(sum);
      if (Lane() == 0) f(i, sum);
    }
    SyncThreads();
  }
  template <typename F>
  __device__ __forceinline__ double Max(int64_t count, const F& f) const {
    double best = 0;
    for (int64_t i = ThreadIndex(); i < count; i += BlockSize()) {
      best = CURVAX_TARGET::Max(best, static_cast<double>(f(i)));
    }
    return BlockMax(best, reinterpret_cast<double*>(SharedMemory()));
  }
  // What the others have read before must not change under them: hence two barriers.
  template <typename F>
  __device__ __forceinline__ void Once(const F& f) const {
    SyncThreads();
    if (ThreadIndex() == 0) f();
    SyncThreads();
  }
};

template <typename S>
__device__ __forceinline__ BlockOrthoPass<S, BlockTeam> MakePass(const BlockOrthoLaunch& launch,
                                                                 const BlockTeam& team) {
  using C = Compute<S>;
  return {launch.args,
          team,
          &launch.device->state,
          launch.measured,
          launch.left,
          static_cast<C*>(launch.a),
          PaddedColumns(launch.args.block),
          static_cast<C*>(launch.mix)};
}

template <typename S>
__global__ void __launch_bounds__(kDecideThreads, 1)
    BlockOrthoBegin(const __grid_constant__ BlockOrthoLaunch launch) {
  const BlockOrthoArgs& args = launch.args;
  const int64_t used = *launch.used;
  const bool possible = used >= 0 && used + args.block <= args.rows && used + args.block <= args.n;
  const BlockTeam team;
  team.Once([&] {
    launch.device->state.used = possible ? used : 0;
    launch.device->next = possible ? NextSweep::kMeasure : NextSweep::kNothing;
    launch.device->poison = 0;
  });
  const auto pass = MakePass<S>(launch, team);
  pass.Begin();
  if (!possible) pass.Poison(args.rows);
}

template <typename S, int B>
__global__ void __launch_bounds__(kSweepThreads, (kSweepResidents<S, B>))
    MeasureSweep(const __grid_constant__ BlockOrthoLaunch launch) {
  if (launch.device->next == NextSweep::kNothing) return;
  SweepBlock<S, B>(launch).Measure();
}

template <typename S, int B>
__global__ void __launch_bounds__(kSweepThreads, (kSweepResidents<S, B>))
    UpdateSweep(const __grid_constant__ BlockOrthoLaunch launch) {
  const NextSweep what = launch.device->next;
  if (what == NextSweep::kNothing) return;
  SweepBlock<S, B>(launch).Update(what);
}

// Adds up the blocks' sums: kCombineEntries of them, whose shares of blocks are then added in
// order. The maxima behind the sums of the first sweep are combined likewise.
static __global__ void __launch_bounds__(kCombineThreads)
    CombineSums(const __grid_constant__ BlockOrthoLaunch launch) {
  const NextSweep what = launch.device->next;
  if (what == NextSweep::kNothing || Stores(what)) return;
  constexpr int kShares = kCombineThreads / kCombineEntries;
  const int64_t b = launch.args.block, sums = (launch.device->state.used + b) * b;
  const int entry = ThreadIndex() % kCombineEntries, share = ThreadIndex() / kCombineEntries;
  const int64_t e = BlockIndex() * kCombineEntries + entry;
  const bool maximum = e >= sums;
  const int64_t each = CeilDiv(launch.blocks, kShares);
  double total = 0;
  if (e < sums + b) {
    const int64_t end = Min(launch.blocks, (share + 1) * each);
    for (int64_t k = share * each; k < end; ++k) {
      const double x = launch.partial[k * launch.sums + e];
      total = maximum ? Max(total, x) : total + x;
    }
  }
  double* shares = reinterpret_cast<double*>(SharedMemory());
  shares[share * kCombineEntries + entry] = total;
  SyncThreads();
  if (share != 0 || e >= sums + b) return;
  for (int k = 1; k < kShares; ++k) {
    const double x = shares[k * kCombineEntries + entry];
    total = maximum ? Max(total, x) : total + x;
  }
  launch.measured[e] = total;
}

// Factors that bring each column to a largest element in [1, 2); false if one is not finite.
inline __device__ bool ScaleColumns(const BlockOrthoLaunch& launch, const BlockTeam& team) {
  const int64_t b = launch.args.block;
  const double* largest = launch.measured + (launch.device->state.used + b) * b;
  if (team.Max(b, [&](int64_t c) { return largest[c] - largest[c] == 0 ? 0.0 : 1.0; }) != 0) {
    return false;
  }
  team.For(b, [&](int64_t c) {
    const int exponent = largest[c] == 0 ? 0 : ::ilogb(largest[c]);
    const int half = -exponent / 2;
    launch.device->state.column_scale[c] = ::ldexp(1.0, exponent);
    launch.device->half_scale[c] = ::ldexp(1.0, half);
    launch.device->rest_scale[c] = ::ldexp(1.0, -exponent - half);
  });
  return true;
}

// The pass after a sweep, on one block of threads; `kFirst`: the sweep has measured the vectors as
// they were given.
template <typename S, bool kFirst>
__global__ void __launch_bounds__(kDecideThreads, 1)
    Decide(const __grid_constant__ BlockOrthoLaunch launch) {
  NextSweep next = launch.device->next;
  if (next == NextSweep::kNothing) return;
  const BlockTeam team;
  const auto pass = MakePass<S>(launch, team);
  bool poison = false;
  if (Stores(next)) {
    next = NextSweep::kNothing;
  } else if (kFirst && !pass.InRange()) {
    poison = !ScaleColumns(launch, team);
    next = NextSweep::kScale;
  } else if (pass.Finite()) {
    const bool last = pass.Run();
    const bool mix_alone = launch.device->state.mix_alone != 0;
    next = !last ? NextSweep::kUpdate : mix_alone ? NextSweep::kStoreMixed : NextSweep::kStore;
    if (last) pass.End();
  } else {
    poison = true;
  }
  if (poison) {
    pass.Poison(launch.device->state.used);
    next = NextSweep::kStore;
  }
  team.Once([&] {
    launch.device->next = next;
    if (poison) launch.device->poison = 1;
  });
}

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CUDA_BLOCK_ORTHO_CUH_
