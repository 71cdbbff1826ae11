// One sweep of block_ortho on a GPU, panel by panel: K1 to K3, the work of one block of threads.
//
// block_ortho.cuh describes the algorithm, the bytes that it moves and its determinism.
#ifndef CURVAX_CUDA_BLOCK_ORTHO_SWEEP_CUH_
#define CURVAX_CUDA_BLOCK_ORTHO_SWEEP_CUH_

#include "common/block_ortho_pass.h"
#include "cuda/device.cuh"
#include "cuda/launch_config.h"

namespace curvax::CURVAX_LEVEL {

enum class NextSweep : int32_t { kMeasure, kScale, kUpdate, kStore, kStoreMixed, kNothing };
// Whether a sweep writes the new rows and measures nothing; kStoreMixed does not read the basis.
CURVAX_HOST_DEVICE constexpr bool Stores(NextSweep what) {
  return what == NextSweep::kStore || what == NextSweep::kStoreMixed;
}

// What the kernels of one call pass on, at the start of the workspace.
struct BlockOrthoDevice {
  BlockOrthoState state;
  NextSweep next;
  int32_t poison;  // store NaN: the block is not finite
  // Powers of two that columns are multiplied by, as two factors: one alone may overflow.
  double half_scale[kMaxBlock], rest_scale[kMaxBlock];
};

// The arguments of every kernel of one call. `args.used` and `args.seed` are on the device.
struct BlockOrthoLaunch {
  BlockOrthoArgs args;
  const int32_t* used;
  const uint32_t* seed;  // (2)
  int64_t blocks;        // of a sweep
  int64_t sums;          // room for one block's sums, (rows + b) b and b maxima
  BlockOrthoDevice* device;
  double* partial;   // (blocks, sums)
  double* measured;  // (sums)
  double* left;      // (rows, b)
  void *a, *mix;     // (rows, PaddedColumns(b)) and (b, b) of the compute type
};

// A strip of a row or panel: 32 lanes of one vector each.
template <typename S>
constexpr int kStrip = kWarpSize * kVector<S>;
// Where this lane's k-th element of a strip is: lanes have vectors, or elements that alternate.
template <typename S, bool kAligned>
__device__ __forceinline__ int InStrip(int k) {
  return kAligned ? Lane() * kVector<S> + k : Lane() + k * kWarpSize;
}

// Elements [begin, begin + kStrip) of a row of n, 0 past its end, where there may be padding to
// whole vectors.
template <typename S, bool kAligned>
__device__ __forceinline__ void LoadStrip(const S* row, int64_t begin, int64_t n,
                                          Compute<S> (&out)[kVector<S>]) {
  constexpr int V = kVector<S>;
  if constexpr (kAligned) {
    const int64_t i = begin + InStrip<S, true>(0);
    Bytes16 raw = {};
    if (i < n) raw = *reinterpret_cast<const Bytes16*>(row + i);
    Unpack<S>(raw, out);
#pragma unroll
    for (int k = 1; k < V; ++k) out[k] = k < n - i ? out[k] : Compute<S>{0};
  } else {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const int64_t i = begin + InStrip<S, false>(k);
      out[k] = i < n ? Widen(row[i]) : Compute<S>{0};
    }
  }
}

// Adds up N values per lane over the warp. Afterwards v[0] of a lane is the sum of the values with
// index OwnedValue<N>(). Halving: each step sends the half of the values that the partner will own.
template <int N, typename T>
__device__ __forceinline__ void SumOverLanes(T (&v)[N]) {
  static_assert(N <= kWarpSize && (N & (N - 1)) == 0, "a power of two of at most a warp");
  int held = N;
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    if (held > 1) {
      held /= 2;
      const bool upper = (Lane() & mask) != 0;
#pragma unroll
      for (int i = 0; i < N / 2; ++i) {
        if (i < held) {
          const T mine = upper ? v[i + held] : v[i], theirs = upper ? v[i] : v[i + held];
          v[i] = mine + ShuffleXor(theirs, mask);
        }
      }
    } else {
      v[0] += ShuffleXor(v[0], mask);
    }
  }
}
template <int N>
__device__ __forceinline__ int OwnedValue() {
  return Lane() / (kWarpSize / N);
}
template <int N>
__device__ __forceinline__ bool OwnsValue() {
  return Lane() % (kWarpSize / N) == 0;
}

