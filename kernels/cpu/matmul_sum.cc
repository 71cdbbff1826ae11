// Sums of matrix products, for the head of a language model: C = [C +] A_1 B_1 + A_2 B_2.
//
// Algorithm (Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", ACM TOMS
// 34(3), 2008). Operands are packed, kDepth of k at a time, into panels in the order that the
// innermost loop reads them, which multiplies a panel of kRows by one of kColumns with all sums in
// registers. Both terms run over the same tile of C while it is in cache, so a sum of two products
// costs no pass over C and no concatenated operand. Any strides: a transposed operand is transposed
// while it is packed. A head's products come in two kinds. Wide: one operand is small; it is packed
// once, for all tasks, and each task takes its share of the other's lines. Deep: a small C and a
// long k, which is cut in kSegments, summed apart and then together.
// Memory traffic: wide, every operand is read once and C written once, and read if added to; deep,
// A once for each column of tiles, B for each row, and kSegments sums of C written and read.
// Accumulation: in the dtype, kDepth products at a time in registers, then onto C or its segment.
// Determinism: the order of each sum depends on sizes alone, not on tiles or threads.
#include "cpu/matmul_sum.h"

#include "cpu/parallel.h"
#include "cpu/transpose.h"

namespace curvax::CURVAX_TARGET {
namespace {

// Registers hold kRows x kColumns sums, kVectors vectors of B and one element of A.
constexpr int kVectors = 2;
#if defined(__AVX512F__)
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif
template <typename T>
constexpr int kColumns = kVectors * kLanes<T>;

// Elements of k in a panel: kDepth x kColumns of B fill half of an L1 cache of 32 KB.
template <typename T>
constexpr int64_t kDepth = 1024 / sizeof(T);
// A tile's panels, (m + n) kDepth, fit an L2 cache of 512 KB. Smaller tiles only to occupy threads.
constexpr int64_t kLargestTile = 264, kSmallestTile = 48;
// An operand that is packed for all tasks takes at most so many bytes: it stays in L3.
constexpr int64_t kSharedBytes = int64_t{8} << 20;
constexpr int64_t kSegments = 8;

// Stores of whole vectors pass the end of a panel by less than this.
template <typename T>
constexpr int64_t kSlack = kLanes<T>;
template <typename T, int kWidth>
CURVAX_INLINE int64_t PanelStride() {
  return RoundUp(kDepth<T> * kWidth + kSlack<T>, 64 / sizeof(T));
}
// Of `lines` lines of an operand, one block of kDepth packed.
template <typename T, int kWidth>
CURVAX_INLINE int64_t BlockElements(int64_t lines) {
  return CeilDiv(lines, kWidth) * PanelStride<T, kWidth>();
}

enum class Shared { kNone, kA, kB };

// How the work is cut, and where the workspace has what.
template <typename T>
struct Plan {
  int64_t m, n;           // of a tile
  int64_t rows, columns;  // number of tiles
  int64_t blocks;         // of kDepth in k
  int64_t segments, segment_blocks;
  Shared shared;
  // Elements: of the shared operand's blocks, of a worker's panels, of the partial sums.
  int64_t shared_block, shared_elements, worker_a, worker_elements, partial_elements;

  Plan(const MatmulSumArgs& args, int64_t max_workers) {
    blocks = Max<int64_t>(1, CeilDiv(args.k, kDepth<T>));
    const int64_t a = BlockElements<T, kRows>(args.m), b = BlockElements<T, kColumns<T>>(args.n);
    const int64_t copies = args.batch * args.terms * blocks;
    shared = Min(a, b) * copies * int64_t{sizeof(T)} > kSharedBytes ? Shared::kNone
             : a < b                                                ? Shared::kA
                                                                    : Shared::kB;
    segments = shared == Shared::kNone && blocks >= 2 * kSegments
                   ? Max<int64_t>(1, kSegments / Max<int64_t>(1, args.batch))
                   : 1;
    segment_blocks = CeilDiv(blocks, segments);
    segments = CeilDiv(blocks, segment_blocks);
    CutTiles(args, max_workers);
    shared_block = shared == Shared::kA ? a : shared == Shared::kB ? b : 0;
    shared_elements = shared_block * copies;
    worker_a = shared == Shared::kA ? 0 : BlockElements<T, kRows>(m);
    worker_elements = worker_a + (shared == Shared::kB ? 0 : BlockElements<T, kColumns<T>>(n));
    partial_elements =
        segments > 1 ? RoundUp(segments * args.batch * args.m * args.n, 64 / sizeof(T)) : 0;
  }

