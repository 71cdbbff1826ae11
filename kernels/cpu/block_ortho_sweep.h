// One sweep over the basis and the block: update, inner products and store, panel by panel.
//
//   update:   W <- W B + Q A           (b x b and m x b coefficients, from the last measurement)
//   measure:  C = Q^T W,  G = W^T W    (of the updated W)
//   store:    Q_new <- W
//
// A panel is a range of elements of all vectors, narrow enough that the rows of the basis in it
// stay in half of L2: a fused update and measurement reads them from memory once. Products are of
// the compute type inside a panel and are added up in double across panels; chunks of panels have
// their own sums, combined in the order of their index. Borders depend on sizes alone.
#ifndef CURVAX_CPU_BLOCK_ORTHO_SWEEP_H_
#define CURVAX_CPU_BLOCK_ORTHO_SWEEP_H_

#include "cpu/block_ortho_tiles.h"
#include "cpu/convert.h"
#include "cpu/parallel.h"
#include "curvax/block_ortho.h"

namespace curvax::CURVAX_TARGET {

// How the work is divided, and where scratch memory lies.
struct SweepPlan {
  int64_t panel;         // elements in a panel
  int64_t panels;        // in a vector
  int64_t chunk_panels;  // panels in a chunk
  int64_t chunks;
  int64_t stride;        // elements between vectors in scratch: the panel and at least a line of
                         // padding, so that equal offsets do not share a cache set
  int64_t sums;          // doubles in one chunk's sums, (m + b) b
  int64_t worker_bytes;  // scratch of one worker
};

CURVAX_INLINE int64_t StoredBytes(DType dtype) {
  return dtype == DType::kF64 ? 8 : dtype == DType::kF32 ? 4 : 2;
}
CURVAX_INLINE int64_t ComputedBytes(DType dtype) { return dtype == DType::kF64 ? 8 : 4; }

// An element of all vectors that share a panel takes `shared` bytes, of those in use at once `hot`.
CURVAX_INLINE SweepPlan PlanSweep(int64_t n, int64_t shared, int64_t hot, int64_t sums) {
  constexpr int64_t kL1Bytes = 28 << 10, kHalfL2Bytes = 256 << 10, kMaxChunks = 256;
  SweepPlan plan;
  const int64_t widest = Min(kL1Bytes / hot, kHalfL2Bytes / shared);
  plan.panel = Max<int64_t>(64, Min<int64_t>(widest, 1024) / 64 * 64);
  plan.panels = CeilDiv(n, plan.panel);
  plan.chunk_panels = Max<int64_t>(2, CeilDiv(plan.panels, kMaxChunks));
  plan.chunks = CeilDiv(plan.panels, plan.chunk_panels);
  plan.stride = plan.panel + 32;
  plan.sums = sums;
  plan.worker_bytes = RoundUp(plan.stride * shared, 64);
  return plan;
}

template <typename S>
class Sweep {
 public:
  using C = Compute<S>;

  // `sums` has room for plan.chunks * plan.sums doubles, `scratch` for one worker's bytes each.
  Sweep(const BlockOrthoArgs& args, const SweepPlan& plan, double* sums, char* scratch)
      : args_(args), plan_(plan), sums_(sums), scratch_(scratch), m_(args.used), b_(args.block) {
    clashes_ = RowsClash();
  }

  // Sums of (C; G) as (m + b, b) doubles in `result`, of stored rows.
  void Measure(const ParallelFor& pool, double* result) const {
    Run(pool, nullptr, nullptr, true, false);
    Combine(result);
  }
  void UpdateAndMeasure(const ParallelFor& pool, const C* a, const C* mix, double* result) const {
    Run(pool, a, mix, true, false);
    Combine(result);
  }
  // `a`: null for the update by `mix` alone, which does not read the basis.
  void UpdateAndStore(const ParallelFor& pool, const C* a, const C* mix) const {
    Run(pool, a, mix, false, true);
  }

 private:
  struct Panel {
    int64_t begin, width, padded;  // padded: to whole cache lines, with zeros
    bool packed;                   // rows are used from scratch
    C* w;                          // the block's panel, b vectors plan.stride apart
    S* rows;                       // the basis' panel if packed, likewise
  };

  // Whether more rows than a set of an 8-way L2 holds fall on the same sets of 64 KB, as they do
  // when the stride is a multiple of a large power of two. Then a panel is copied, or it would not
  // stay.
  bool RowsClash() const {
    int8_t load[64] = {};
    const int64_t kilobytes = CeilDiv(plan_.panel * int64_t{sizeof(S)}, 1024);
    for (int64_t r = 0; r < m_; ++r) {
      const int64_t first = r * args_.stride * int64_t{sizeof(S)} / 1024;
      for (int64_t k = first; k < first + kilobytes; ++k) {
        if (++load[k % 64] > 6) return m_ * kilobytes <= 256;
      }
    }
    return false;
  }

