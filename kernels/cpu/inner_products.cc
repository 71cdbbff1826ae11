// Inner products, in float64, of stored rows.
//
// Algorithm: panels of all rows are widened into scratch that stays in L1, and the products are
// taken of what lies there. Every row is read from memory once, as it is stored. Accumulation:
// products and sums in double, first within a lane of a panel, then across panels, then across
// chunks, so that the longest of these sums has about a thousand terms for 1e8 elements. Products
// of numbers of at most float32 are exact. Determinism: bitwise equal for any thread count
// (chunks.h).
#include "cpu/inner_products.h"

#include "cpu/chunks.h"
#include "cpu/convert.h"
#include "cpu/parallel.h"

namespace curvax::CURVAX_TARGET {
namespace {

// Vectors in a step of a loop over a panel: as many sums as hide the latency of an addition.
constexpr int kUnroll = 4;
constexpr int64_t kStep = kUnroll * kLanes<double>;

CURVAX_INLINE int64_t CountRows(const InnerProductsArgs& args) {
  int64_t rows = 0;
  for (int s = 0; s < args.num_sets; ++s) rows += args.sets[s].count;
  return rows;
}
CURVAX_INLINE int64_t CountProducts(const InnerProductsArgs& args) {
  int64_t products = 0;
  for (int64_t r = 0; r < args.num_runs; ++r) products += args.runs[r].count;
  return products;
}

// How the work is divided, and where everything lies in the workspace.
struct Layout {
  static constexpr int64_t kL1Doubles = (28 << 10) / sizeof(double);

  int64_t rows, products;
  Chunks chunks;
  int64_t stride;  // doubles between rows in scratch: equal offsets share no set
  int64_t worker_bytes, sums, bytes;

  Layout(const InnerProductsArgs& args, int64_t max_workers)
      : rows(CountRows(args)),
        products(CountProducts(args)),
        chunks(args.n, kL1Doubles / rows, products) {
    stride = chunks.panel + 8;
    worker_bytes = RoundUp(rows * stride * int64_t{sizeof(double)}, 64);
    sums = max_workers * worker_bytes;
    bytes = sums + chunks.count * products * int64_t{sizeof(double)};
  }
};

// `width` elements as doubles, and zeros up to `padded`; what stands `ahead` is wanted next.
template <typename S>
void Copy(const S* in, int64_t width, int64_t padded, int64_t ahead, double* out) {
  const int64_t whole = width / kLanes<double> * kLanes<double>;
  for (int64_t i = 0; i < whole; i += kLanes<double>) {
    __builtin_prefetch(in + i + ahead);
    StoreVec(out + i, LoadWide(in + i));
  }
  for (int64_t i = whole; i < padded; ++i) out[i] = i < width ? double{Widen(in[i])} : 0;
}

// out[j] += <x, y_j> for B vectors y_j, `stride` apart.
template <int B>
void Dot(const double* x, const double* y, int64_t stride, int64_t padded, double* out) {
  constexpr int kSums = B == 1 ? kUnroll : B == 2 ? 2 : 1;  // of one product
  Vec<double> sum[B][kSums] = {};
  for (int64_t i = 0; i < padded; i += kSums * kLanes<double>) {
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) {
      const int64_t at = i + s * kLanes<double>;
      const Vec<double> left = LoadVec(x + at);
#pragma GCC unroll 4
      for (int j = 0; j < B; ++j) sum[j][s] += left * LoadVec(y + j * stride + at);
    }
  }
  for (int j = 0; j < B; ++j) {
    for (int s = 1; s < kSums; ++s) sum[j][0] += sum[j][s];
    out[j] += SumLanes(sum[j][0]);
  }
}

class Run {
 public:
  Run(const InnerProductsArgs& args, const ParallelFor& pool)
      : args_(args), pool_(pool), layout_(args, pool.max_workers) {}

  void All() const {
    char* memory = static_cast<char*>(args_.workspace);
    double* sums = reinterpret_cast<double*>(memory + layout_.sums);
    For(pool_, layout_.chunks.count, [&](int64_t worker, int64_t chunk) {
      double* scratch = reinterpret_cast<double*>(memory + worker * layout_.worker_bytes);
      double* own = sums + chunk * layout_.products;
      for (int64_t i = 0; i < layout_.products; ++i) own[i] = 0;
      layout_.chunks.ForPanels(chunk, [&](int64_t begin, int64_t width) {
        const int64_t padded = RoundUp(width, kStep);
        Load(begin, width, padded, scratch);
        AddProducts(padded, scratch, own);
      });
    });
    layout_.chunks.Combine(sums, layout_.products, args_.products);
  }

 private:
  void Load(int64_t begin, int64_t width, int64_t padded, double* scratch) const {
    for (int s = 0; s < args_.num_sets; ++s) {
      const RowSet& set = args_.sets[s];
      for (int64_t r = 0; r < set.count; ++r, scratch += layout_.stride) {
        LoadRow(set, r * set.stride + begin, width, padded, scratch);
      }
    }
  }
  void LoadRow(const RowSet& set, int64_t at, int64_t width, int64_t padded, double* out) const {
    const int64_t ahead = layout_.chunks.panel;
    switch (set.dtype) {
      case DType::kF32:
        return Copy(static_cast<const float*>(set.rows) + at, width, padded, ahead, out);
      case DType::kF64:
        return Copy(static_cast<const double*>(set.rows) + at, width, padded, ahead, out);
      case DType::kBF16:
        return Copy(static_cast<const BFloat16*>(set.rows) + at, width, padded, ahead, out);
      case DType::kF16:
        return Copy(static_cast<const Half*>(set.rows) + at, width, padded, ahead, out);
    }
  }

  // Four right-hand sides share the loads of a left-hand side.
  void AddProducts(int64_t padded, const double* rows, double* out) const {
    const int64_t stride = layout_.stride;
    for (int64_t r = 0; r < args_.num_runs; ++r) {
      const ProductRun& run = args_.runs[r];
      const double *x = rows + run.first * stride, *y = rows + run.begin * stride;
      int64_t left = run.count;
      for (; left >= 4; left -= 4, y += 4 * stride, out += 4) Dot<4>(x, y, stride, padded, out);
      if (left == 3) Dot<3>(x, y, stride, padded, out);
      if (left == 2) Dot<2>(x, y, stride, padded, out);
      if (left == 1) Dot<1>(x, y, stride, padded, out);
      out += left;
    }
  }

  const InnerProductsArgs& args_;
  const ParallelFor& pool_;
  const Layout layout_;
};

}  // namespace

int64_t InnerProductsWorkspaceBytes(const InnerProductsArgs& args, int64_t max_workers) {
  return Layout(args, max_workers).bytes;
}

void InnerProducts(const InnerProductsArgs& args, const ParallelFor& pool) {
  Run(args, pool).All();
}

}  // namespace curvax::CURVAX_TARGET