  int64_t Bytes(int64_t max_workers) const {
    return (shared_elements + max_workers * worker_elements + partial_elements) *
           int64_t{sizeof(T)};
  }

 private:
  void CutTiles(const MatmulSumArgs& args, int64_t max_workers) {
    // The panels of a shared operand are not in L2 anyway.
    rows = shared == Shared::kA ? 1 : CeilDiv(args.m, kLargestTile);
    columns = shared == Shared::kB ? 1 : CeilDiv(args.n, kLargestTile);
    while (segments * rows * columns < max_workers) {
      const int64_t tall = args.m / rows, wide = args.n / columns;
      if (Max(tall, wide) < 2 * kSmallestTile) break;
      if (tall >= wide) {
        rows *= 2;
      } else {
        columns *= 2;
      }
    }
    m = RoundUp(CeilDiv(args.m, rows), kRows);
    n = RoundUp(CeilDiv(args.n, columns), kColumns<T>);
    rows = CeilDiv(args.m, m);
    columns = CeilDiv(args.n, n);
  }
};

// Lines of an operand, rows of A or columns of B: element p of line i at data[i * line + p * step].
template <typename T>
struct Lines {
  const T* data;
  int64_t line, step;
};

// dst[p * kWidth + i], by panels of kWidth lines; lines past `count` are 0.
template <int kWidth, typename T>
void Pack(Lines<T> from, int64_t count, int64_t depth, T* dst) {
  constexpr int kL = kLanes<T>;
  const int64_t stride = PanelStride<T, kWidth>();
  if (from.step != 1) {
    // Along the lines, for one p at a time: its elements are neighbours, or as good as any order.
    for (int64_t p = 0; p < depth; ++p) {
      const T* row = from.data + p * from.step;
      for (int64_t panel = 0; panel * kWidth < count; ++panel) {
        T* out = dst + panel * stride + p * kWidth;
        for (int g = 0; g < kWidth; g += kL) {
          const int64_t line = panel * kWidth + g;
          if (from.line == 1 && line + kL <= count) {
            // The vector may reach past kWidth; the next p, or the slack, takes what it spills.
            StoreVec(out + g, LoadVec(row + line));
          } else {
            for (int i = g; i < Min(g + kL, kWidth); ++i) {
              out[i] = panel * kWidth + i < count ? row[(panel * kWidth + i) * from.line] : T{0};
            }
          }
        }
      }
    }
    return;
  }
  for (int64_t panel = 0; panel * kWidth < count; ++panel) {
    const T* first = from.data + panel * kWidth * from.line;
    const int64_t lines = Min<int64_t>(kWidth, count - panel * kWidth);
    T* out = dst + panel * stride;
    int64_t p = 0;
    for (; p + kL <= depth; p += kL) {
      // Backwards: what the last vector of a p spills is overwritten by the first of the next.
      for (int g = RoundUp(kWidth, kL) - kL; g >= 0; g -= kL) {
        Vec<T> v[kL];
        for (int i = 0; i < kL; ++i) {
          v[i] = g + i < lines ? LoadVec(first + (g + i) * from.line + p) : Vec<T>{};
          __builtin_prefetch(first + (kWidth + g + i) * from.line + p);
        }
        Transpose<T>(v);
        for (int i = 0; i < kL; ++i) StoreVec(out + (p + i) * kWidth + g, v[i]);
      }
    }
    for (; p < depth; ++p) {
      for (int i = 0; i < kWidth; ++i) {
        out[p * kWidth + i] = i < lines ? first[i * from.line + p] : T{0};
      }
    }
  }
}

// c (kRows, kColumns) = [c +] a b, with a and b packed.
template <typename T>
void MultiplyPanels(int64_t depth, const T* a, const T* b, T* c, int64_t stride, bool add) {
  // C comes from memory at the end: asked for now, it arrives during the products.
  for (int i = 0; i < kRows; ++i) {
    __builtin_prefetch(c + i * stride, 1);
    __builtin_prefetch(c + i * stride + kColumns<T> - 1, 1);
  }
  Vec<T> sum[kRows][kVectors] = {};
#pragma GCC unroll 4
  for (int64_t p = 0; p < depth; ++p) {
    Vec<T> row[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) row[v] = LoadVec(b + v * kLanes<T>);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> x = Splat(a[i]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[i][v] += x * row[v];
    }
    a += kRows;
    b += kColumns<T>;
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      T* at = c + i * stride + v * kLanes<T>;
      if (add) sum[i][v] += LoadVec(at);
      StoreVec(at, sum[i][v]);
    }
  }
}

// The same where C has only `rows` and `columns` of the panels'.
template <typename T>
void MultiplyEdge(int64_t depth, const T* a, const T* b, T* c, int64_t stride, bool add,
                  int64_t rows, int64_t columns) {
  T whole[kRows * kColumns<T>];
  MultiplyPanels(depth, a, b, whole, kColumns<T>, false);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      T* at = c + i * stride + j;
      *at = whole[i * kColumns<T> + j] + (add ? *at : T{0});
    }
  }
}