  void Run(const ParallelFor& pool, const C* a, const C* mix, bool measure, bool store) const {
    For(pool, plan_.chunks, [&](int64_t worker, int64_t chunk) {
      C* scratch = reinterpret_cast<C*>(scratch_ + worker * plan_.worker_bytes);
      double* sums = sums_ + chunk * plan_.sums;
      if (measure) {
        for (int64_t i = 0; i < plan_.sums; ++i) sums[i] = 0;
      }
      const int64_t end = Min(plan_.panels, (chunk + 1) * plan_.chunk_panels);
      for (int64_t p = chunk * plan_.chunk_panels; p < end; ++p) {
        Panel panel;
        panel.begin = p * plan_.panel;
        panel.width = Min(plan_.panel, args_.n - panel.begin);
        panel.padded = RoundUp(panel.width, kLine<S>);
        panel.packed = panel.padded != panel.width || (clashes_ && a != nullptr && measure);
        panel.w = scratch;
        panel.rows = reinterpret_cast<S*>(scratch + b_ * plan_.stride);
        LoadBlock(panel, mix);
        if (a != nullptr) {
          Update(panel, a, measure ? 0 : plan_.panel);
          if (measure) SaveBlock(panel, Block(0), args_.n, C{1});
        }
        if (store) SaveBlock(panel, Basis(m_), args_.stride, C(args_.scale));
        if (measure) Products(panel, a != nullptr, sums);
      }
    });
  }

  const S* Row(int64_t r) const { return static_cast<const S*>(args_.basis) + r * args_.stride; }
  S* Basis(int64_t r) const { return static_cast<S*>(args_.basis) + r * args_.stride; }
  C* Block(int64_t c) const { return static_cast<C*>(args_.w) + c * args_.n; }

  // The block's panel, times `mix` (b x b, row major) if given, into scratch.
  void LoadBlock(const Panel& panel, const C* mix) const {
    const int64_t whole = panel.width / kLanes<C> * kLanes<C>;
    for (int64_t c = 0; c < b_; ++c) {
      C* out = panel.w + c * plan_.stride;
      if (mix == nullptr) {
        const C* in = Block(c) + panel.begin;
        for (int64_t i = 0; i < whole; i += kLanes<C>) StoreVec(out + i, LoadVec(in + i));
        for (int64_t i = whole; i < panel.width; ++i) out[i] = in[i];
      } else {
        Mix(panel, mix + c, out);
      }
      for (int64_t i = panel.width; i < panel.padded; ++i) out[i] = 0;
    }
  }
  // out = sum_k mix[k b] w_k, the zeros of a triangular `mix` skipped.
  void Mix(const Panel& panel, const C* mix, C* out) const {
    bool first = true;
    for (int64_t k = 0; k < b_; ++k) {
      const C factor = mix[k * b_];
      if (factor == 0) continue;
      const C* in = Block(k) + panel.begin;
      if (first) {
        for (int64_t i = 0; i < panel.width; ++i) out[i] = factor * in[i];
      } else {
        for (int64_t i = 0; i < panel.width; ++i) out[i] += factor * in[i];
      }
      first = false;
    }
    if (first) {
      for (int64_t i = 0; i < panel.width; ++i) out[i] = 0;
    }
  }

  template <typename To>
  void SaveBlock(const Panel& panel, To* base, int64_t stride, C scale) const {
    const int64_t whole = panel.width / kLanes<C> * kLanes<C>;
    for (int64_t c = 0; c < b_; ++c) {
      const C* in = panel.w + c * plan_.stride;
      To* out = base + c * stride + panel.begin;
      for (int64_t i = 0; i < whole; i += kLanes<C>) StoreAs(out + i, LoadVec(in + i) * scale);
      if (whole < panel.width) {
        StorePartial(out + whole, panel.width - whole, LoadVec(in + whole) * scale);
      }
    }
  }

  // Pointers to `count` rows from `first`, copied to scratch before if the panel is packed.
  void Rows(const Panel& panel, int64_t first, int64_t count, bool copy, const S** rows) const {
    for (int64_t r = 0; r < count; ++r) {
      const S* row = Row(first + r) + panel.begin;
      if (!panel.packed) {
        rows[r] = row;
        continue;
      }
      S* out = panel.rows + (first + r) * plan_.stride;
      rows[r] = out;
      if (!copy) continue;
      __builtin_memcpy(out, row, static_cast<size_t>(panel.width) * sizeof(S));
      for (int64_t i = panel.width; i < panel.padded; ++i) out[i] = S{};
    }
  }

