// Inner products, in float64, of stored rows or of linear combinations of them.
//
// Algorithm: panels of all rows are widened into scratch that stays in L1, combinations of them are
// formed beside them, and the products are taken of what lies there. Every row is read from memory
// once, as it is stored. Accumulation: products and sums in double, first within a lane of a panel,
// then across panels, then across chunks, so that the longest sum in a row has about a thousand
// terms. Products of two numbers of at most float32 are exact. Determinism: bitwise equal for any
// thread count; chunks have their own sums, combined in the order of their index, and borders
// depend on sizes alone.
#include "cpu/inner_products.h"

#include "cpu/convert.h"
#include "cpu/parallel.h"

namespace curvax::CURVAX_TARGET {
namespace {

// Vectors in a step of a loop over a panel: as many sums as hide the latency of an addition.
constexpr int kUnroll = 4;
constexpr int64_t kStep = kUnroll * kLanes<double>;
// Right-hand sides that share the loads of a left-hand side.
constexpr int kMaxTogether = 4;

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
  int64_t rows, products;
  int64_t panel, panels;         // elements in a panel, and their number
  int64_t chunk_panels, chunks;  // panels in a chunk
  int64_t stride;                // doubles between vectors in scratch: equal offsets share no set
  int64_t combined;              // where the combinations begin in scratch
  int64_t worker_bytes, sums, terms, term_ends, bytes;