// One panel after another of one block, for a tile of B columns at a time.
template <typename S, int B>
class SweepBlock {
 public:
  using C = Compute<S>;
  static constexpr int V = kVector<S>;

  __device__ explicit SweepBlock(const BlockOrthoLaunch& launch)
      : launch_(launch),
        state_(launch.device->state),
        n_(launch.args.n),
        m_(launch.device->state.used),
        b_(launch.args.block),
        seed_(launch.seed[0] | uint64_t{launch.seed[1]} << 32),
        partial_(launch.partial + BlockIndex() * launch.sums),
        w_(reinterpret_cast<C*>(SharedMemory())),
        updates_(w_ + PaddedColumns(b_) * kPanel) {}

  // Calls f(panel) for this block's panels.
  template <typename F>
  __device__ void ForPanels(const F& f) const {
    const int64_t panels = CeilDiv(n_, kPanel), share = BlockPanels(n_, launch_.blocks);
    const int64_t end = Min(panels, (BlockIndex() + 1) * share);
    for (int64_t p = BlockIndex() * share; p < end; ++p) f(p);
  }

  // K1, and the largest element of each column.
  __device__ void Measure() {
    ClearSums();
    ForPanels([&](int64_t p) {
      const int64_t i = p * kPanel + ThreadIndex();
      for (int64_t c = 0; c < PaddedColumns(b_); ++c) {
        const C x = c < b_ && i < n_ ? Column(c)[i] : C{0};
        w_[c * kPanel + ThreadIndex()] = x;
      }
      SyncThreads();
      for (int64_t c = Warp(); c < b_; c += kSweepWarps) RaiseMaximum(c);
      AddProducts(p);
      SyncThreads();
    });
  }

  // K2 or K3. The old block times mix, what is left of a column after it has been scaled, or random
  // numbers, plus the basis times a.
  __device__ void Update(NextSweep what) {
    const bool measure = !Stores(what);
    const bool add_rows = what == NextSweep::kUpdate || what == NextSweep::kStore;
    if (measure) ClearSums();
    ForPanels([&](int64_t p) {
      for (int64_t first = 0; first < b_; first += B) {
        C mixed[B];
        Mix(p, first, what, mixed);
        if (add_rows) AddRows(p, first, mixed);
#pragma unroll
        for (int c = 0; c < B; ++c) w_[(first + c) * kPanel + ThreadIndex()] = mixed[c];
      }
      // What is written here has been read above by this very thread.
      Write(p, measure);
      SyncThreads();
      if (measure) AddProducts(p);
      SyncThreads();
    });
    if (!measure) ClearPadding();
  }

 private:
  // Rows of the basis that are used together, so that many loads are in flight: as many as the
  // registers allow.
  template <bool kAligned>
  static constexpr int kUpdateRows = kAligned ? 4 : Min(4, 16 / V);
  static constexpr int kRows = B * int64_t{sizeof(C)} >= 64 ? 2 : 4;
  static constexpr int kStrips = static_cast<int>(kPanel / kStrip<S>);

  __device__ C* Column(int64_t c) const { return static_cast<C*>(launch_.args.w) + c * n_; }
  __device__ const S* Row(int64_t r) const {
    return static_cast<const S*>(launch_.args.basis) + r * launch_.args.stride;
  }
  __device__ S* NewRow(int64_t c) const {
    return static_cast<S*>(launch_.args.basis) + (m_ + c) * launch_.args.stride;
  }
  __device__ bool Aligned() const {
    return launch_.args.stride % V == 0 &&
           reinterpret_cast<uintptr_t>(launch_.args.basis) % 16 == 0;
  }

