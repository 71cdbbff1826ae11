// A GPU on one thread of a CPU, for the unmodified device code of kernels/cuda.
//
// Every CUDA thread of a block is a fiber, which runs until it meets a barrier or a shuffle. Blocks
// run one after another. Which fiber goes next is drawn by seed, again after every barrier: a
// result that depends on the order of threads shows. Shared memory is filled with NaN before every
// block and lies between guards. An asynchronous copy fills its destination with NaN at once and
// with the data when its thread waits, so both a wait that is missing and a reader that was not
// waited for show. A barrier that some threads have passed by, a shuffle or a product of matrices
// that lacks lanes of its warp, a misaligned copy, or a write past the shared memory ends the
// process of no one: Launch returns what went wrong. Tensor cores are emulated in mma.cc.
//
// What it cannot show: races between blocks, effects of caches and of the memory model, warps whose
// lanes run apart, and speed.
#ifndef CURVAX_TESTS_SIMT_SIMT_H_
#define CURVAX_TESTS_SIMT_SIMT_H_

#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

namespace simt {

int ThreadIndex();
int BlockSize();
int64_t BlockIndex();
int64_t BlockCount();
char* SharedMemory();
void SyncThreads();

// Waits for the other lanes of the warp, of which each gives something; then `work` is called once
// with what they give, in their order. It returns what went wrong, or nullptr.
constexpr int kWarp = 32;
using Work = const char* (*)(void* const (&lanes)[kWarp]);
void MeetLanes(Work work, void* given);

// The value that lane (own ^ mask) of the warp gives, in 8 bytes.
uint64_t ShuffleBits(uint64_t bits, int mask);
template <typename T>
T ShuffleXor(T v, int mask) {
  static_assert(sizeof(T) <= 8, "a shuffle of at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof(v));
  bits = ShuffleBits(bits, mask);
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

// Products of matrices, and the loads of their operands (kernels/cuda/mma.cuh).
void MultiplyBf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void MultiplyTf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void MultiplyF64(double (&d)[2], double a, double b);
void LoadMatricesFrom(const void* row, bool transposed, uint32_t (&out)[4]);
template <bool kTransposed>
void LoadMatrices(const void* row, uint32_t (&out)[4]) {
  LoadMatricesFrom(row, kTransposed, out);
}

// `kBytes` from global to shared memory, which arrive when the thread calls WaitForCopies.
void CopyAsyncBytes(void* to, const void* from, int bytes);
template <int kBytes>
void CopyAsync(void* to, const void* from) {
  CopyAsyncBytes(to, from, kBytes);
}
void WaitForCopies();

// Bytes of global memory that asynchronous copies and LoadStreaming have read since the last call
// of TakeBytesRead.
void CountRead(int64_t bytes);
int64_t TakeBytesRead();

struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  int64_t first_block = 0;  // earlier ones are left out, for arrays too large to fill
};

// Runs `kernel` for every thread of every block; an empty string, or what went wrong.
std::string Run(const Grid& grid, uint32_t seed, const std::function<void()>& kernel);

}  // namespace simt

#endif  // CURVAX_TESTS_SIMT_SIMT_H_
