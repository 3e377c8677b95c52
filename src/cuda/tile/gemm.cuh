// The two products of attention for one warpgroup of 64 rows, asynchronous: commit and wait are the caller's.
#pragma once

#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/shared.cuh"

namespace tilewise::tile {

// Keeps registers that the tensor cores read or write from being moved or reused across this point. Call it right after the wait:
// ptxas before CUDA 13.3 does not know that A registers are read after the instruction has issued.
template <int kCount>
__device__ __forceinline__ void hold(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void hold(uint32_t (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

// s = q k^T over the first kDepth columns of both tiles, for the kKeys rows of k from `key` on; q has 64 rows.
template <ptx::Element kElement, int kDepth, int kKeys, class Q, class K>
__device__ __forceinline__ void multiply_scores(float (&s)[kKeys / 2], const Q& q, const K& k, int key) {
  static_assert(Q::kRows == 64 && kDepth % 16 == 0 && kDepth <= Q::kColumns && kDepth <= K::kColumns && kKeys % 8 == 0);
  const uint32_t a = operand(q.bytes, 16), b = operand(k.bytes, 16) + ((key * 128) >> 4);
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    const int panel = step / 4, inside = step % 4 * 32;
    ptx::Wgmma<kElement, kKeys>::ss(s, a + ((panel * Q::kPanelBytes + inside) >> 4), b + ((panel * K::kPanelBytes + inside) >> 4),
                                    step > 0);
  }
}

// o (+)= p v for the kKeys rows of v from `key` on, with p in registers, packed as fragment.cuh says.
template <ptx::Element kElement, int kWidth, int kKeys, class V>
__device__ __forceinline__ void multiply_values(float (&o)[kWidth / 2], const uint32_t (&p)[kKeys / 4], const V& v, int key,
                                                bool accumulate) {
  static_assert(kKeys % 16 == 0 && kWidth <= V::kColumns);
  const uint32_t b = operand(v.bytes, V::kPanelBytes) + ((key * 128) >> 4);
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step)
    ptx::Wgmma<kElement, kWidth>::rs(o, p + 4 * step, b + ((step * 2048) >> 4), step > 0 || accumulate);
}

}  // namespace tilewise::tile
