// Orthonormalises a block W (b, n) against a basis Q (m, n) and itself, into rows [m, m + b).
//
// Algorithm: the passes of common/block_ortho_pass.h. As a pass's update and the next one's
// measurement share a sweep, the basis is usually read three times: measure, update + measure,
// update + store; or twice, where `lazy_below` leaves the last update without it.
// Bytes: 3 (2) m s n for a basis of s-byte elements, and about 6 b n elements of the block.
// Accumulation: products in the compute type within a panel, double across panels; everything of
// size m x b or b x b in double.
// Determinism: bitwise equal for any thread count (block_ortho_sweep.h).
#include "curvax/block_ortho.h"

#include "common/block_ortho_pass.h"
#include "cpu/block_ortho.h"
#include "cpu/block_ortho_sweep.h"

namespace curvax::CURVAX_TARGET {
namespace {

// The small matrices' work on one thread.
struct Alone {
  template <typename F>
  CURVAX_INLINE void For(int64_t count, const F& f) const {
    for (int64_t i = 0; i < count; ++i) f(i);
  }
  template <typename Term, typename F>
  CURVAX_INLINE void Sums(int64_t count, int64_t n, const Term& term, const F& f) const {
    for (int64_t i = 0; i < count; ++i) {
      double sum = 0;
      for (int64_t k = 0; k < n; ++k) sum += term(i, k);
      f(i, sum);
    }
  }
  template <typename F>
  CURVAX_INLINE double Max(int64_t count, const F& f) const {
    double best = 0;
    for (int64_t i = 0; i < count; ++i) best = CURVAX_TARGET::Max(best, static_cast<double>(f(i)));
    return best;
  }
  template <typename F>
  CURVAX_INLINE void Once(const F& f) const {
    f();
  }
};

// Where everything lies in the workspace.
struct Layout {
  SweepPlan plan;
  int64_t sums, result, coefficients, a, mix, bytes;
  Layout(const BlockOrthoArgs& args, int64_t max_workers) {
    const int64_t m = args.used, b = args.block;
    const int64_t element = ComputedBytes(args.dtype), stored = StoredBytes(args.dtype);
    const int64_t tile = Min<int64_t>(b, kMaxTileColumns);
    plan = PlanSweep(args.n, m * stored + b * element,
                     DotRows(static_cast<int>(tile)) * stored + b * element, (m + b) * b);
    int64_t at = max_workers * plan.worker_bytes;
    const auto take = [&at](int64_t bytes) {
      const int64_t begin = at;
      at = RoundUp(at + bytes, 64);
      return begin;
    };
    sums = take(plan.chunks * plan.sums * 8);
    result = take(plan.sums * 8);
    coefficients = take(m * b * 8);
    a = take(m * b * element);
    mix = take(b * b * element);
    bytes = at;
  }
};

template <typename S>
class BlockOrthoRun {
 public:
  using C = Compute<S>;

  BlockOrthoRun(const BlockOrthoArgs& args, const ParallelFor& pool)
      : args_(args),
        pool_(pool),
        layout_(args, pool.max_workers),
        memory_(static_cast<char*>(args.workspace)),
        sweep_(args, layout_.plan, At<double>(layout_.sums), memory_) {}

  void Run() {
    state_.used = args_.used;
    double* measured = At<double>(layout_.result);
    C *a = At<C>(layout_.a), *mix = At<C>(layout_.mix);
    const Alone team;
    const BlockOrthoPass<S, Alone> pass(args_, team, &state_, measured,
                                        At<double>(layout_.coefficients), a, args_.block, mix);
    pass.Begin();
    sweep_.Measure(pool_, measured);
    if (!pass.InRange()) {
      if (!Rescale()) return Fail(pass);
      sweep_.Measure(pool_, measured);
    }
    for (;;) {
      if (!pass.Finite()) return Fail(pass);
      const bool last = pass.Run();
      for (int64_t c = 0; c < args_.block; ++c) {
        if (state_.dying[c] != 0) Fill(c);
      }
      if (last) break;
      sweep_.UpdateAndMeasure(pool_, a, mix, measured);
    }
    sweep_.UpdateAndStore(pool_, state_.mix_alone != 0 ? nullptr : a, mix);
    ClearPadding();
    pass.End();
  }

 private:
  template <typename T>
  T* At(int64_t offset) {
    return reinterpret_cast<T*>(memory_ + offset);
  }
  C* Column(int64_t c) const { return static_cast<C*>(args_.w) + c * args_.n; }

