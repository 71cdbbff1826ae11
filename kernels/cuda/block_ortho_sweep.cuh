// One sweep of block_ortho on a GPU, panel by panel: K1 to K3, the work of one block of threads.
//
// block_ortho.cuh describes the algorithm, the bytes that it moves and its determinism.
#ifndef CURVAX_CUDA_BLOCK_ORTHO_SWEEP_CUH_
#define CURVAX_CUDA_BLOCK_ORTHO_SWEEP_CUH_

#include <type_traits>

#include "common/block_ortho_pass.h"
#include "cuda/device.cuh"
#include "cuda/panel.cuh"
#include "cuda/row_sums.cuh"
#include "cuda/row_update.cuh"
#include "cuda/shapes.h"
#include "cuda/tensor_update.cuh"

namespace curvax::CURVAX_TARGET {

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
  SweepShape shape;
  bool basis_aligned, w_aligned;  // so that 16 bytes of a row can be copied at once
  double* partial;                // (blocks, sums)
  double* measured;               // (sums)
  double* left;                   // (rows, b)
  void *a, *mix;                  // (rows, PaddedColumns(b)) and (b, b) of the compute type
};

// One panel after another of one block of threads, each of which is loaded while the one before is
// used. All rows are in a panel if they fit; otherwise a group of them is, and an update that is
// followed by a measurement goes through the groups twice.
template <typename S, int B>
class SweepBlock {
 public:
  using C = Compute<S>;
  static constexpr bool kTensor = kOnTensorCores<S, B>;
  using Rows = Panel<S, kTensor>;
  using Block = Panel<C, kTensor>;
  using Worker = std::conditional_t<kTensor, TensorWorker<S>, ThreadWorker>;

  __device__ explicit SweepBlock(const BlockOrthoLaunch& launch)
      : launch_(launch),
        m_(static_cast<int>(launch.device->state.used)),
        rows_(m_),
        worker_(launch.shape) {}

  // K1, and the largest element of each column.
  __device__ void Measure() {
    BlockMaxima<C> maxima;
    ClearSums();
    ForItems(false, [&](const Item& item, const Rows&) {
      if (item.part == 0) maxima.Raise(W(item), columns(), log_panel());
      return true;
    });
    maxima.Store(Total(m_ + columns()), columns());
  }

  // K2 or K3. The old block times mix, what is left of a column after it has been scaled, or random
  // numbers, plus the basis times a.
  __device__ void Update(NextSweep what) {
    const bool measure = !Stores(what), update = what != NextSweep::kScale;
    if (what == NextSweep::kStoreMixed) rows_ = 0;
    if (measure) ClearSums();
    if (update && groups() == 1) LoadFactors(0);
    if (update) LoadMix();
    const bool random = update && AnyDying();
    ForItems(update && measure, [&](const Item& item, const Rows& rows) {
      if (item.part == 0 && !update) Scale(item);
      if (item.part == 0 && random) Randomise(item);
      if (update && item.part < groups()) AddRows(item, rows, !measure);
      return measure && item.part >= Parts(update) - groups();
    });
    if (!measure) ClearPadding();
  }

 private:
  // A group of rows of a panel, or for a second time: the part-th of the count-th panel of this
  // block of threads.
  struct Item {
    int count, part;
  };

  // Of the launch: these take no registers.
  __device__ int64_t n() const { return launch_.args.n; }
  __device__ int64_t stride() const { return launch_.args.stride; }
  __device__ int columns() const { return launch_.shape.columns; }
  __device__ int padded() const { return launch_.shape.tiles * B; }
  __device__ int log_panel() const { return launch_.shape.log_panel; }
  __device__ int log_strips() const { return log_panel() - Panel<C>::kLogStrip; }
  __device__ int panel() const { return 1 << launch_.shape.log_panel; }
  __device__ int group() const { return launch_.shape.group; }
  __device__ int groups() const { return launch_.shape.groups; }

