// What is done about finished rows that are NaN, by one warp. Three things make them so: NaN or infinities that they see, in which case all
// is well; a sum that outgrew float; and in blocks at the mask's edge, which are multiplied whole, a value that is not finite times the 0
// of a pair that is not visible. To compute a row anew takes thousands of times what it took before, so the first is looked for where it
// costs little.
#pragma once

#include "core/mask.h"
#include "cuda/kernels/forward_shared.cuh"
#include "cuda/ptx/scalar.cuh"
#include "cuda/tile/dot.cuh"
#include "cuda/tile/rows.cuh"

namespace tilewise {

template <ForwardConfig C>
struct Repair {
  using Shared = ForwardShared<C>;
  using Item = WorkItem<C.consumers>;
  using O = typename Shared::O;

  const ForwardParams& params;
  Shared& shared;
  const Item& item;
  const int part, piece;
  const int kv_head = item.head / params.group;

  // Few registers are left for this: what can be found again is not kept.
  __device__ __forceinline__ static int lane() { return ptx::thread_anew() % 32; }
  __device__ __forceinline__ int first_column() const { return piece * O::kColumns; }  // of o and v
  __device__ __forceinline__ int columns() const { return min_of(O::kColumns, params.head_dim_v - first_column()); }
  __device__ __forceinline__ uint16_t& at(int query, int column) const {
    return shared.o[Shared::o_slot(part)][piece].at((query - item.m_begin) % 64, column);
  }
  __device__ __forceinline__ float& lse(int query) const { return shared.lse[part][(query - item.m_begin) % 64]; }
  __device__ __forceinline__ const uint16_t* row_of(const Elements& t, long long row, int head) const {
    return static_cast<const uint16_t*>(t.data) + (params.cu_seqlens_q ? 0 : item.batch * t.batch) + row * t.row + head * t.head;
  }
  __device__ __forceinline__ const uint16_t* key_row(const Elements& t, int key) const {
    return row_of(t, item.sequence.k_row + key, kv_head);
  }
  __device__ __forceinline__ static float element(const uint16_t* row, int column) { return ptx::to_float<C.element>(row[column]); }

  // The first of the keys from `begin` to `end` with an element that is NaN, or with kInfinite not finite, in `count` columns from `column`
  // on; `end`: none.
  template <bool kInfinite>
  __device__ __forceinline__ int find(const Elements& t, int begin, int end, int column, int count) const {
    const int units = count / 8, rows = 32 / units, mine = lane() / units;  // 16 bytes a lane
#pragma unroll 1
    for (int key = begin; key < end; key += rows) {
      bool bad = false;
      if (mine < rows && key + mine < end) {
        const uint4 x = *reinterpret_cast<const uint4*>(key_row(t, key + mine) + column + lane() % units * 8);
        bad = ptx::has_nan<C.element, kInfinite>(x.x) || ptx::has_nan<C.element, kInfinite>(x.y) ||
              ptx::has_nan<C.element, kInfinite>(x.z) || ptx::has_nan<C.element, kInfinite>(x.w);
      }
      if (const unsigned found = __ballot_sync(0xffffffff, bad)) return key + (__ffs(found) - 1) / units;
    }
    return end;
  }
  // Of one key, by one lane.
  __device__ __forceinline__ float score(int query, int key) const {
    const uint16_t *q = row_of(params.q, item.sequence.q_row + query, item.head), *k = key_row(params.k, key);
    float sum = 0;
#pragma unroll 1
    for (int d = 0; d < params.head_dim; d += 8) {
      const uint4 a = *reinterpret_cast<const uint4*>(q + d), b = *reinterpret_cast<const uint4*>(k + d);
      sum += tile::dot<C.element>(a, b);
    }
    const float slope = params.alibi_slopes ? params.alibi_slopes[item.batch * params.alibi_batch + item.head] * kLog2e : 0;
    return tile::modify(sum * params.scale, params.softcap, slope, key - query - item.band.offset);
  }
  // A row anew with plain arithmetic from the keys that it sees and no others: its columns of o, and lse where that is not finite. Each
  // lane has the score of one of 32 keys, then its columns of all of them.
  __device__ __forceinline__ void compute(int query, int begin, int end) const {
    constexpr int kRuns = O::kColumns / 32;
    const bool known = fabsf(lse(query)) < INFINITY;
    float max = lse(query) * kLog2e;
    bool finite = true;  // so far: scores of NaN or +inf make all of the row NaN
    if (!known) {
      max = -INFINITY;
#pragma unroll 1
      for (int first = begin; finite && first < end; first += 32) {
        const float x = first + lane() < end ? score(query, first + lane()) : -INFINITY;
        finite = __all_sync(0xffffffff, x < INFINITY);
        max = fmaxf(max, x);
      }
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, distance));
      if (params.sink) max = fmaxf(max, params.sink[item.head] * kLog2e);
    }
    const float shift = max == -INFINITY ? 0 : max;
    float o[kRuns] = {}, sum = finite ? 0 : NAN;
#pragma unroll 1
    for (int first = begin; finite && first < end; first += 32) {
      const int count = min_of(end - first, 32);
      const float weight = lane() < count ? ptx::exp2(score(query, first + lane()) - shift) : 0;
      sum += weight;
      bool open = false;
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        const float w = __shfl_sync(0xffffffff, weight, i);
        const uint16_t* v = key_row(params.v, first + i) + first_column();
#pragma unroll
        for (int run = 0; run < kRuns; ++run)
          if (32 * run + lane() < columns()) o[run] += w * element(v, 32 * run + lane());
      }
#pragma unroll
      for (int run = 0; run < kRuns; ++run) open |= o[run] == o[run] && 32 * run + lane() < columns();
      if (!__any_sync(0xffffffff, open) && (known || __any_sync(0xffffffff, !(sum == sum)))) break;  // nothing can change any more
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffff, sum, distance);
    // Who sees nothing has the sink as lse, whatever it is.
    if (begin < end && params.sink) sum += ptx::exp2(params.sink[item.head] * kLog2e - shift);
    if (begin >= end) max = params.sink ? params.sink[item.head] * kLog2e : -INFINITY, sum = 1;