// A tile of C, or of a segment's partial sums.
template <typename T>
struct Tile {
  int64_t m, n, stride;
  T* c;

  Tile At(int64_t offset) const { return {m, n, stride, c + offset}; }

  void Multiply(int64_t depth, const T* packed_a, const T* packed_b, bool add) const {
    // The panel of B stays in L1 while those of A pass by.
    for (int64_t j = 0; j < n; j += kColumns<T>) {
      const T* b = packed_b + BlockElements<T, kColumns<T>>(j);
      for (int64_t i = 0; i < m; i += kRows) {
        const T* a = packed_a + BlockElements<T, kRows>(i);
        T* at = c + i * stride + j;
        if (i + kRows <= m && j + kColumns<T> <= n) {
          MultiplyPanels(depth, a, b, at, stride, add);
        } else {
          MultiplyEdge(depth, a, b, at, stride, add, Min<int64_t>(kRows, m - i),
                       Min<int64_t>(kColumns<T>, n - j));
        }
      }
    }
  }
};

template <typename T>
class Sum {
 public:
  Sum(const MatmulSumArgs& args, const ParallelFor& pool)
      : args_(args), pool_(pool), plan_(args, pool.max_workers) {
    shared_ = static_cast<T*>(args.workspace);
    workers_ = shared_ + plan_.shared_elements;
    partial_ = workers_ + pool.max_workers * plan_.worker_elements;
  }

  void Run() {
    if (plan_.shared != Shared::kNone) PackShared();
    T* c = static_cast<T*>(args_.c);
    if (plan_.segments == 1) return Tiles(c, args_.add);
    Tiles(partial_, false);
    AddSegments(c);
  }

 private:
  int64_t Depth(int64_t block) const { return Min(kDepth<T>, args_.k - block * kDepth<T>); }
  T* SharedBlock(int64_t batch, int term, int64_t block) const {
    return shared_ + ((batch * args_.terms + term) * plan_.blocks + block) * plan_.shared_block;
  }
  // Lines of A are its rows, those of B its columns.
  void PackA(int64_t batch, int term, int64_t block, int64_t i, int64_t count, T* to) const {
    const MatrixBatch& a = args_.a[term];
    const T* data = static_cast<const T*>(a.data) + batch * a.batch + i * a.row;
    Pack<kRows, T>({data + block * kDepth<T> * a.column, a.row, a.column}, count, Depth(block), to);
  }
  void PackB(int64_t batch, int term, int64_t block, int64_t j, int64_t count, T* to) const {
    const MatrixBatch& b = args_.b[term];
    const T* data = static_cast<const T*>(b.data) + batch * b.batch + j * b.column;
    Pack<kColumns<T>, T>({data + block * kDepth<T> * b.row, b.column, b.row}, count, Depth(block),
                         to);
  }