  __device__ C* Column(int64_t c) const { return static_cast<C*>(launch_.args.w) + c * n(); }
  __device__ const S* Row(int64_t r) const {
    return static_cast<const S*>(launch_.args.basis) + r * stride();
  }
  __device__ S* NewRow(int64_t c) const {
    return static_cast<S*>(launch_.args.basis) + (m_ + c) * stride();
  }
  // The sums that begin with those of a row.
  __device__ double* Total(int64_t row) const {
    return launch_.partial + BlockIndex() * launch_.sums + row * columns();
  }
  template <typename T>
  __device__ static T* Shared(int begin) {
    return reinterpret_cast<T*>(SharedMemory() + begin);
  }
  __device__ Rows RowsOf(int stage) const {
    const int apart = launch_.shape.strip;
    return {Shared<S>(0) + stage * (apart << log_strips()), apart};
  }
  __device__ Block W(const Item& item) const {
    const int apart = padded() * Panel<C>::kStrip;
    const int stage = item.count & (launch_.shape.stages - 1);
    return {Shared<C>(launch_.shape.w_begin) + stage * (apart << log_strips()), apart};
  }
  // (row of the group, column), then those of the block itself.
  __device__ C* Factors() const { return Shared<C>(launch_.shape.factors_begin); }
  __device__ C* Mix() const { return Factors() + launch_.shape.factor_rows * padded(); }
  // What the first sharer adds to the block, followed by what the others do.
  __device__ Block Exchange() const {
    return {Shared<C>(launch_.shape.exchange_begin), padded() * Panel<C>::kStrip};
  }

  // This thread's element of the panel in work that is element by element, and its first row; the
  // rows of its others are RowStep apart.
  __device__ int Element() const { return ThreadIndex() & (panel() - 1); }
  __device__ int FirstRow() const { return ThreadIndex() >> log_panel(); }
  __device__ int RowStep() const { return kSweepThreads >> log_panel(); }

  // Of a panel, where groups are gone through twice.
  __device__ int Parts(bool twice) const { return groups() == 1 ? 1 : groups() << int{twice}; }
  __device__ int FirstOfGroup(const Item& item) const {
    return (item.part < groups() ? item.part : item.part - groups()) * group();
  }
  __device__ int GroupRows(const Item& item) const {
    return Min(group(), rows_ - FirstOfGroup(item));
  }
  __device__ int64_t Begin(const Item& item) const {
    return (BlockIndex() + item.count * launch_.blocks) << log_panel();
  }

  // They are added to after the next barrier.
  __device__ void ClearSums() const {
    double* sums = Total(0);
    for (int64_t e = ThreadIndex(); e < launch_.sums; e += BlockSize()) sums[e] = 0;
  }

