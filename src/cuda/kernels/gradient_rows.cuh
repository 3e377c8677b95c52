// Rows of gradients anew with plain arithmetic, from the pairs that are visible and no others. The products of a tile at the mask's edge
// multiply what a row does not see with 0: where that is NaN or infinite, the row's sum is NaN and must not be. Such rows are rare; a warp
// looks whether that was the cause, and if so sums again.
#pragma once

#include "cuda/kernels/gradient_work.cuh"
#include "cuda/ptx/scalar.cuh"
#include "cuda/tile/dot.cuh"

namespace tilewise {

template <ptx::Element kElement>
struct PlainGradients {
  const BackwardParams& params;
  const Trimmed& part;
  const int batch;
  const bool packed = params.cu_seqlens_q != nullptr;
  const int lane = static_cast<int>(threadIdx.x) % 32;

  __device__ float element(const Elements& t, long long row, int head, int column) const {
    return ptx::to_float<kElement>(row_of(t, packed, batch, row, head)[column]);
  }
  static __device__ float sum_of_lanes(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffff, x, distance);
    return x;
  }
  // Of two rows, by one lane.
  __device__ float dot(const Elements& a, long long row_a, int head_a, const Elements& b, long long row_b, int head_b, int columns) const {
    const uint16_t *x = row_of(a, packed, batch, row_a, head_a), *y = row_of(b, packed, batch, row_b, head_b);
    float sum = 0;
#pragma unroll 2
    for (int c = 0; c < columns; c += 8)
      sum += tile::dot<kElement>(*reinterpret_cast<const uint4*>(x + c), *reinterpret_cast<const uint4*>(y + c));
    return sum;
  }
  // Whether a value in the rows from `begin` to `end` is NaN or infinite.
  __device__ bool taints(const Elements& t, long long first_row, int begin, int end, int head, int columns) const {
    float zero = 0;
#pragma unroll 1
    for (int row = begin; row < end; ++row)
#pragma unroll 1
      for (int c = lane; c < columns; c += 32) zero += 0 * element(t, first_row + row, head, c);
    return !(sum_of_lanes(zero) == 0);
  }

  struct Pair {
    float p, ds;  // the probability, and the gradient of the score
  };
  // By one lane.
  __device__ Pair pair(int head, int query, int key) const {
    const long long q_row = part.sequence.q_row + query, k_row = part.sequence.k_row + key;
    const int kv_head = head / params.group;
    const float score = dot(params.q, q_row, head, params.k, k_row, kv_head, params.head_dim);
    const float dp = dot(params.do_, q_row, head, params.v, k_row, kv_head, params.head_dim_v);
    float x = score * params.scale_log2, slope = 1;
    if (params.softcap_log2 > 0) {
      const float tanh = 1 - 2 * __fdividef(1, 1 + ptx::exp2(score * params.tanh_factor));
      slope = 1 - tanh * tanh;
      x = params.softcap_log2 * tanh;
    }
    if (params.alibi_slopes)
      x -= params.alibi_slopes[batch * params.alibi_batch + head] * kLog2e * fabsf(static_cast<float>(key - query - part.band.offset));
    const float lse = params.lse[(packed ? 0 : batch * params.lse_batch) + head * params.lse_head + q_row];
    if (lse == -INFINITY) return {0, 0};
    float delta = dot(params.o, q_row, head, params.do_, q_row, head, params.head_dim_v);
    if (params.dlse) delta -= params.dlse[(packed ? 0 : batch * params.dlse_batch) + head * params.dlse_head + q_row];
    const float p = ptx::exp2(x - lse * kLog2e);
    return {p, p * (dp - delta) * slope};
  }