  // Calls f(r, count, ahead) for groups of rows [r, r + count), at most `group` and as equal as can
  // be: in a small one fewer lines would be under way. The rows that follow are `ahead` elements
  // away: the next group's, or after the last the first ones `wrap` elements further on. A group is
  // never larger than the next, so that no prefetch reaches past the used rows.
  template <typename F>
  void ForRows(const Panel& panel, int64_t group, int64_t wrap, const F& f) const {
    const int64_t stride = panel.packed ? plan_.stride : args_.stride;
    const int64_t groups = CeilDiv(m_, group);
    for (int64_t r = 0, g = 0; g < groups; ++g) {
      const int64_t count = (m_ + g) / groups;
      f(r, count, g + 1 < groups ? count * stride : wrap - r * stride);
      r += count;
    }
  }

  // Calls f(column, Constant<columns>) for the block's columns, a tile's worth at a time.
  template <typename F>
  void ForColumns(const F& f) const {
    for (int64_t c = 0; c < b_; c += kMaxTileColumns) {
      WithConstant<kMaxTileColumns>(Min<int64_t>(kMaxTileColumns, b_ - c),
                                    [&](auto columns) { f(c, columns); });
    }
  }
  // Calls f(Constant<columns of the widest tile>).
  template <typename F>
  void WithWidestTile(const F& f) const {
    WithConstant<kMaxTileColumns>(Min<int64_t>(kMaxTileColumns, b_), f);
  }

  // W += Q a over the panel; `wrap`: where the rows are wanted next.
  void Update(const Panel& panel, const C* a, int64_t wrap) const {
    WithWidestTile([&](auto widest) {
      constexpr int kRows = UpdateRows(decltype(widest)::value);
      const S* rows[kRows];
      ForRows(panel, kRows, wrap, [&](int64_t r, int64_t count, int64_t ahead) {
        Rows(panel, r, count, true, rows);
        ForColumns([&](int64_t c, auto columns) {
          WithConstant<kRows>(count, [&](auto height) {
            UpdateTile<decltype(height)::value, decltype(columns)::value, S, C>(
                rows, ahead, a + r * b_ + c, b_, panel.padded, panel.w + c * plan_.stride,
                plan_.stride);
          });
        });
      });
    });
  }

  // Adds the panel's <q_r, w_c> and <w_k, w_c> to `sums`; `copied`: a packed panel is complete.
  void Products(const Panel& panel, bool copied, double* sums) const {
    WithWidestTile([&](auto widest) {
      constexpr int kRows = DotRows(decltype(widest)::value);
      const S* rows[kRows];
      ForRows(panel, kRows, plan_.panel, [&](int64_t r, int64_t count, int64_t ahead) {
        Rows(panel, r, count, !copied, rows);
        Dots<kRows>(panel, rows, count, ahead, sums + r * b_);
      });
      const C* columns[kRows];
      for (int64_t k = 0; k < b_; k += kRows) {
        const int64_t count = Min<int64_t>(kRows, b_ - k);
        for (int64_t r = 0; r < count; ++r) columns[r] = panel.w + (k + r) * plan_.stride;
        Dots<kRows>(panel, columns, count, 0, sums + (m_ + k) * b_);
      }
    });
  }

  // Adds <rows[r], w_c> to sums[r b + c], for `count` rows of at most kRows.
  template <int kRows, typename T>
  void Dots(const Panel& panel, const T* const* rows, int64_t count, int64_t ahead,
            double* sums) const {
    ForColumns([&](int64_t c, auto columns) {
      WithConstant<kRows>(count, [&](auto height) {
        DotTile<decltype(height)::value, decltype(columns)::value, T, C>(
            rows, ahead, panel.w + c * plan_.stride, plan_.stride, panel.padded, sums + c, b_);
      });
    });
  }

  void Combine(double* result) const {
    for (int64_t i = 0; i < plan_.sums; ++i) result[i] = 0;
    for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
      const double* sums = sums_ + chunk * plan_.sums;
      for (int64_t i = 0; i < plan_.sums; ++i) result[i] += sums[i];
    }
  }

  const BlockOrthoArgs& args_;
  const SweepPlan plan_;
  double* const sums_;
  char* const scratch_;
  const int64_t m_, b_;
  bool clashes_;
};

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CPU_BLOCK_ORTHO_SWEEP_H_