  Layout(const InnerProductsArgs& args, int64_t max_workers) {
    // Sums of chunks take 8 MB at most, but where 16 chunks need more.
    constexpr int64_t kL1Bytes = 28 << 10, kMaxChunks = 256, kFewChunks = 16;
    constexpr int64_t kSums = int64_t{1} << 20;
    rows = CountRows(args);
    products = CountProducts(args);
    const int64_t vectors = Max<int64_t>(1, rows + args.combinations);
    const int64_t fitting = kL1Bytes / int64_t{sizeof(double)} / vectors;
    panel = Max<int64_t>(64, Min<int64_t>(fitting, 1024) / 64 * 64);
    panels = CeilDiv(args.n, panel);
    const int64_t most = Max(kFewChunks, Min(kMaxChunks, kSums / Max<int64_t>(1, products)));
    chunk_panels = Max<int64_t>(1, CeilDiv(panels, most));
    chunks = CeilDiv(panels, chunk_panels);
    stride = panel + 8;
    combined = rows * stride;
    worker_bytes = RoundUp(vectors * stride * int64_t{sizeof(double)}, 64);
    sums = max_workers * worker_bytes;
    terms = sums + RoundUp(chunks * products * int64_t{sizeof(double)}, 64);
    term_ends = terms + RoundUp(args.combinations * rows * int64_t{sizeof(int64_t)}, 64);
    bytes = term_ends + RoundUp((args.combinations + rows) * int64_t{sizeof(int64_t)}, 64);
  }
};

CURVAX_INLINE void WidenTo(double* out, Vec<double> v) { StoreVec(out, v); }
CURVAX_INLINE void WidenTo(double* out, Vec<float> v) {
  using Half = MatchingVector<float, double>::type;
  struct Halves {
    Half part[2];
  };
  const Halves halves = BitCast<Halves>(v);
  StoreVec(out, __builtin_convertvector(halves.part[0], Vec<double>));
  StoreVec(out + kLanes<double>, __builtin_convertvector(halves.part[1], Vec<double>));
}

// `width` elements as doubles, and zeros up to `padded`; what stands `ahead` is wanted next.
template <typename S>
void Widen(const void* row, int64_t begin, int64_t width, int64_t padded, int64_t ahead,
           double* out) {
  using C = Compute<S>;
  const S* in = static_cast<const S*>(row) + begin;
  const int64_t whole = width / kLanes<C> * kLanes<C>;
  for (int64_t i = 0; i < whole; i += kLanes<C>) {
    __builtin_prefetch(in + i + ahead);
    WidenTo(out + i, LoadAs(in + i));
  }
  for (int64_t i = whole; i < padded; i += kLanes<C>) {
    WidenTo(out + i, LoadPartial(in + i, Max<int64_t>(0, width - i), C{0}));
  }
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
      : args_(args),
        pool_(pool),
        layout_(args, pool.max_workers),
        memory_(static_cast<char*>(args.workspace)),
        terms_(At<int64_t>(layout_.terms)),
        term_ends_(At<int64_t>(layout_.term_ends)),
        unread_(term_ends_ + args.combinations) {}

  void All() {
    ListTerms();
    double* sums = At<double>(layout_.sums);
    For(pool_, layout_.chunks, [&](int64_t worker, int64_t chunk) {
      double* scratch = At<double>(worker * layout_.worker_bytes);
      double* own = sums + chunk * layout_.products;
      for (int64_t i = 0; i < layout_.products; ++i) own[i] = 0;
      const int64_t end = Min(layout_.panels, (chunk + 1) * layout_.chunk_panels);
      for (int64_t p = chunk * layout_.chunk_panels; p < end; ++p) {
        const int64_t begin = p * layout_.panel, width = Min(layout_.panel, args_.n - begin);
        const int64_t padded = RoundUp(width, kStep);
        Load(begin, width, padded, scratch);
        Combine(padded, scratch);
        Products(padded, scratch + (args_.combinations > 0 ? layout_.combined : 0), own);
      }
    });
    for (int64_t i = 0; i < layout_.products; ++i) args_.products[i] = 0;
    for (int64_t chunk = 0; chunk < layout_.chunks; ++chunk) {
      const double* own = sums + chunk * layout_.products;
      for (int64_t i = 0; i < layout_.products; ++i) args_.products[i] += own[i];
    }
  }

 private:
  template <typename T>
  T* At(int64_t offset) const {
    return reinterpret_cast<T*>(memory_ + offset);
  }
  double Coefficient(int64_t combination, int64_t row) const {
    return args_.coefficients[combination * layout_.rows + row];
  }

  // Which rows each combination has, and which rows none has.
  void ListTerms() {
    int64_t count = 0;
    for (int64_t r = 0; r < layout_.rows; ++r) unread_[r] = args_.combinations > 0;
    for (int64_t c = 0; c < args_.combinations; ++c) {
      for (int64_t r = 0; r < layout_.rows; ++r) {
        if (Coefficient(c, r) == 0) continue;
        terms_[count++] = r;
        unread_[r] = 0;
      }
      term_ends_[c] = count;
    }
  }

  void Load(int64_t begin, int64_t width, int64_t padded, double* scratch) const {
    int64_t row = 0;
    for (int s = 0; s < args_.num_sets; ++s) {
      const RowSet& set = args_.sets[s];
      for (int64_t r = 0; r < set.count; ++r, ++row) {
        if (unread_[row]) continue;
        LoadRow(set, r * set.stride, begin, width, padded, scratch + row * layout_.stride);
      }
    }
  }
  void LoadRow(const RowSet& set, int64_t offset, int64_t begin, int64_t width, int64_t padded,
               double* out) const {
    const int64_t at = offset + begin, ahead = layout_.panel;
    switch (set.dtype) {
      case DType::kF32:
        return Widen<float>(set.rows, at, width, padded, ahead, out);
      case DType::kF64:
        return Widen<double>(set.rows, at, width, padded, ahead, out);
      case DType::kBF16:
        return Widen<BFloat16>(set.rows, at, width, padded, ahead, out);
      case DType::kF16:
        return Widen<Half>(set.rows, at, width, padded, ahead, out);
    }
  }

  void Combine(int64_t padded, double* scratch) const {
    int64_t first = 0;
    for (int64_t c = 0; c < args_.combinations; ++c) {
      double* out = scratch + layout_.combined + c * layout_.stride;
      for (int64_t i = 0; i < padded; i += kStep) {
        Vec<double> sum[kUnroll] = {};
        for (int64_t t = first; t < term_ends_[c]; ++t) {
          const double factor = Coefficient(c, terms_[t]);
          const double* in = scratch + terms_[t] * layout_.stride + i;
#pragma GCC unroll 4
          for (int u = 0; u < kUnroll; ++u) sum[u] += factor * LoadVec(in + u * kLanes<double>);
        }
#pragma GCC unroll 4
        for (int u = 0; u < kUnroll; ++u) StoreVec(out + i + u * kLanes<double>, sum[u]);
      }
      first = term_ends_[c];
    }
  }

  void Products(int64_t padded, const double* y, double* out) const {
    const int64_t stride = layout_.stride;
    for (int64_t r = 0; r < args_.num_runs; ++r) {
      const ProductRun& run = args_.runs[r];
      const double* left = y + run.first * stride;
      for (int64_t j = 0; j < run.count;) {
        const double* right = y + (run.begin + j) * stride;
        const int64_t together = Min<int64_t>(kMaxTogether, run.count - j);
        if (together == 4) Dot<4>(left, right, stride, padded, out);
        if (together == 3) Dot<3>(left, right, stride, padded, out);
        if (together == 2) Dot<2>(left, right, stride, padded, out);
        if (together == 1) Dot<1>(left, right, stride, padded, out);
        out += together;
        j += together;
      }
    }
  }

  const InnerProductsArgs& args_;
  const ParallelFor& pool_;
  const Layout layout_;
  char* const memory_;
  int64_t *const terms_, *const term_ends_, *const unread_;
};

}  // namespace

int64_t InnerProductsWorkspaceBytes(const InnerProductsArgs& args, int64_t max_workers) {
  return Layout(args, max_workers).bytes;
}

void InnerProducts(const InnerProductsArgs& args, const ParallelFor& pool) {
  Run(args, pool).All();
}

}  // namespace curvax::CURVAX_TARGET
