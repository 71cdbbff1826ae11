// Rotates a basis in place: row j <- sum_{i < used} rotation[i, j] row i, for j < kept.
//
// Algorithm: a panel of the used rows is copied to scratch that fits half of L2; tiles of four new
// rows by one cache line are then formed in registers and written over the old rows. Memory
// traffic: the used rows are read once and the kept ones written once; nothing of size n is
// allocated. Accumulation: in the compute type over `used` terms. For rows in float, a rotation
// entry is split in two floats: rounding it to one would leave the rows orthonormal only to 1e-7
// after every restart, an error that is the same for all elements and so adds up; in 16 bits that
// is below a thousandth of the rounding of a row. Determinism: elements are
// independent; the result does not depend on the thread count.
#include "cpu/block_ortho.h"
#include "cpu/block_ortho_sweep.h"

namespace curvax::CURVAX_TARGET {
namespace {

constexpr int kTileRows = 4;

// Entries of one rotation row and four new rows; for float the rounding errors behind the values.
template <typename S>
constexpr int kParts = sizeof(S) == sizeof(float) ? 2 : 1;

struct Layout {
  SweepPlan plan;
  int64_t groups, entries, bytes;
  Layout(const RotateBasisArgs& args, int64_t max_workers) {
    const int64_t element = StoredBytes(args.dtype);
    plan = PlanSweep(args.n, Max<int64_t>(1, args.used) * element, element, 0);
    groups = CeilDiv(args.kept, kTileRows);
    entries = max_workers * plan.worker_bytes;
    bytes = entries + RoundUp(groups * args.used * kTileRows * int64_t{sizeof(double)}, 64);
  }
};

template <typename S>
class Rotation {
 public:
  using C = Compute<S>;
  static constexpr int kEntry = kTileRows * kParts<S>;

  Rotation(const RotateBasisArgs& args, const ParallelFor& pool)
      : args_(args), pool_(pool), layout_(args, pool.max_workers) {
    entries_ = reinterpret_cast<C*>(static_cast<char*>(args.workspace) + layout_.entries);
  }

  void Run() {
    PackEntries();
    const SweepPlan& plan = layout_.plan;
    For(pool_, plan.chunks, [&](int64_t worker, int64_t chunk) {
      S* rows =
          reinterpret_cast<S*>(static_cast<char*>(args_.workspace) + worker * plan.worker_bytes);
      const int64_t end = Min(plan.panels, (chunk + 1) * plan.chunk_panels);
      for (int64_t p = chunk * plan.chunk_panels; p < end; ++p) {
        const int64_t begin = p * plan.panel;
        const int64_t width = Min(plan.panel, args_.n - begin);
        CopyPanel(begin, width, rows);
        for (int64_t i = 0; i < width; i += kLine<S>) {
          for (int64_t g = 0; g < layout_.groups; ++g) {
            Tile(rows + i, g, begin + i, Min<int64_t>(kLine<S>, width - i));
          }
        }
      }
    });
  }

 private:
  S* Row(int64_t r) const { return static_cast<S*>(args_.basis) + r * args_.n; }

  // Entries as the tiles read them: for each group of new rows and each old row, four values.
  void PackEntries() {
    for (int64_t g = 0; g < layout_.groups; ++g) {
      for (int64_t i = 0; i < args_.used; ++i) {
        C* out = entries_ + (g * args_.used + i) * kEntry;
        for (int64_t k = 0; k < kTileRows; ++k) {
          const int64_t j = g * kTileRows + k;
          const double value = j < args_.kept ? args_.rotation[i * args_.rows + j] : 0.0;
          out[k] = C(value);
          if constexpr (kParts<S> == 2) out[kTileRows + k] = C(value - double(out[k]));
        }
      }
    }
  }

  void CopyPanel(int64_t begin, int64_t width, S* rows) const {
    const int64_t whole = width / kLine<S> * kLine<S>;
    for (int64_t r = 0; r < args_.used; ++r, rows += layout_.plan.stride) {
      const S* in = Row(r) + begin;
      for (int64_t i = 0; i < whole; i += kLine<S>) {
        __builtin_prefetch(in + i + layout_.plan.panel, 0, 2);
        __builtin_memcpy(rows + i, in + i, 64);
      }
      for (int64_t i = whole; i < width; ++i) rows[i] = in[i];
      for (int64_t i = width; i < RoundUp(width, kLine<S>); ++i) rows[i] = S{};
    }
  }

  // One cache line of four new rows.
  void Tile(const S* rows, int64_t group, int64_t at, int64_t width) const {
    constexpr int kVectors = kLine<S> / kLanes<C>;
    Vec<C> sum[kTileRows][kVectors] = {};
    const C* entry = entries_ + group * args_.used * kEntry;
    for (int64_t i = 0; i < args_.used; ++i, rows += layout_.plan.stride, entry += kEntry) {
      Vec<C> q[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) q[v] = LoadAs(rows + v * kLanes<C>);
#pragma GCC unroll 4
      for (int k = 0; k < kTileRows; ++k) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          sum[k][v] += entry[k] * q[v];
          if constexpr (kParts<S> == 2) sum[k][v] += entry[kTileRows + k] * q[v];
        }
      }
    }
    const int64_t count = Min<int64_t>(kTileRows, args_.kept - group * kTileRows);
    for (int64_t k = 0; k < count; ++k) {
      S* out = Row(group * kTileRows + k) + at;
      for (int v = 0; v < kVectors; ++v) {
        const int64_t left = width - v * kLanes<C>;
        if (left >= kLanes<C>) {
          StoreAs(out + v * kLanes<C>, sum[k][v]);
        } else if (left > 0) {
          StorePartial(out + v * kLanes<C>, left, sum[k][v]);
        }
      }
    }
  }

  const RotateBasisArgs& args_;
  const ParallelFor& pool_;
  const Layout layout_;
  C* entries_;
};

}  // namespace

int64_t RotateBasisWorkspaceBytes(const RotateBasisArgs& args, int64_t max_workers) {
  return Layout(args, max_workers).bytes;
}

void RotateBasis(const RotateBasisArgs& args, const ParallelFor& pool) {
  if (args.kept == 0 || args.n == 0) return;
  switch (args.dtype) {
    case DType::kF32:
      return Rotation<float>(args, pool).Run();
    case DType::kF64:
      return Rotation<double>(args, pool).Run();
    case DType::kBF16:
      return Rotation<BFloat16>(args, pool).Run();
    case DType::kF16:
      return Rotation<Half>(args, pool).Run();
  }
}

}  // namespace curvax::CURVAX_TARGET
