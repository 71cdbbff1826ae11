// One sweep of block_ortho on a GPU, panel by panel: K1 to K3, the work of one block of threads.
//
// block_ortho.cuh describes the algorithm, the bytes that it moves and its determinism.
#ifndef CURVAX_CUDA_BLOCK_ORTHO_SWEEP_CUH_
#define CURVAX_CUDA_BLOCK_ORTHO_SWEEP_CUH_

#include "common/block_ortho_pass.h"
#include "cuda/device.cuh"
#include "cuda/panel.cuh"
#include "cuda/row_sums.cuh"
#include "cuda/shapes.h"

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

  __device__ explicit SweepBlock(const BlockOrthoLaunch& launch)
      : launch_(launch), m_(static_cast<int>(launch.device->state.used)), rows_(m_) {}

  // K1, and the largest element of each column.
  __device__ void Measure() {
    BlockMaxima<C> maxima;
    ClearSums();
    ForItems(false, [&](const Item& item, const Panel<S>&) {
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
    ForItems(update && measure, [&](const Item& item, const Panel<S>& rows) {
      if (item.part == 0 && !update) Scale(item);
      if (item.part == 0 && random) Randomise(item);
      if (update && item.part < groups()) AddRows(item, rows, !measure);
      return measure && item.part >= Parts(update) - groups();
    });
    if (!measure) ClearPadding();
  }

 private:
  static constexpr int N = 1 << kLogWide<C>;
  static constexpr int kColumns = kUpdateColumns<B>;

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
  __device__ Panel<S> Rows(int stage) const {
    const int apart = launch_.shape.strip;
    return {Shared<S>(0) + stage * (apart << log_strips()), apart};
  }
  __device__ Panel<C> W(const Item& item) const {
    const int apart = padded() * Panel<C>::kStrip;
    const int stage = item.count & (launch_.shape.stages - 1);
    return {Shared<C>(launch_.shape.w_begin) + stage * (apart << log_strips()), apart};
  }
  // (row of the group, column), then those of the block itself.
  __device__ C* Factors() const { return Shared<C>(launch_.shape.factors_begin); }
  // What a sharer adds to the block.
  __device__ Panel<C> Exchange(int sharer) const {
    const int apart = padded() * Panel<C>::kStrip;
    return {Shared<C>(launch_.shape.exchange_begin) + sharer * (apart << log_strips()), apart};
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

  // Calls use(item) for this block's panels, or twice for every group of rows; then, where that
  // says so, adds the item's <q_r, w_c> and <w_k, w_c> to the block's sums.
  template <typename F>
  __device__ __forceinline__ void ForItems(bool twice, const F& use) {
    const SweepShape& shape = launch_.shape;
    const int parts = Parts(twice);
    RowSums<S, kSumRows<C, B>, B> products;
    RowSums<C, kGramRows, B> gram;
    // The sums of other rounds or groups are in the same registers.
    const bool keep_products = parts == 1 && shape.products.rounds <= 1;
    const bool keep_gram = shape.gram.rounds == 1;
    const bool ahead = shape.stages == 2;
    ClearSpareColumns();
    Item item = {0, 0};
    int stage = 0;
    if (ahead) Load(item, stage);
    for (bool last = false; !last;) {
      Item next = {item.count, item.part + 1};
      if (next.part == parts) next = {item.count + 1, 0};
      const bool last_panel = Begin({item.count + 1, 0}) >= n();
      last = last_panel && next.part == 0;
      const Panel<S> rows = Rows(stage);
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
        const bool flush = (item.count + 1) % kFlushPanels == 0 || last_panel;
        const int count = GroupRows(item);
        int round = 0;
#pragma unroll 1
        do {
          products.Add(shape.products, log_panel(), rows, count, W(item), round);
          if (!keep_products || flush) {
            products.Flush(shape.products, Total(FirstOfGroup(item)), count, columns(), round);
          }
        } while (++round < shape.products.rounds);
        if (FirstOfGroup(item) == 0) {
          round = 0;
#pragma unroll 1
          do {
            gram.Add(shape.gram, log_panel(), W(item), columns(), W(item), round);
            if (!keep_gram || flush) gram.Flush(shape.gram, Total(m_), columns(), columns(), round);
          } while (++round < shape.gram.rounds);
        }
      }
      item = next;
    }
  }

  // The columns that fill the last tile are 0.
  __device__ void ClearSpareColumns() const {
    for (Item item = {0, 0}; item.count < launch_.shape.stages; ++item.count) {
      for (int c = columns() + FirstRow(); c < padded(); c += RowStep()) {
        *W(item).At(c, Element()) = 0;
      }
    }
  }

  // Begins to copy what an item needs.
  __device__ __forceinline__ void Load(const Item& item, int stage) const {
    const int64_t begin = Begin(item), left = n() - begin;
    const int first = FirstOfGroup(item);
    LoadPanel(launch_.basis_aligned, Row(first) + begin, stride(), GroupRows(item), log_panel(),
              left, Rows(stage));
    if (item.part == 0) {
      LoadPanel(launch_.w_aligned, Column(0) + begin, n(), columns(), log_panel(), left, W(item));
    }
  }

  // `a` of a group of rows, and mix, whose padding is 0.
  __device__ void LoadFactors(int first) const {
    const C* a = static_cast<const C*>(launch_.a) + int64_t{first} * padded();
    const int count = Min(group(), rows_ - first) * padded();
    for (int e = ThreadIndex(); e < count; e += kSweepThreads) Factors()[e] = a[e];
  }
  __device__ void LoadMix() const {
    C* factors = Factors() + group() * padded();
    for (int e = ThreadIndex(); e < columns() * padded(); e += kSweepThreads) {
      const int k = e / padded(), c = e % padded();
      factors[e] = c < columns() ? static_cast<const C*>(launch_.mix)[k * columns() + c] : C{0};
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
        C* w = W(item).At(c, e);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          w[k] = begin + e + k < n() ? C(RandomElement(words.v[k], n())) : C{0};
        }
      }
    }
    SyncThreads();
  }

  // The block times mix plus the item's rows times `a`, or what it has become plus these. Threads
  // share the rows of the same elements and columns, then add up what each has. The zeros of a
  // triangular mix multiply finite numbers: all columns have been measured, or are random.
  __device__ __forceinline__ void AddRows(const Item& item, const Panel<S>& rows,
                                          bool store) const {
    if (groups() > 1) {
      LoadFactors(FirstOfGroup(item));
      SyncThreads();
    }
    const int log_wides = log_panel() - kLogWide<C>, log_units = launch_.shape.log_units;
    const int sharer = ThreadIndex() >> log_units;
    for (int u = ThreadIndex() & ((1 << log_units) - 1); u < 1 << log_units; u += kSweepThreads) {
      const int i = (u & ((1 << log_wides) - 1)) * N, first = (u >> log_wides) * kColumns;
      if (first >= padded()) break;
      const C* factors = Factors() + sharer * padded() + first;
      C sum[kColumns][N] = {};
      AddProducts(rows.At(sharer, i), factors, sharer, GroupRows(item), sum);
      if (item.part == 0) {
        AddProducts(W(item).At(sharer, i), factors + group() * padded(), sharer, columns(), sum);
      }
      C* out = Exchange(sharer).At(first, i);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) StoreWide(sum[c], out + c * Panel<C>::kStrip);
    }
    SyncThreads();
    FinishUpdate(item, store);
    SyncThreads();
  }
  // Adds this sharer's part of `end` rows times their factors.
  template <typename T>
  __device__ __forceinline__ void AddProducts(const T* rows, const C* factors, int sharer, int end,
                                              C (&sum)[kColumns][N]) const {
    const int log_sharers = launch_.shape.log_sharers, count = Turns(sharer, end, log_sharers);
#pragma unroll 4
    for (int k = 0; k < count; ++k) {
      C q[N], factor[kColumns];
      LoadWidened<T, N>(rows, q);
      LoadAligned<kColumns>(factors, factor);
      rows += Panel<T>::kStrip << log_sharers;
      factors += padded() << log_sharers;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
#pragma unroll
        for (int e = 0; e < N; ++e) sum[c][e] += factor[c] * q[e];
      }
    }
  }
  __device__ __forceinline__ void FinishUpdate(const Item& item, bool store) const {
    const int log_wides = log_panel() - kLogWide<C>;
    const int i = (ThreadIndex() & ((1 << log_wides) - 1)) * N;
    const int64_t begin = Begin(item) + i;
    C scale = 1;
    if (store) scale = launch_.device->poison != 0 ? C(NAN) : C(launch_.args.scale);
    for (int c = ThreadIndex() >> log_wides; c < columns(); c += kSweepThreads >> log_wides) {
      C x[N] = {};
      if (item.part != 0) LoadAligned<N>(W(item).At(c, i), x);
      const C* shares = Exchange(0).At(c, i);
#pragma unroll 4
      for (int k = 0; k < 1 << launch_.shape.log_sharers; ++k) {
        C more[N];
        LoadAligned<N>(shares, more);
        shares += padded() << log_panel();
#pragma unroll
        for (int e = 0; e < N; ++e) x[e] += more[e];
      }
      StoreWide(x, W(item).At(c, i));
      if (item.part != groups() - 1) continue;
      if (store) {
#pragma unroll
        for (int e = 0; e < N; ++e) x[e] *= scale;
        StoreElements(x, n() - begin, NewRow(c) + begin);
      } else {
        StoreElements(x, n() - begin, Column(c) + begin);
      }
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
};

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CUDA_BLOCK_ORTHO_SWEEP_CUH_