#pragma unroll
    for (int run = 0; run < kRuns; ++run)
      if (const int column = 32 * run + lane(); column < columns())
        at(query, column) = static_cast<uint16_t>(ptx::pack<C.element>(sum == 0 ? 0 : o[run] / sum, 0));
    __syncwarp();
    // With the last columns: that it was not finite says of the others, too, that they are to be computed anew.
    if (!known && lane() == 0 && first_column() + O::kColumns >= params.head_dim_v) lse(query) = (max + log2f(sum)) * kLn2;
  }

  // Whether a row has NaN, and whether all of it is so in the first or last value that the row sees.
  __device__ __forceinline__ bool is_nan(int query) const {
    bool nan = false;
#pragma unroll 1
    for (int column = lane(); column < columns(); column += 32) nan |= !(element(&at(query, column), 0) == element(&at(query, column), 0));
    return __any_sync(0xffffffff, nan);
  }
  __device__ __forceinline__ bool is_seen(int query, int begin, int end) const {
    bool all = true;
#pragma unroll 1
    for (int column = lane(); column < columns(); column += 32) {
      const float o = element(&at(query, column), 0), first = element(key_row(params.v, begin), first_column() + column);
      const float last = element(key_row(params.v, end - 1), first_column() + column);
      all &= o == o || !(first == first) || !(last == last);
    }
    return __all_sync(0xffffffff, all);
  }
  __device__ __forceinline__ bool query_is_nan(int query) const {
    const uint16_t* q = row_of(params.q, item.sequence.q_row + query, item.head);
    bool nan = false;
#pragma unroll 1
    for (int d = lane(); d < params.head_dim; d += 32) nan |= !(element(q, d) == element(q, d));
    return __any_sync(0xffffffff, nan);
  }
  // All rows of the part's tile.
  __device__ __forceinline__ void run() const {
    const int first = item.m_begin + 64 * part, end_query = min_of(first + 64, item.sequence.seqlen_q);
    // Keys that some rows see and others do not: all but those from `inner` to `outer`.
    const int keys_begin = item.part[part].begin * C.block_n, keys_end = min_of(item.part[part].end * C.block_n, item.sequence.seqlen_k);
    const int inner = min_of(max_of(first_key(item.band, end_query - 1), keys_begin), keys_end);
    const int outer = max_of(min_of(end_key(item.band, first), keys_end), inner);
    const bool edge = find<true>(params.v, keys_begin, inner, first_column(), columns()) < inner ||
                      find<true>(params.v, outer, keys_end, first_column(), columns()) < keys_end;
    int spoilt_key = -1;  // the first with NaN, when it has been looked for
#pragma unroll 1
    for (int query = first; query < end_query; ++query) {
      if (!is_nan(query)) continue;
      const int begin = first_key(item.band, query), end = end_key(item.band, query);
      if (begin < end && fabsf(lse(query)) < INFINITY) {
        if (!edge || is_seen(query, begin, end)) continue;
      } else if (begin < end) {
        if (query_is_nan(query)) continue;
        if (spoilt_key < 0) spoilt_key = find<false>(params.k, keys_begin, keys_end, 0, params.head_dim);
        if (spoilt_key >= begin && spoilt_key < end) continue;
      }
      compute(query, begin, end);
      __syncwarp();
    }
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
    __syncwarp();
  }
};

}  // namespace tilewise
