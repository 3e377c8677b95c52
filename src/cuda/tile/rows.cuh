// Online softmax over one block of scores in registers, two rows a thread (fragment.cuh). Everything is in powers of two.
//
// A row's state is (max, sum) with the meaning sum_j 2^(s_j - max) so far. `max` need not be the largest score: any value that keeps
// 2^(s - max) inside float and the operand type gives the same quotients o / sum, rounded alike. So a block is taken with the old max,
// which needs no maximum over its scores; where the block's sum shows that a row has outgrown it, the exponentials, not the scores, are
// scaled down. Only a row that grows by more than 2^117 within one block may overflow: its sum then is not finite, and stays so.
#pragma once

#include "core/mask.h"
#include "cuda/ptx/scalar.cuh"
#include "cuda/tile/fragment.cuh"

namespace tilewise::tile {

// Four of a row's threads compare to one value.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}
// And sum, both rows step by step.
__device__ __forceinline__ void row_sums(const float (&x)[2], float (&sum)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) sum[r] = x[r] + __shfl_xor_sync(0xffffffff, x[r], 1);
#pragma unroll
  for (int r = 0; r < 2; ++r) sum[r] += __shfl_xor_sync(0xffffffff, sum[r], 2);
}

template <int kCount>
__device__ __forceinline__ void row_maxima(const float (&s)[kCount], float (&max)[2]) {
  float even[2] = {-INFINITY, -INFINITY}, odd[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    even[row_of(i)] = fmaxf(even[row_of(i)], s[i]);
    odd[row_of(i)] = fmaxf(odd[row_of(i)], s[i + 1]);
  }
  max[0] = row_max(fmaxf(even[0], odd[0]));
  max[1] = row_max(fmaxf(even[1], odd[1]));
}

// The largest sum of a block with an old max: far from float16's 65504 and from overflow of o.
constexpr float kLargestStaleSum = 1024;

// A block goes through raise() if it must, exponentials(), and, where then outgrown(), shrink().
struct Rows {
  float max[2], sum[2];  // sum: of this thread's columns only
  float shift[2];        // max, or 0 where nothing is visible yet: every 2^(-inf - 0) is 0
  float rescale[2];      // of the last block: what o must be multiplied by before the block's values are added
  float block_sum[4];    // of the last block: even and odd columns of both rows

  __device__ __forceinline__ void clear() {
    max[0] = max[1] = -INFINITY;
    sum[0] = sum[1] = 0;
  }

  // Takes the true maximum so far, for a factor above 0. True: every row of this warp has met a key, and its max may be kept.
  template <int kCount>
  __device__ __forceinline__ bool raise(const float (&s)[kCount], float factor) {
    float largest[2];
    row_maxima(s, largest);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float now = fmaxf(max[r], largest[r] * factor);
      shift[r] = now == -INFINITY ? 0 : now;
      rescale[r] = ptx::exp2(max[r] - shift[r]);
      max[r] = now;
      sum[r] *= rescale[r];
    }
    return __all_sync(0xffffffff, max[0] > -INFINITY && max[1] > -INFINITY);
  }

  // Keeps the old max.
  __device__ __forceinline__ void keep() { rescale[0] = rescale[1] = 1; }

  // s = 2^(s * factor - shift) for the scores from `begin` to `end`, known to the compiler, and their sums; from 0 to the last in turn.
  template <int kCount>
  __device__ __forceinline__ void exponentials(float (&s)[kCount], float factor, int begin, int end) {
    if (begin == 0) block_sum[0] = block_sum[1] = block_sum[2] = block_sum[3] = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (i >= begin && i < end) {
        s[i] = ptx::exp2(fmaf(s[i], factor, -shift[row_of(i)]));
        block_sum[i & 3] += s[i];
      }
    if (end == kCount) {
      sum[0] += block_sum[0] + block_sum[1];
      sum[1] += block_sum[2] + block_sum[3];
    }
  }

  // The sum of the last block so far, of both rows.
  __device__ __forceinline__ float total() const { return block_sum[0] + block_sum[1] + block_sum[2] + block_sum[3]; }

  // Whether a sum of the last block is too large, or NaN, in any row of this warp.
  __device__ __forceinline__ bool outgrown() const { return __any_sync(0xffffffff, !(total() <= kLargestStaleSum)); }

  // Brings rows of exponentials above 1 back to at most 1.
  template <int kCount>
  __device__ __forceinline__ void shrink(float (&s)[kCount]) {
    float largest[2];
    row_maxima(s, largest);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Consistent with the max as it is rounded.
      const float now = largest[r] > 1 && largest[r] < INFINITY ? shift[r] + log2f(largest[r]) : shift[r];
      largest[r] = ptx::exp2(shift[r] - now);
      // 2^-126 and below is 0: the row loses what made it grow. A sum of NaN stays.
      sum[r] = largest[r] > 0 ? sum[r] * largest[r] : sum[r] + INFINITY;
      rescale[r] *= largest[r];
      if (max[r] > -INFINITY) max[r] = shift[r] = now;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) s[i] *= largest[row_of(i)];
  }

  // Whether o must be rescaled in any row of this warp.
  __device__ __forceinline__ bool moved() const { return __any_sync(0xffffffff, rescale[0] != 1 || rescale[1] != 1); }
};

// Scores of pairs that are not visible become -inf. `query` is this thread's first row, `key` the block's first key.
template <int kCount>
__device__ __forceinline__ void mask_block(float (&s)[kCount], const Band& band, int query, int key) {
  // Of the kCount / 2 columns that a thread has in a row, two in every 8, those below `column`; as bits, which the compiler can move to
  // predicates together.
  const auto below = [&](int column) {
    const int c = min_of(max_of(column - this_lane().column, 0), 4 * kCount);
    const int count = c / 8 * 2 + min_of(c % 8, 2);
    return count >= 32 ? 0xffffffffu : (1u << count) - 1;
  };
  static_assert(kCount <= 64);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint32_t seen = below(end_key(band, query + 8 * r) - key);
    if (band.window_left < kUnbounded) seen &= ~below(first_key(band, query + 8 * r) - key);
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (row_of(i) == r && !(seen >> (i / 4 * 2 + i % 2) & 1)) s[i] = -INFINITY;
  }
}

// A scaled score with softcap (0: none) and ALiBi, ready for 2^s. slope is the head's, times log2(e); distance is key minus query.
__device__ __forceinline__ float modify(float x, float softcap, float slope, int distance) {
  if (softcap > 0) {
    const float e = ptx::exp2(x * (2 * kLog2e / softcap));
    x = softcap - 2 * softcap * __fdividef(1, 1 + e);  // tanh(y) = 1 - 2 / (1 + e^2y), to 1e-7 everywhere
  }
  return x * kLog2e - slope * fabsf(static_cast<float>(distance));
}
template <int kCount>
__device__ __forceinline__ void modify_block(float (&s)[kCount], float scale, float softcap, float slope, int query_position, int key) {
  const int column = key + this_lane().column - query_position;
#pragma unroll
  for (int i = 0; i < kCount; ++i) s[i] = modify(s[i] * scale, softcap, slope, column + column_of(i) - 8 * row_of(i));
}

}  // namespace tilewise::tile
