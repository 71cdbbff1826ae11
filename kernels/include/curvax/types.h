// Types that the kernels share with their callers: storage types and the view of a thread pool.
//
// Only plain data and declarations belong here: this header is included by every target,
// and an inline function would be merged across targets by the linker.
#ifndef CURVAX_TYPES_H_
#define CURVAX_TYPES_H_

#include <cstdint>

namespace curvax {

// How an array's elements are stored. Arithmetic is in float, or in double for kF64.
enum class DType { kF32, kF64, kBF16, kF16 };

// A view of whatever runs a loop in parallel.
//
// `run` calls body(context, worker, index) exactly once for every index in [0, count), in any order
// and on any thread, and returns when all calls have returned. `worker` is in [0, max_workers), and
// two calls that overlap in time have different workers: kernels use it to pick scratch memory,
// never to decide what to compute.
struct ParallelFor {
  using Body = void (*)(void* context, int64_t worker, int64_t index);
  void (*run)(void* self, int64_t count, Body body, void* context);
  void* self;
  int64_t max_workers;
};

}  // namespace curvax

#endif  // CURVAX_TYPES_H_