  void PackShared() const {
    For(pool_, args_.batch * args_.terms * plan_.blocks, [&](int64_t, int64_t index) {
      const int64_t block = index % plan_.blocks, batch = index / plan_.blocks / args_.terms;
      const int term = static_cast<int>(index / plan_.blocks % args_.terms);
      T* to = SharedBlock(batch, term, block);
      if (plan_.shared == Shared::kA) {
        PackA(batch, term, block, 0, args_.m, to);
      } else {
        PackB(batch, term, block, 0, args_.n, to);
      }
    });
  }

  // Every tile of every segment's `to` (batch, m, n). A task takes its tile in the whole batch, so
  // that an operand that serves all of it is packed once.
  void Tiles(T* to, bool add) const {
    const int64_t tiles = plan_.rows * plan_.columns;
    For(pool_, plan_.segments * tiles, [&](int64_t worker, int64_t index) {
      const int64_t i = index % plan_.rows * plan_.m;
      const int64_t j = index / plan_.rows % plan_.columns * plan_.n;
      const int64_t segment = index / tiles;
      const Tile<T> tile{Min(plan_.m, args_.m - i), Min(plan_.n, args_.n - j), args_.n,
                         to + (segment * args_.batch * args_.m + i) * args_.n + j};
      RunTile(tile, worker, segment, i, j, add);
    });
  }

  void RunTile(const Tile<T>& tile, int64_t worker, int64_t segment, int64_t i, int64_t j,
               bool add) const {
    T* own_a = workers_ + worker * plan_.worker_elements;
    T* own_b = own_a + plan_.worker_a;
    const int64_t first = segment * plan_.segment_blocks;
    const int64_t end = Min(plan_.blocks, first + plan_.segment_blocks);
    for (int term = 0; term < args_.terms; ++term) {
      for (int64_t block = first; block < end; ++block) {
        for (int64_t batch = 0; batch < args_.batch; ++batch) {
          const T *a = own_a, *b = own_b;
          if (plan_.shared == Shared::kA) {
            a = SharedBlock(batch, term, block) + BlockElements<T, kRows>(i);
          } else if (batch == 0 || args_.a[term].batch != 0) {
            PackA(batch, term, block, i, tile.m, own_a);
          }
          if (plan_.shared == Shared::kB) {
            b = SharedBlock(batch, term, block) + BlockElements<T, kColumns<T>>(j);
          } else if (batch == 0 || args_.b[term].batch != 0) {
            PackB(batch, term, block, j, tile.n, own_b);
          }
          tile.At(batch * args_.m * args_.n).Multiply(Depth(block), a, b, add);
        }
        add = true;
      }
    }
  }

  void AddSegments(T* c) const {
    const int64_t size = args_.batch * args_.m * args_.n;
    For(pool_, args_.batch * args_.m, [&](int64_t, int64_t i) {
      for (int64_t j = i * args_.n; j < (i + 1) * args_.n; ++j) {
        T sum = args_.add ? c[j] : T{0};
        for (int64_t s = 0; s < plan_.segments; ++s) sum += partial_[s * size + j];
        c[j] = sum;
      }
    });
  }

  const MatmulSumArgs& args_;
  const ParallelFor& pool_;
  const Plan<T> plan_;
  T *shared_, *workers_, *partial_;
};

// Without elements of C there is nothing to cut into tiles.
bool Empty(const MatmulSumArgs& args) { return args.batch == 0 || args.m == 0 || args.n == 0; }

}  // namespace

int64_t MatmulSumWorkspaceBytes(const MatmulSumArgs& args, int64_t max_workers) {
  if (Empty(args)) return 0;
  if (args.dtype == DType::kF64) return Plan<double>(args, max_workers).Bytes(max_workers);
  return Plan<float>(args, max_workers).Bytes(max_workers);
}

void MatmulSum(const MatmulSumArgs& args, const ParallelFor& pool) {
  if (Empty(args)) return;
  if (args.dtype == DType::kF64) return Sum<double>(args, pool).Run();
  return Sum<float>(args, pool).Run();
}

}  // namespace curvax::CURVAX_TARGET