  // Sums of a row's columns, 32 of them in each run: a lane has one of each.
  static constexpr int kRuns = 8;
  // Those of a lane's columns, as bits, that are not finite in the row as it was written: all others are right. Of rows that are added to,
  // nothing was.
  __device__ unsigned wrong_columns(const Elements& to, long long row, int head, int columns) const {
    unsigned wrong = 0;
#pragma unroll
    for (int run = 0; run < kRuns; ++run)
      if (const int column = 32 * run + lane; column < columns)
        wrong |= (params.accumulate || !(fabsf(element(to, row, head, column)) < INFINITY) ? 1u : 0u) << run;
    return wrong;
  }
  // Adds rows `first` to `last` of `from`, each times weight(row), which a lane finds for one of 32. False: all of the `wrong` columns are
  // NaN already.
  template <class Weight>
  __device__ bool add_rows(float (&sum)[kRuns], int first, int last, const Elements& from, long long from_row, int head, int columns,
                           unsigned wrong, const Weight& weight) const {
#pragma unroll 1
    for (int row = first; row < last; row += 32) {
      const int count = min_of(last - row, 32);
      const float mine = lane < count ? weight(row + lane) : 0;
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        const float x = __shfl_sync(0xffffffff, mine, i);
        const uint16_t* elements = row_of(from, packed, batch, from_row + row + i, head);
#pragma unroll
        for (int run = 0; run < kRuns; ++run)
          if (const int column = 32 * run + lane; column < columns) sum[run] += x * ptx::to_float<kElement>(elements[column]);
      }
      bool open = false;
#pragma unroll
      for (int run = 0; run < kRuns; ++run) open |= (wrong >> run & 1) && sum[run] == sum[run];
      if (!__any_sync(0xffffffff, open)) return false;
    }
    return true;
  }

  // Writes the `wrong` columns of a row.
  __device__ void write_row(const Elements& to, long long row, int head, unsigned wrong, const float (&sum)[kRuns], float factor) const {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      if (!(wrong >> run & 1)) continue;
      const int column = 32 * run + lane;
      if (params.accumulate)
        row_of<float>(to, packed, batch, row, head)[column] += sum[run] * factor;
      else
        row_of(to, packed, batch, row, head)[column] = static_cast<uint16_t>(ptx::pack<kElement>(sum[run] * factor, 0));
    }
  }

  // A row of dq that is not finite in these runs of 32 columns, as bits.
  __device__ void repair_dq(int head, int query, unsigned runs) const {
    const int begin = query / params.block_m * params.block_m, end = min_of(begin + params.block_m, part.band.seqlen_q);
    const int first = first_key(part.band, query), last = end_key(part.band, query), block_n = params.block_n,
              kv_head = head / params.group;
    const int keys_begin = first_key(part.band, begin) / block_n * block_n;  // whole blocks are multiplied, with 0 where nothing is seen
    const int keys_end = min_of(ceil_div(end_key(part.band, end - 1), block_n) * block_n, part.band.seqlen_k);
    const long long k_row = part.sequence.k_row;
    if (!params.accumulate && !taints(params.k, k_row, keys_begin, first, kv_head, params.head_dim) &&
        !taints(params.k, k_row, last, keys_end, kv_head, params.head_dim))
      return;
    const long long row = part.sequence.q_row + query;
    const unsigned wrong = runs & wrong_columns(params.dq, row, head, params.head_dim);
    float sum[kRuns] = {};
    add_rows(sum, first, last, params.k, k_row, kv_head, params.head_dim, wrong, [&](int key) { return pair(head, query, key).ds; });
    write_row(params.dq, row, head, wrong, sum, params.scale);
  }
  // A row of dk (which 0) or of dv (1) that is not finite.
  __device__ void repair_key(int which, int kv_head, int key) const {
    const bool dk = which == 0;
    const Elements& from = dk ? params.q : params.do_;
    const int head_dim = dk ? params.head_dim : params.head_dim_v;
    const int begin = key / 64 * 64, end = min_of(begin + 64, part.band.seqlen_k), block_m = params.block_m;
    const int first = first_query(part.band, key), last = end_query(part.band, key);
    const int queries_begin = first_query(part.band, begin) / block_m * block_m;
    const int queries_end = min_of(ceil_div(end_query(part.band, end - 1), block_m) * block_m, part.band.seqlen_q);
    bool tainted = params.accumulate;
    for (int head = kv_head * params.group; !tainted && head < (kv_head + 1) * params.group; ++head)
      tainted = taints(from, part.sequence.q_row, queries_begin, first, head, head_dim) ||
                taints(from, part.sequence.q_row, last, queries_end, head, head_dim);
    if (!tainted) return;
    const Elements& to = dk ? params.dk : params.dv;
    const long long row = part.sequence.k_row + key;
    const unsigned wrong = wrong_columns(to, row, kv_head, head_dim);
    float sum[kRuns] = {};
    bool open = true;
#pragma unroll 1
    for (int head = kv_head * params.group; open && head < (kv_head + 1) * params.group; ++head)
      open = add_rows(sum, first, last, from, part.sequence.q_row, head, head_dim, wrong, [&](int query) {
        const Pair x = pair(head, query, key);
        return dk ? x.ds : x.p;
      });
    write_row(to, row, kv_head, wrong, sum, dk ? params.scale : 1);
  }
};

}  // namespace tilewise
