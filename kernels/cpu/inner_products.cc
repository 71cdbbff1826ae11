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
// Right-hand sides that share the loads of a left-hand side, and terms that share those of a sum.
constexpr int kMaxTogether = 4;

template <int value_>
struct Number {
  static constexpr int value = value_;
};
// Calls f(Number<count>{}), for 1 <= count <= kMaxTogether.
template <typename F>
CURVAX_INLINE void WithCount(int64_t count, const F& f) {
  if (count == 1) return f(Number<1>{});
  if (count == 2) return f(Number<2>{});
  if (count == 3) return f(Number<3>{});
  f(Number<kMaxTogether>{});
}

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

// What a combination has of one row.
struct Term {
  int64_t row;
  double factor;
};

// How the work is divided, and where everything lies in the workspace.
struct Layout {
  int64_t rows, vectors, products;
  int64_t panel, panels;         // elements in a panel, and their number
  int64_t chunk_panels, chunks;  // panels in a chunk
  int64_t stride;                // doubles between vectors in scratch: equal offsets share no set
  int64_t worker_bytes, pointers, sums, terms, term_ends, read, bytes;

  Layout(const InnerProductsArgs& args, int64_t max_workers) {
    // Sums of chunks take 8 MB at most, but where 16 chunks need more.
    constexpr int64_t kL1Bytes = 28 << 10, kMaxChunks = 256, kFewChunks = 16;
    constexpr int64_t kSums = int64_t{1} << 20;
    rows = CountRows(args);
    products = CountProducts(args);
    vectors = rows + args.combinations;
    const int64_t fitting = kL1Bytes / int64_t{sizeof(double)} / vectors;
    panel = Max<int64_t>(64, Min<int64_t>(fitting, 1024) / 64 * 64);
    panels = CeilDiv(args.n, panel);
    const int64_t most = Max(kFewChunks, Min(kMaxChunks, kSums / Max<int64_t>(1, products)));
    chunk_panels = Max<int64_t>(1, CeilDiv(panels, most));
    chunks = CeilDiv(panels, chunk_panels);
    stride = panel + 8;
    int64_t at = 0;
    const auto take = [&at](int64_t count, int64_t size) {
      const int64_t begin = at;
      at = RoundUp(at + count * size, 64);
      return begin;
    };
    worker_bytes = RoundUp(vectors * stride * int64_t{sizeof(double)}, 64);
    take(max_workers, worker_bytes);
    pointers = take(max_workers * vectors, sizeof(double*));
    sums = take(chunks * products, sizeof(double));
    terms = take(args.combinations * rows, sizeof(Term));
    term_ends = take(args.combinations, sizeof(int64_t));
    read = take(rows, sizeof(bool));
    bytes = at;
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

// out = sum of T vectors times factors, added to what `out` holds if `add`.
template <int T>
void Combine(const double* const* vectors, const double* factors, bool add, int64_t padded,
             double* out) {
  const double* in[T];
  Vec<double> factor[T];
  for (int t = 0; t < T; ++t) {
    in[t] = vectors[t];
    factor[t] = Splat(factors[t]);
  }
  for (int64_t i = 0; i < padded; i += kLanes<double>) {
    Vec<double> sum = add ? LoadVec(out + i) : Vec<double>{};
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) sum += factor[t] * LoadVec(in[t] + i);
    StoreVec(out + i, sum);
  }
}

// out[j] += <x, y_j> for B vectors y_j.
template <int B>
void Dot(const double* x, const double* const* vectors, int64_t padded, double* out) {
  constexpr int kSums = B == 1 ? kUnroll : B == 2 ? 2 : 1;  // of one product
  const double* y[B];
  for (int j = 0; j < B; ++j) y[j] = vectors[j];
  Vec<double> sum[B][kSums] = {};
  for (int64_t i = 0; i < padded; i += kSums * kLanes<double>) {
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) {
      const int64_t at = i + s * kLanes<double>;
      const Vec<double> left = LoadVec(x + at);
#pragma GCC unroll 4
      for (int j = 0; j < B; ++j) sum[j][s] += left * LoadVec(y[j] + at);
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
        terms_(At<Term>(layout_.terms)),
        term_ends_(At<int64_t>(layout_.term_ends)),
        read_(At<bool>(layout_.read)) {}

  void All() {
    ListTerms();
    double* sums = At<double>(layout_.sums);
    For(pool_, layout_.chunks, [&](int64_t worker, int64_t chunk) {
      const Panel scratch = {At<double>(worker * layout_.worker_bytes),
                             At<const double*>(layout_.pointers) + worker * layout_.vectors};
      double* own = sums + chunk * layout_.products;
      for (int64_t i = 0; i < layout_.products; ++i) own[i] = 0;
      const int64_t end = Min(layout_.panels, (chunk + 1) * layout_.chunk_panels);
      for (int64_t p = chunk * layout_.chunk_panels; p < end; ++p) {
        const int64_t begin = p * layout_.panel, width = Min(layout_.panel, args_.n - begin);
        const int64_t padded = RoundUp(width, kStep);
        Load(begin, width, padded, scratch);
        CombineAll(padded, scratch);
        const bool combined = args_.combinations > 0;
        Products(padded, scratch.vectors + (combined ? layout_.rows : 0), own);
      }
    });
    for (int64_t i = 0; i < layout_.products; ++i) args_.products[i] = 0;
    for (int64_t chunk = 0; chunk < layout_.chunks; ++chunk) {
      const double* own = sums + chunk * layout_.products;
      for (int64_t i = 0; i < layout_.products; ++i) args_.products[i] += own[i];
    }
  }

 private:
  // A worker's scratch: elements, and where those of each row and of each combination lie.
  struct Panel {
    double* elements;
    const double** vectors;
  };

  template <typename T>
  T* At(int64_t offset) const {
    return reinterpret_cast<T*>(memory_ + offset);
  }

  // Which rows each combination has, and which rows are read at all.
  void ListTerms() {
    int64_t count = 0;
    for (int64_t r = 0; r < layout_.rows; ++r) read_[r] = args_.combinations == 0;
    for (int64_t c = 0; c < args_.combinations; ++c) {
      for (int64_t r = 0; r < layout_.rows; ++r) {
        const double factor = args_.coefficients[c * layout_.rows + r];
        if (factor == 0) continue;
        terms_[count++] = {r, factor};
        read_[r] = true;
      }
      term_ends_[c] = count;
    }
  }

  void Load(int64_t begin, int64_t width, int64_t padded, const Panel& scratch) const {
    int64_t row = 0;
    for (int s = 0; s < args_.num_sets; ++s) {
      const RowSet& set = args_.sets[s];
      for (int64_t r = 0; r < set.count; ++r, ++row) {
        double* out = scratch.elements + row * layout_.stride;
        scratch.vectors[row] = out;
        if (read_[row]) LoadRow(set, r * set.stride + begin, width, padded, out);
      }
    }
  }
  void LoadRow(const RowSet& set, int64_t at, int64_t width, int64_t padded, double* out) const {
    const int64_t ahead = layout_.panel;
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

  void CombineAll(int64_t padded, const Panel& scratch) const {
    int64_t first = 0;
    for (int64_t c = 0; c < args_.combinations; ++c) {
      const int64_t place = layout_.rows + c, count = term_ends_[c] - first;
      const Term* terms = terms_ + first;
      first = term_ends_[c];
      if (count == 1 && terms[0].factor == 1) {
        scratch.vectors[place] = scratch.vectors[terms[0].row];
        continue;
      }
      double* out = scratch.elements + place * layout_.stride;
      scratch.vectors[place] = out;
      if (count == 0) {
        for (int64_t i = 0; i < padded; ++i) out[i] = 0;
      }
      for (int64_t t = 0; t < count; t += kMaxTogether) {
        const double* in[kMaxTogether];
        double factors[kMaxTogether];
        const int64_t together = Min<int64_t>(kMaxTogether, count - t);
        for (int64_t k = 0; k < together; ++k) {
          in[k] = scratch.vectors[terms[t + k].row];
          factors[k] = terms[t + k].factor;
        }
        WithCount(together, [&](auto number) {
          Combine<decltype(number)::value>(in, factors, t > 0, padded, out);
        });
      }
    }
  }

  void Products(int64_t padded, const double* const* y, double* out) const {
    for (int64_t r = 0; r < args_.num_runs; ++r) {
      const ProductRun& run = args_.runs[r];
      for (int64_t j = 0; j < run.count; j += kMaxTogether) {
        const int64_t together = Min<int64_t>(kMaxTogether, run.count - j);
        WithCount(together, [&](auto number) {
          Dot<decltype(number)::value>(y[run.first], y + run.begin + j, padded, out);
        });
        out += together;
      }
    }
  }

  const InnerProductsArgs& args_;
  const ParallelFor& pool_;
  const Layout layout_;
  char* const memory_;
  Term* const terms_;
  int64_t* const term_ends_;
  bool* const read_;
};

}  // namespace

int64_t InnerProductsWorkspaceBytes(const InnerProductsArgs& args, int64_t max_workers) {
  return Layout(args, max_workers).bytes;
}

void InnerProducts(const InnerProductsArgs& args, const ParallelFor& pool) {
  Run(args, pool).All();
}

}  // namespace curvax::CURVAX_TARGET
