// Tensor cores: what every lane of a warp gives, by the table in kernels/cuda/mma.cuh, becomes
// whole matrices, and a product of these goes back to the lanes.
//
// Operands have the bits of their format: others of a register are ignored, so that a part that was
// not split off is missing. Sums of bf16 and tf32 are truncated, as tensor cores were found to do
// (Fasi, Higham, Mikaitis, Pranesh 2021): a few products and the sum so far are aligned to the
// largest of them, cut off, added, and cut again; nothing is rounded. Here no bit is kept beyond
// the 24 of the largest, which is no more than on any device.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt/simt.h"

namespace simt {
namespace {

float FloatOf(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
int ExponentOf(double x) {  // of a power of two that is no larger; small where x is 0
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof(x));
  return static_cast<int>(bits >> 52 & 0x7ff) - 1023;
}
double PowerOfTwo(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// The sum of terms as a tensor core forms it; each is a float or an exact product of two.
float TruncatedSum(const double* terms, int count) {
  int largest = -1023;
  for (int i = 0; i < count; ++i) {
    if (!std::isfinite(terms[i])) {
      double sum = 0;
      for (int k = 0; k < count; ++k) sum += terms[k];
      return static_cast<float>(sum);
    }
    if (ExponentOf(terms[i]) > largest) largest = ExponentOf(terms[i]);
  }
  if (largest < -300) return 0;
  const double unit = PowerOfTwo(largest - 23), per_unit = PowerOfTwo(23 - largest);
  int64_t sum = 0;
  for (int i = 0; i < count; ++i) sum += static_cast<int64_t>(terms[i] * per_unit);
  const double whole = static_cast<double>(sum) * unit;
  const float nearest = static_cast<float>(whole);
  return std::fabs(nearest) > std::fabs(whole) ? std::nextafter(nearest, 0.0f) : nearest;
}

struct Given {
  float* d;
  const uint32_t *a, *b;
};

// (M, N) += (M, K) (N, K), kTogether terms of K at a time.
template <int M, int N, int K, int kTogether>
void MultiplyTruncated(const float (&a)[M][K], const float (&b)[N][K], float (&d)[M][N]) {
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) {
      for (int k = 0; k < K; k += kTogether) {
        double terms[kTogether + 1] = {d[i][j]};
        for (int e = 0; e < kTogether; ++e) {
          terms[e + 1] = static_cast<double>(a[i][k + e]) * b[j][k + e];
        }
        d[i][j] = TruncatedSum(terms, kTogether + 1);
      }
    }
  }
}
// The sums of m16n8: register 2h + e of a lane is (g + 8h, 2t + e).
template <typename Use>
void ForSums(void* const (&lanes)[kWarp], const Use& use) {
  for (int lane = 0; lane < kWarp; ++lane) {
    float* d = static_cast<const Given*>(lanes[lane])->d;
    for (int e = 0; e < 4; ++e) use(lane / 4 + e / 2 * 8, lane % 4 * 2 + e % 2, d[e]);
  }
}

const char* Bf16Work(void* const (&lanes)[kWarp]) {
  float a[16][16], b[8][16], d[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Given& given = *static_cast<const Given*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < 2; ++e) {
      const auto element = [e](uint32_t pair) {
        return FloatOf(e == 0 ? pair << 16 : pair & 0xffff0000u);
      };
      for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][2 * t + r / 2 * 8 + e] = element(given.a[r]);
      for (int r = 0; r < 2; ++r) b[g][2 * t + r * 8 + e] = element(given.b[r]);
    }
  }
  ForSums(lanes, [&](int i, int j, float& x) { d[i][j] = x; });
  MultiplyTruncated<16, 8, 16, 8>(a, b, d);
  ForSums(lanes, [&](int i, int j, float& x) { x = d[i][j]; });
  return nullptr;
}

const char* Tf32Work(void* const (&lanes)[kWarp]) {
  float a[16][8], b[8][8], d[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Given& given = *static_cast<const Given*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    const auto element = [](uint32_t bits) { return FloatOf(bits & 0xffffe000u); };
    for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][t + r / 2 * 4] = element(given.a[r]);
    for (int r = 0; r < 2; ++r) b[g][t + r * 4] = element(given.b[r]);
  }
  ForSums(lanes, [&](int i, int j, float& x) { d[i][j] = x; });
  MultiplyTruncated<16, 8, 8, 4>(a, b, d);
  ForSums(lanes, [&](int i, int j, float& x) { x = d[i][j]; });
  return nullptr;
}

struct GivenF64 {
  double* d;
  double a, b;
};
const char* F64Work(void* const (&lanes)[kWarp]) {
  const auto given = [&](int lane) -> GivenF64& { return *static_cast<GivenF64*>(lanes[lane]); };
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int e = 0; e < 2; ++e) {
      for (int k = 0; k < 4; ++k) {
        const double a = given(lane / 4 * 4 + k).a, b = given((lane % 4 * 2 + e) * 4 + k).b;
        given(lane).d[e] = std::fma(a, b, given(lane).d[e]);
      }
    }
  }
  return nullptr;
}

struct GivenRow {
  const void* row;
  bool transposed;
  uint32_t* out;
};
const char* LoadWork(void* const (&lanes)[kWarp]) {
  const auto given = [&](int lane) -> GivenRow& { return *static_cast<GivenRow*>(lanes[lane]); };
  for (int i = 0; i < 4; ++i) {
    uint16_t matrix[8][8];
    for (int r = 0; r < 8; ++r) {
      const void* row = given(8 * i + r).row;
      if (reinterpret_cast<uintptr_t>(row) % 16 != 0) return "a misaligned row of a matrix";
      std::memcpy(matrix[r], row, sizeof(matrix[r]));
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const bool transposed = given(lane).transposed;
      const auto element = [&](int e) -> uint32_t {
        return transposed ? matrix[2 * t + e][g] : matrix[g][2 * t + e];
      };
      given(lane).out[i] = element(0) | element(1) << 16;
    }
  }
  return nullptr;
}

}  // namespace

void MultiplyBf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Given given = {d, a, b};
  MeetLanes(&Bf16Work, &given);
}
void MultiplyTf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Given given = {d, a, b};
  MeetLanes(&Tf32Work, &given);
}
void MultiplyF64(double (&d)[2], double a, double b) {
  GivenF64 given = {d, a, b};
  MeetLanes(&F64Work, &given);
}
void LoadMatricesFrom(const void* row, bool transposed, uint32_t (&out)[4]) {
  GivenRow given = {row, transposed, out};
  MeetLanes(&LoadWork, &given);
}

}  // namespace simt
