// A place in a row of stages, and its phase, in two registers where tile/pipeline.cuh's Ring takes one.
#pragma once

#include <cstdint>

namespace tilewise::tile {

template <int kStages>
struct Cycle {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace tilewise::tile