  // They are added to after the next barrier.
  __device__ void ClearSums() const {
    for (int64_t e = ThreadIndex(); e < launch_.sums; e += BlockSize()) partial_[e] = 0;
  }

  // The maxima lie behind the sums. A NaN counts as infinity.
  __device__ void RaiseMaximum(int64_t c) const {
    double largest = 0;
    for (int i = Lane(); i < kPanel; i += kWarpSize) {
      const C x = w_[c * kPanel + i], size = x < 0 ? -x : x;
      largest = Max(largest, size == size ? static_cast<double>(size) : double(INFINITY));
    }
    largest = WarpMax(largest);
    double* maximum = partial_ + (m_ + b_) * b_ + c;
    if (Lane() == 0) *maximum = Max(*maximum, largest);
  }

  // Element p kPanel + ThreadIndex() of columns [first, first + B) of the block times `mix`.
  __device__ void Mix(int64_t p, int64_t first, NextSweep what, C (&mixed)[B]) const {
    const int64_t i = p * kPanel + ThreadIndex();
    const C* mix = static_cast<const C*>(launch_.mix);
#pragma unroll
    for (int c = 0; c < B; ++c) mixed[c] = 0;
    if (i >= n_) return;
    for (int64_t k = 0; k < b_; ++k) {
      C x;
      if (what == NextSweep::kScale) {
        x = Column(k)[i] * C(launch_.device->half_scale[k]) * C(launch_.device->rest_scale[k]);
      } else if (state_.dying[k] != 0) {
        x = C(RandomElement(RandomWords(state_, seed_, k, i), i, n_));
      } else {
        x = Column(k)[i];
      }
#pragma unroll
      for (int c = 0; c < B; ++c) {
        if (first + c >= b_) continue;
        if (what == NextSweep::kScale) {
          if (first + c == k) mixed[c] = x;
        } else {
          // The zeros of a triangular mix are skipped: what they would multiply may not be finite.
          const C factor = mix[k * b_ + first + c];
          if (factor != 0) mixed[c] += factor * x;
        }
      }
    }
  }

  // Adds the basis times columns [first, first + B) of `a`: each warp over its rows, strip by
  // strip; then each thread, for its element, over the warps.
  __device__ void AddRows(int64_t p, int64_t first, C (&mixed)[B]) const {
    for (int strip = 0; strip < kStrips; ++strip) {
      if (Aligned()) {
        UpdateStrip<true>(p, strip, first);
      } else {
        UpdateStrip<false>(p, strip, first);
      }
      SyncThreads();
      const int at = ThreadIndex() - strip * kStrip<S>;
      if (at >= 0 && at < kStrip<S>) {
#pragma unroll
        for (int c = 0; c < B; ++c) {
          for (int warp = 0; warp < kSweepWarps; ++warp) {
            mixed[c] += updates_[(warp * B + c) * kStrip<S> + at];
          }
        }
      }
      SyncThreads();
    }
  }
  template <bool kAligned>
  __device__ void UpdateStrip(int64_t p, int strip, int64_t first) const {
    const int64_t begin = p * kPanel + strip * kStrip<S>;
    const int64_t stride = PaddedColumns(b_);
    const C* a = static_cast<const C*>(launch_.a) + first;
    constexpr int kLoads = kUpdateRows<kAligned>;
    C sum[B][V] = {};
    for (int64_t r = Warp(); r < m_; r += kLoads * kSweepWarps) {
      C q[kLoads][V];
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int64_t row = r + j * kSweepWarps;
        if (row < m_) LoadStrip<S, kAligned>(Row(row), begin, n_, q[j]);
      }
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int64_t row = r + j * kSweepWarps;
        if (row >= m_) continue;
        C factors[B];
        LoadAligned<B>(a + row * stride, factors);
#pragma unroll
        for (int c = 0; c < B; ++c) {
#pragma unroll
          for (int k = 0; k < V; ++k) sum[c][k] += factors[c] * q[j][k];
        }
      }
    }
