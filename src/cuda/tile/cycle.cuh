// A place in a row of stages, and its phase, in two registers where tile/pipeline.cuh's Ring takes one; and a value known to be uniform.
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

// The same value, known to the compiler to be the same in all lanes: places of operands then live in uniform registers.
__device__ __forceinline__ int same_in_all_lanes(int x) { return __shfl_sync(0xffffffff, x, 0); }

}  // namespace tilewise::tile