  S* NewRow(int64_t c) const {
    return static_cast<S*>(args_.basis) + (args_.used + c) * args_.stride;
  }

  void ClearPadding() const {
    for (int64_t c = 0; c < args_.block; ++c) {
      for (int64_t i = args_.n; i < args_.stride; ++i) NewRow(c)[i] = S{};
    }
  }

  // Scales each column to a largest element in [1, 2), by a power of two; false if not finite.
  bool Rescale() {
    double* chunk_max = At<double>(layout_.sums);
    const int64_t chunk = layout_.plan.panel * layout_.plan.chunk_panels;
    for (int64_t c = 0; c < args_.block; ++c) {
      C* w = Column(c);
      For(pool_, layout_.plan.chunks, [&](int64_t, int64_t k) {
        Int<C> best = 0;  // of the bits: a NaN is above infinity
        const int64_t end = Min(args_.n, (k + 1) * chunk);
        for (int64_t i = k * chunk; i < end; ++i) {
          const C size = w[i] < 0 ? -w[i] : w[i];
          best = Max(best, static_cast<Int<C>>(BitCast<Int<C>>(size) & kMagnitude));
        }
        chunk_max[k] = BitCast<C>(best);
      });
      double largest = 0;
      for (int64_t k = 0; k < layout_.plan.chunks; ++k) {
        if (!(chunk_max[k] - chunk_max[k] == 0)) return false;
        largest = Max(largest, chunk_max[k]);
      }
      if (largest == 0) continue;
      const int exponent = __builtin_ilogb(largest);
      state_.column_scale[c] = __builtin_ldexp(1.0, exponent);
      // Two factors, since one alone may overflow or be subnormal.
      const C half = C(__builtin_ldexp(1.0, -exponent / 2));
      const C rest = C(__builtin_ldexp(1.0, -exponent - (-exponent / 2)));
      For(pool_, layout_.plan.chunks, [&](int64_t, int64_t k) {
        const int64_t end = Min(args_.n, (k + 1) * chunk);
        for (int64_t i = k * chunk; i < end; ++i) w[i] = w[i] * half * rest;
      });
    }
    return true;
  }

  // Fills column c with the random numbers that its state asks for.
  void Fill(int64_t c) {
    C* w = Column(c);
    constexpr int64_t kChunk = 1 << 16;
    For(pool_, CeilDiv(args_.n, kChunk), [&](int64_t, int64_t chunk) {
      const int64_t end = Min(args_.n, (chunk + 1) * kChunk);
      for (int64_t i = chunk * kChunk; i < end; i += 4) {
        const Philox4 words = RandomWords(state_, args_.seed, c, i);
        for (int64_t k = i; k < Min(i + 4, end); ++k)
          w[k] = C(RandomElement(words.v[k % 4], args_.n));
      }
    });
  }

  // Not finite: says so everywhere that the caller may look.
  void Fail(const BlockOrthoPass<S, Alone>& pass) {
    pass.Poison(args_.used);
    S bad;
    StorePartial(&bad, 1, Splat(C(__builtin_nan(""))));
    for (int64_t c = 0; c < args_.block; ++c) {
      for (int64_t i = 0; i < args_.n; ++i) NewRow(c)[i] = bad;
    }
    ClearPadding();
  }

  static constexpr Int<C> kMagnitude = static_cast<Int<C>>(~(uint64_t{1} << (8 * sizeof(C) - 1)));

  const BlockOrthoArgs& args_;
  const ParallelFor& pool_;
  const Layout layout_;
  char* const memory_;
  const Sweep<S> sweep_;
  BlockOrthoState state_;
};

}  // namespace

int64_t BlockOrthoWorkspaceBytes(const BlockOrthoArgs& args, int64_t max_workers) {
  return Layout(args, max_workers).bytes;
}

void BlockOrtho(const BlockOrthoArgs& args, const ParallelFor& pool) {
  switch (args.dtype) {
    case DType::kF32:
      return BlockOrthoRun<float>(args, pool).Run();
    case DType::kF64:
      return BlockOrthoRun<double>(args, pool).Run();
    case DType::kBF16:
      return BlockOrthoRun<BFloat16>(args, pool).Run();
    case DType::kF16:
      return BlockOrthoRun<Half>(args, pool).Run();
  }
}

}  // namespace curvax::CURVAX_TARGET