#pragma unroll
    for (int c = 0; c < B; ++c) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        updates_[(Warp() * B + c) * kStrip<S> + InStrip<S, kAligned>(k)] = sum[c][k];
      }
    }
  }

  // The panel's new elements, to the block or to the basis.
  __device__ void Write(int64_t p, bool to_block) const {
    const int64_t i = p * kPanel + ThreadIndex();
    if (i >= n_) return;
    for (int64_t c = 0; c < b_; ++c) {
      const C x = w_[c * kPanel + ThreadIndex()];
      if (to_block) {
        Column(c)[i] = x;
      } else {
        const C stored = launch_.device->poison != 0 ? C(NAN) : x * C(launch_.args.scale);
        Narrow(stored, NewRow(c) + i);
      }
    }
  }

  // Zeros behind the new rows, from the first block.
  __device__ void ClearPadding() const {
    if (BlockIndex() != 0) return;
    for (int64_t c = 0; c < b_; ++c) {
      for (int64_t i = n_ + ThreadIndex(); i < launch_.args.stride; i += BlockSize()) {
        NewRow(c)[i] = S{};
      }
    }
  }

  // Adds the panel's <q_r, w_c> and <w_k, w_c> to the block's sums.
  __device__ void AddProducts(int64_t p) const {
    for (int64_t first = 0; first < b_; first += B) {
      if (Aligned()) {
        BasisProducts<true>(p, first);
      } else {
        BasisProducts<false>(p, first);
      }
      for (int64_t k = Warp(); k < b_; k += kSweepWarps) GramProducts(k, first);
    }
  }
  template <bool kAligned>
  __device__ void BasisProducts(int64_t p, int64_t first) const {
    const int own = OwnedValue<kRows * B>();
    const int64_t column = first + own % B;
    for (int64_t r = Warp(); r < m_; r += kRows * kSweepWarps) {
      const int64_t own_row = r + own / B * kSweepWarps;
      const bool mine = OwnsValue<kRows * B>() && own_row < m_ && column < b_;
      // Read before the products, which hide the latency.
      double* total = partial_ + own_row * b_ + column;
      const double before = mine ? *total : 0.0;
      C sum[kRows * B] = {};
#pragma unroll 1
      for (int strip = 0; strip < kStrips; ++strip) {
        C q[kRows][V] = {};
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          const int64_t row = r + j * kSweepWarps;
          if (row < m_) {
            LoadStrip<S, kAligned>(Row(row), p * kPanel + strip * kStrip<S>, n_, q[j]);
          }
        }
#pragma unroll
        for (int c = 0; c < B; ++c) {
          const C* w = w_ + (first + c) * kPanel + strip * kStrip<S>;
#pragma unroll
          for (int k = 0; k < V; ++k) {
            const C x = w[InStrip<S, kAligned>(k)];
#pragma unroll
            for (int j = 0; j < kRows; ++j) sum[j * B + c] += q[j][k] * x;
          }
        }
      }
      SumOverLanes(sum);
      if (mine) *total = before + sum[0];
    }
  }
  __device__ void GramProducts(int64_t k, int64_t first) const {
    C sum[B] = {};
    for (int i = Lane(); i < kPanel; i += kWarpSize) {
      const C x = w_[k * kPanel + i];
#pragma unroll
      for (int c = 0; c < B; ++c) sum[c] += x * w_[(first + c) * kPanel + i];
    }
    SumOverLanes(sum);
    const int64_t column = first + OwnedValue<B>();
    if (OwnsValue<B>() && column < b_) partial_[(m_ + k) * b_ + column] += sum[0];
  }

  const BlockOrthoLaunch& launch_;
  const BlockOrthoState& state_;
  const int64_t n_, m_, b_;
  const uint64_t seed_;
  double* const partial_;  // this block's sums
  C* const w_;             // shared: the block's panel, padded with columns of 0
  C* const updates_;       // shared: (warp, column of the tile, element of the strip)
};

}  // namespace curvax::CURVAX_LEVEL

#endif  // CURVAX_CUDA_BLOCK_ORTHO_SWEEP_CUH_