  // Calls use(item, rows) for this block's panels, or twice for every group of rows; then, where
  // that says so, adds the item's <q_r, w_c> and <w_k, w_c> to the block's sums.
  template <typename F>
  __device__ __forceinline__ void ForItems(bool twice, const F& use) {
    const SweepShape& shape = launch_.shape;
    // The sums of other rounds or groups are in the same registers.
    const bool keep_products = Parts(twice) == 1 && shape.products.rounds <= 1;
    const bool keep_gram = shape.gram.rounds == 1;
    if constexpr (kTensor) {
      TensorSums<S> sums(worker_, shape);
      ForPanels(twice, use, [&](const Item& item, const Rows& rows, bool flush) {
        const int count = GroupRows(item), gram_rows = FirstOfGroup(item) == 0 ? columns() : 0;
        int round = 0;
#pragma unroll 1
        do {
          sums.Add(rows, count, W(item), gram_rows, round);
          if (!keep_products || flush) sums.FlushProducts(Total(FirstOfGroup(item)), count, round);
          if (!keep_gram || flush) sums.FlushGram(Total(m_), gram_rows, round);
        } while (++round < Max(shape.products.rounds, shape.gram.rounds));
      });
    } else {
      RowSums<S, kSumRows<C, B>, B> products;
      RowSums<C, kGramRows, B> gram;
      ForPanels(twice, use, [&](const Item& item, const Rows& rows, bool flush) {
        const int count = GroupRows(item);
        int round = 0;
#pragma unroll 1
        do {
          products.Add(shape.products, log_panel(), rows, count, W(item), round);
          if (!keep_products || flush) {
            products.Flush(shape.products, Total(FirstOfGroup(item)), count, columns(), round);
          }
        } while (++round < shape.products.rounds);
        if (FirstOfGroup(item) != 0) return;
        round = 0;
#pragma unroll 1
        do {
          gram.Add(shape.gram, log_panel(), W(item), columns(), W(item), round);
          if (!keep_gram || flush) gram.Flush(shape.gram, Total(m_), columns(), columns(), round);
        } while (++round < shape.gram.rounds);
      });
    }
  }
  // Where use(item, rows) is true, calls measure(item, rows, whether its sums are to be flushed).
  template <typename F, typename G>
  __device__ __forceinline__ void ForPanels(bool twice, const F& use, const G& measure) {
    const SweepShape& shape = launch_.shape;
    const int parts = Parts(twice);
    const bool ahead = shape.stages == 2;
    ClearSpare();
    Item item = {0, 0};
    int stage = 0;
    if (ahead) Load(item, stage);
    for (bool last = false; !last;) {
      Item next = {item.count, item.part + 1};
      if (next.part == parts) next = {item.count + 1, 0};
      const bool last_panel = Begin({item.count + 1, 0}) >= n();
      last = last_panel && next.part == 0;
      const Rows rows = RowsOf(stage);
      stage ^= shape.stages - 1;
      if (ahead) WaitForCopies();
      SyncThreads();
      const Item load = {ahead ? next.count : item.count, ahead ? next.part : item.part};
      if (!ahead || !last) Load(load, stage);
      if (!ahead) {
        WaitForCopies();
        SyncThreads();
      }
      if (use(item, rows)) {
        measure(item, rows, (item.count + 1) % kFlushPanels == 0 || last_panel);
      }
      item = next;
    }
  }

  // The columns that fill the last tile are 0, and so are rows that tensor cores multiply by 0: any
  // row, until groups have been loaded over it.
  __device__ void ClearSpare() const {
    for (Item item = {0, 0}; item.count < launch_.shape.stages; ++item.count) {
      for (int c = columns() + FirstRow(); c < padded(); c += RowStep()) {
        *W(item).At(c, Element()) = 0;
      }
      if constexpr (kTensor) {
        const int first = groups() == 1 ? rows_ : 0;
        for (int r = first + FirstRow(); r < launch_.shape.factor_rows; r += RowStep()) {
          *RowsOf(item.count).At(r, Element()) = S{};
        }
      }
    }
    if (kTensor && groups() > 1) SyncThreads();
  }

  // Begins to copy what an item needs.
  __device__ __forceinline__ void Load(const Item& item, int stage) const {
    const int64_t begin = Begin(item), left = n() - begin;
    const int first = FirstOfGroup(item);
    LoadPanel(launch_.basis_aligned, Row(first) + begin, stride(), GroupRows(item), log_panel(),
              left, RowsOf(stage));
    if (item.part == 0) {
      LoadPanel(launch_.w_aligned, Column(0) + begin, n(), columns(), log_panel(), left, W(item));
    }
  }

  // `a` of a group of rows, and mix, whose padding is 0.
  __device__ void LoadFactors(int first) const {
    const C* a = static_cast<const C*>(launch_.a) + int64_t{first} * padded();
    const int count = Min(group(), rows_ - first) * padded();
    for (int e = ThreadIndex(); e < launch_.shape.factor_rows * padded(); e += kSweepThreads) {
      const int at = worker_.FactorAt(e / padded(), e % padded(), padded());
      Factors()[at] = e < count ? a[e] : C{0};
    }
  }
  __device__ void LoadMix() const {
    for (int e = ThreadIndex(); e < launch_.shape.mix_rows * padded(); e += kSweepThreads) {
      const int k = e / padded(), c = e % padded();
      const bool inside = k < columns() && c < columns();
      Mix()[worker_.MixAt(k, c, padded())] =
          inside ? static_cast<const C*>(launch_.mix)[k * columns() + c] : C{0};
    }
  }

