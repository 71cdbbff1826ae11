// Of every pair (x, w) the sums, in float64, of which its residual is made: see the arguments.
//
// Algorithm: x, w and the rows q go from memory, as they are stored, through registers into the
// sums, in panels of which the rows q stay in cache from pair to pair. Accumulation and
// determinism: as inner_products.cc. w - sigma x is formed before it is squared: expanded, the
// square would cancel.
#include "cpu/chunks.h"
#include "cpu/convert.h"
#include "cpu/inner_products.h"
#include "cpu/parallel.h"

namespace curvax::CURVAX_TARGET {
namespace {

constexpr int kUnroll = 2;
constexpr int64_t kStep = kUnroll * kLanes<double>;
// Elements ahead of those in use that are asked for.
constexpr int64_t kAhead = 512;
constexpr int kSums = 4;

CURVAX_INLINE Chunks ChunksOf(const ResidualProductsArgs& args) {
  constexpr int64_t kL1Bytes = 28 << 10, kRowBytes = 2 * sizeof(float);
  return Chunks(args.n, kL1Bytes / kRowBytes / args.pairs, args.pairs * kSums);
}

template <typename S>
class Residuals {
 public:
  using C = Compute<S>;

  Residuals(const ResidualProductsArgs& args, const ParallelFor& pool)
      : args_(args), pool_(pool), chunks_(ChunksOf(args)) {}

  void All() const {
    double* sums = static_cast<double*>(args_.workspace);
    const int64_t count = args_.pairs * kSums;
    For(pool_, chunks_.count, [&](int64_t, int64_t chunk) {
      double* own = sums + chunk * count;
      for (int64_t i = 0; i < count; ++i) own[i] = 0;
      chunks_.ForPanels(chunk, [&](int64_t begin, int64_t width) {
        for (int64_t pair = 0; pair < args_.pairs; ++pair) {
          AddPanel(pair, begin, width, own + pair * kSums);
        }
      });
    });
    chunks_.Combine(sums, count, args_.products);
  }

 private:
  const S* X(int64_t i) const { return static_cast<const S*>(args_.x) + i * args_.stride; }
  const S* Q(int64_t j) const { return static_cast<const S*>(args_.q) + j * args_.stride; }
  const C* W(int64_t i) const { return static_cast<const C*>(args_.w) + i * args_.n; }
  double Coupling(int64_t j, int64_t pair) const { return args_.coupling[j * args_.pairs + pair]; }

  void AddPanel(int64_t pair, int64_t begin, int64_t width, double* out) const {
    const S* x = X(pair) + begin;
    const C* w = W(pair) + begin;
    const double shift = args_.shifts[pair], theta = args_.thetas[pair];
    Vec<double> sum[kSums][kUnroll] = {};
    const int64_t whole = width / kStep * kStep;
    for (int64_t i = 0; i < whole; i += kStep) {
      __builtin_prefetch(x + i + kAhead);
      __builtin_prefetch(w + i + kAhead);
      Vec<double> vector[kUnroll], rest[kUnroll], error[kUnroll];
#pragma GCC unroll 2
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t at = i + u * kLanes<double>;
        const Vec<double> product = LoadWide(w + at);
        vector[u] = LoadWide(x + at);
        rest[u] = product - shift * vector[u];
        error[u] = product - theta * vector[u];
      }
      for (int64_t j = 0; j < args_.pairs; ++j) {
        const double factor = Coupling(j, pair);
        if (factor == 0) continue;
        const S* q = Q(j) + begin + i;
        __builtin_prefetch(q + kAhead);
#pragma GCC unroll 2
        for (int u = 0; u < kUnroll; ++u) error[u] -= factor * LoadWide(q + u * kLanes<double>);
      }
#pragma GCC unroll 2
      for (int u = 0; u < kUnroll; ++u) {
        sum[0][u] += vector[u] * vector[u];
        sum[1][u] += vector[u] * rest[u];
        sum[2][u] += rest[u] * rest[u];
        sum[3][u] += error[u] * error[u];
      }
    }
    for (int s = 0; s < kSums; ++s) out[s] += SumLanes(sum[s][0] + sum[s][1]);
    for (int64_t i = whole; i < width; ++i) {
      const double vector = Widen(x[i]), product = Widen(w[i]);
      const double rest = product - shift * vector;
      double error = product - theta * vector;
      for (int64_t j = 0; j < args_.pairs; ++j) {
        const double factor = Coupling(j, pair);
        if (factor != 0) error -= factor * Widen(Q(j)[begin + i]);
      }
      out[0] += vector * vector;
      out[1] += vector * rest;
      out[2] += rest * rest;
      out[3] += error * error;
    }
  }

  const ResidualProductsArgs& args_;
  const ParallelFor& pool_;
  const Chunks chunks_;
};

}  // namespace

int64_t ResidualProductsWorkspaceBytes(const ResidualProductsArgs& args, int64_t) {
  return ChunksOf(args).count * args.pairs * kSums * int64_t{sizeof(double)};
}

void ResidualProducts(const ResidualProductsArgs& args, const ParallelFor& pool) {
  switch (args.dtype) {
    case DType::kF32:
      return Residuals<float>(args, pool).All();
    case DType::kF64:
      return Residuals<double>(args, pool).All();
    case DType::kBF16:
      return Residuals<BFloat16>(args, pool).All();
    case DType::kF16:
      return Residuals<Half>(args, pool).All();
  }
}

}  // namespace curvax::CURVAX_TARGET
