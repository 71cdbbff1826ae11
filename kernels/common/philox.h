// Philox4x32-10, a counter-based random generator: the same number for the same index on any
// thread.
//
// Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#ifndef CURVAX_COMMON_PHILOX_H_
#define CURVAX_COMMON_PHILOX_H_

#include "common/host_device.h"

namespace curvax::CURVAX_TARGET {

struct Philox4 {
  uint32_t v[4];
};

// Four random words for a counter of 128 and a key of 64 bits.
CURVAX_HOST_DEVICE Philox4 Philox(Philox4 counter, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * counter.v[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * counter.v[2];
    counter = {{static_cast<uint32_t>(p1 >> 32) ^ counter.v[1] ^ k0, static_cast<uint32_t>(p1),
                static_cast<uint32_t>(p0 >> 32) ^ counter.v[3] ^ k1, static_cast<uint32_t>(p0)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return counter;
}

}  // namespace curvax::CURVAX_TARGET

#endif  // CURVAX_COMMON_PHILOX_H_
