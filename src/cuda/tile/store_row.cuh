// A row of accumulators straight to global memory, 16 bytes a thread, where there is no shared memory for a tile of results.
#pragma once

#include "cuda/ptx/scalar.cuh"
#include "cuda/tile/fragment.cuh"

namespace tilewise::tile {

// The four threads of a row hold a 4 x 4 of 32-bit pairs: thread t has pair t of four runs of 8 columns. Afterwards it has run t whole.
__device__ __forceinline__ void transpose4(uint32_t (&x)[4], int t) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = t & bit;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const int a = bit == 1 ? 2 * pair : pair, b = a + bit;
      const uint32_t received = __shfl_xor_sync(0xffffffff, upper ? x[a] : x[b], bit);
      x[a] = upper ? received : x[a];
      x[b] = upper ? x[b] : received;
    }
  }
}

// Writes row r (0 or 1) of this thread's fragment, times `factor`, as kElement. `row` points to the row's first column; null: not written.
// What is written is the first to leave L2.
template <ptx::Element kElement, int kCount>
__device__ __forceinline__ void store_row(const float (&x)[kCount], int r, float factor, uint16_t* row, int columns, int thread) {
  const int t = thread % 4;
#pragma unroll
  for (int group = 0; group < kCount / 16; ++group) {
    uint32_t run[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = 16 * group + 4 * j + 2 * r;
      run[j] = ptx::pack<kElement>(x[i] * factor, x[i + 1] * factor);
    }
    transpose4(run, t);
    const int column = 32 * group + 8 * t;
    if (row && column < columns) __stcs(reinterpret_cast<uint4*>(row + column), make_uint4(run[0], run[1], run[2], run[3]));
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
