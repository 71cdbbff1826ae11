// Sums over long vectors in a fixed order: panels of elements, chunks of panels, all chunks.
//
// Every chunk has sums of its own, which are combined in the order of their index, and borders
// depend on sizes alone: results have the same bits for any number of threads.
#ifndef CURVAX_CPU_CHUNKS_H_
#define CURVAX_CPU_CHUNKS_H_

#include "cpu/simd.h"

namespace curvax::CURVAX_TARGET {

struct Chunks {
  int64_t n;
  int64_t panel, panels;        // elements in a panel, and their number
  int64_t chunk_panels, count;  // panels in a chunk, and the number of chunks

  // At most `fitting` elements in a panel, if that is not too short; `sums` numbers of each chunk,
  // which take 8 MB in all, but where 16 chunks need more.
  CURVAX_INLINE Chunks(int64_t n, int64_t fitting, int64_t sums) : n(n) {
    constexpr int64_t kMost = 256, kFew = 16, kAllSums = int64_t{1} << 20;
    panel = Max<int64_t>(64, Min<int64_t>(fitting, 1024) / 64 * 64);
    panels = CeilDiv(n, panel);
    const int64_t most = Max(kFew, Min(kMost, kAllSums / Max<int64_t>(1, sums)));
    chunk_panels = Max<int64_t>(1, CeilDiv(panels, most));
    count = CeilDiv(panels, chunk_panels);
  }

  // Calls f(begin, width) for the panels of a chunk.
  template <typename F>
  CURVAX_INLINE void ForPanels(int64_t chunk, const F& f) const {
    const int64_t end = Min(panels, (chunk + 1) * chunk_panels);
    for (int64_t p = chunk * chunk_panels; p < end; ++p) {
      f(p * panel, Min(panel, n - p * panel));
    }
  }

  // The chunks' sums, of `length` each, one after another, added up.
  CURVAX_INLINE void Combine(const double* sums, int64_t length, double* result) const {
    for (int64_t i = 0; i < length; ++i) result[i] = 0;
    for (int64_t chunk = 0; chunk < count; ++chunk) {
      for (int64_t i = 0; i < length; ++i) result[i] += sums[chunk * length + i];
    }
  }
};

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_CPU_CHUNKS_H_
