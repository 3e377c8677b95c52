// Products of elements as they lie in memory, by one thread.
#pragma once

#include "cuda/ptx/scalar.cuh"

namespace tilewise::tile {

// Of two runs of eight elements.
template <ptx::Element kElement>
__device__ __forceinline__ float dot(const uint4& a, const uint4& b) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum += ptx::to_float<kElement>(static_cast<uint16_t>(x[i])) * ptx::to_float<kElement>(static_cast<uint16_t>(y[i]));
    sum += ptx::to_float<kElement>(static_cast<uint16_t>(x[i] >> 16)) * ptx::to_float<kElement>(static_cast<uint16_t>(y[i] >> 16));
  }
  return sum;
}

}  // namespace tilewise::tile
