// Runs a lambda through the type-erased ParallelFor.
#ifndef CURVAX_CPU_PARALLEL_H_
#define CURVAX_CPU_PARALLEL_H_

#include "cpu/simd.h"
#include "curvax/types.h"

namespace curvax::CURVAX_TARGET {

// Calls f(worker, index) for every index in [0, count).
template <typename F>
CURVAX_INLINE void For(const ParallelFor& pool, int64_t count, const F& f) {
  const ParallelFor::Body body = +[](void* context, int64_t worker, int64_t index) {
    (*static_cast<const F*>(context))(worker, index);
  };
  pool.run(pool.self, count, body, const_cast<F*>(&f));
}

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CPU_PARALLEL_H_
