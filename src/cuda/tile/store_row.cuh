// A row of accumulators straight to global memory, 8 bytes a thread, where there is no shared memory for a tile of results.
#pragma once

#include "cuda/ptx/scalar.cuh"
#include "cuda/tile/fragment.cuh"

namespace tilewise::tile {

// Writes row r (0 or 1) of this thread's fragment, times `factor`, as kElement. `row` points to the row's first column; null: not written.
// What is written is the first to leave L2. Two threads exchange pairs, so that each has 4 columns that lie together, and the four of a row
// write 16. Stores twice as wide take twice the exchanges and are no faster (measured).
template <ptx::Element kElement, int kCount>
__device__ __forceinline__ void store_row(const float (&x)[kCount], int r, float factor, uint16_t* row, int columns, int thread) {
  const bool odd = thread % 2;
#pragma unroll
  for (int i = 2 * r; i < kCount; i += 8) {  // 16 columns
    const uint32_t low = ptx::pack<kElement>(x[i] * factor, x[i + 1] * factor);
    const uint32_t high = ptx::pack<kElement>(x[i + 4] * factor, x[i + 5] * factor);
    const uint32_t other = __shfl_xor_sync(0xffffffff, odd ? low : high, 1);
    const int column = 2 * (i - 2 * r) + (odd ? 8 : 0) + thread % 4 / 2 * 4;
    if (row && column < columns) __stcs(reinterpret_cast<uint2*>(row + column), odd ? make_uint2(other, high) : make_uint2(low, other));
  }
}

// Which lanes of the warp hold part of a row r that is not finite, as bits.
template <int kCount>
__device__ __forceinline__ unsigned infinite_rows(const float (&x)[kCount], int r) {
  float zero = 0;
#pragma unroll
  for (int i = 0; i < kCount; i += 4) zero += 0 * x[i + 2 * r] + 0 * x[i + 2 * r + 1];
  zero += __shfl_xor_sync(0xffffffff, zero, 1);
  zero += __shfl_xor_sync(0xffffffff, zero, 2);
  return __ballot_sync(0xffffffff, !(zero == 0));
}

// Adds row r of this thread's fragment, times `factor`, to float32. `row` points to the row's first column; null: nothing.
template <int kCount>
__device__ __forceinline__ void add_row(const float (&x)[kCount], int r, float factor, float* row, int columns, int thread) {
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
    const int i = 4 * j + 2 * r, column = 8 * j + 2 * (thread % 4);
    if (!row || column >= columns) continue;
    float2& at = *reinterpret_cast<float2*>(row + column);
    at = make_float2(at.x + factor * x[i], at.y + factor * x[i + 1]);
  }
}

}  // namespace tilewise::tile