  // Multiplies the block's columns by their powers of two.
  __device__ void Scale(const Item& item) const {
    const int64_t i = Begin(item) + Element();
    for (int c = FirstRow(); c < columns(); c += RowStep()) {
      C& x = *W(item).At(c, Element());
      x = x * C(launch_.device->half_scale[c]) * C(launch_.device->rest_scale[c]);
      if (i < n()) Column(c)[i] = x;
    }
    SyncThreads();
  }

  __device__ bool AnyDying() const {
    bool any = false;
    for (int c = 0; c < columns(); ++c) any = any || launch_.device->state.dying[c] != 0;
    return any;
  }
  // Random numbers in place of the columns that are to be replaced.
  __device__ void Randomise(const Item& item) const {
    const uint64_t seed = launch_.seed[0] | uint64_t{launch_.seed[1]} << 32;
    const int64_t begin = Begin(item);
    for (int c = 0; c < columns(); ++c) {
      if (launch_.device->state.dying[c] == 0) continue;
      for (int e = 4 * ThreadIndex(); e < panel(); e += 4 * kSweepThreads) {
        const Philox4 words = RandomWords(launch_.device->state, seed, c, begin + e);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const bool inside = begin + e + k < n();
          *W(item).At(c, e + k) = inside ? C(RandomElement(words.v[k], n())) : C{0};
        }
      }
    }
    SyncThreads();
  }

  // The block times mix plus the item's rows times `a`, or what it has become plus these. Threads
  // share the rows of the same elements and columns, then add up what each has. The zeros of a
  // triangular mix multiply finite numbers: all columns have been measured, or are random.
  __device__ __forceinline__ void AddRows(const Item& item, const Rows& rows, bool store) const {
    if (groups() > 1) {
      LoadFactors(FirstOfGroup(item));
      SyncThreads();
    }
    const UpdateTerms<S, kTensor> terms = {
        rows, GroupRows(item), W(item), item.part == 0 ? columns() : 0, Factors(), Mix()};
    if constexpr (kTensor) {
      ShareUpdate(launch_.shape, worker_, terms, Exchange().begin);
    } else {
      ShareUpdate<B>(launch_.shape, terms, Exchange());
    }
    SyncThreads();
    C scale = 1;
    if (store) scale = launch_.device->poison != 0 ? C(NAN) : C(launch_.args.scale);
    const auto finish = [&](int c, int i, C* w, auto& x) {
      Finish(item, store, scale, c, i, w, x);
    };
    if constexpr (kTensor) {
      AddShares(launch_.shape, worker_, W(item).begin, Exchange().begin, finish);
    } else {
      AddShares(launch_.shape, W(item), Exchange(), finish);
    }
    SyncThreads();
  }
  // Neighbouring elements of column c, to which the update has added x, from the i-th of the panel
  // on, which is at `w`.
  template <int N>
  __device__ __forceinline__ void Finish(const Item& item, bool store, C scale, int c, int i, C* w,
                                         C (&x)[N]) const {
    if (item.part != 0) {
      C before[N];
      LoadWidened<C, N>(w, before);
#pragma unroll
      for (int e = 0; e < N; ++e) x[e] += before[e];
    }
    StoreWide(x, w);
    if (item.part != groups() - 1) return;
    const int64_t begin = Begin(item) + i;
    if (store) {
#pragma unroll
      for (int e = 0; e < N; ++e) x[e] *= scale;
      StoreElements(x, n() - begin, NewRow(c) + begin);
    } else {
      StoreElements(x, n() - begin, Column(c) + begin);
    }
  }

  // Zeros behind the new rows, from the first block of threads.
  __device__ void ClearPadding() const {
    if (BlockIndex() != 0) return;
    for (int c = 0; c < columns(); ++c) {
      for (int64_t i = n() + ThreadIndex(); i < stride(); i += BlockSize()) NewRow(c)[i] = S{};
    }
  }

  const BlockOrthoLaunch& launch_;
  const int m_;
  int rows_;  // that are read
  const Worker worker_;
};

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CUDA_BLOCK_ORTHO_SWEEP_CUH_
