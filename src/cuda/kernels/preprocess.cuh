// Around the backward kernel. Before it: delta and lse of every row, zeros in dq's sums, in the counters and in rows of gradients that take
// no part. After it: dsink, and rows of dq, dk and dv that are not finite and should be.
#pragma once

#include "cuda/kernels/gradient_rows.cuh"
#include "cuda/kernels/gradient_work.cuh"
#include "cuda/ptx/scalar.cuh"
#include "cuda/tile/shared.cuh"

namespace tilewise {

// Tile number `index` of 64 rows: tiles, then heads, then sequences. By whole warps. batch is -1 where there is none.
struct RowTile {
  int batch, head, tile;
};
__device__ __forceinline__ RowTile find_tile(const BackwardParams& p, int index) {
  if (index >= p.num_heads * p.tiles) return {-1, 0, 0};
  const int head = index / p.q_tiles, tile = index % p.q_tiles;
  if (!p.cu_seqlens_q) return {head / p.num_heads, head % p.num_heads, tile};
  const int tiles = p.block_m / kBlockM;
  const Place place = find_place(p.cu_seqlens_q, p.batch, p.block_m, tile / tiles);
  return {place.batch, head, place.block * tiles + tile % tiles};
}

// And its tile of keys.
__device__ __forceinline__ RowTile find_key_tile(const BackwardParams& p, int index) {
  const int heads = p.num_heads / p.group;
  if (index >= heads * p.key_tiles) return {-1, 0, 0};
  const int head = index / p.k_tiles, tile = index % p.k_tiles;
  if (!p.cu_seqlens_k) return {head / heads, head % heads, tile};
  const Place place = find_place(p.cu_seqlens_k, p.batch, kBlockM, tile);
  return {place.batch, head, place.block};
}

// Three bfloat16 whose sum is x to 24 bits, and zeros.
__device__ __forceinline__ uint4 split(float x) {
  constexpr auto kElement = ptx::Element::kBFloat16;
  const uint32_t high = ptx::pack<kElement>(x, 0);
  if (!(fabsf(x) < INFINITY)) return make_uint4(high, 0, 0, 0);
  x -= ptx::to_float<kElement>(static_cast<uint16_t>(high));
  const uint32_t middle = ptx::pack<kElement>(x, 0);
  x -= ptx::to_float<kElement>(static_cast<uint16_t>(middle));
  return make_uint4(high | middle << 16, ptx::pack<kElement>(x, 0), 0, 0);
}

// What the backward kernel needs of a row of a tile, by the first two of eight lanes.
__device__ __forceinline__ void write_row(const BackwardParams& p, long long tile, int row, float lse, float delta, int lane) {
  if (lane > 1) return;
  const float x = lane == 0 ? lse : delta;
  if (p.addends) {
    const int tiles = p.block_m / kBlockM, inside = static_cast<int>(tile) & (tiles - 1);  // of a step, which has one or two
    uint4* addends = reinterpret_cast<uint4*>(p.addends + (tile - inside) * kAddendBytes) + inside * kBlockM;
    addends[lane * tiles * kBlockM + row] = split(lane == 0 ? x / (2 * p.scale_log2) : x / 2);
  } else {
    p.rows[tile * kRowFloats + lane * kBlockM + row_place(row)] = x;
  }
}

// Zeros in rows of dk and dv that take no part, of a tile.
__device__ __forceinline__ void clear_keys(const BackwardParams& p, int index) {
  const RowTile at = find_key_tile(p, index);
  if (at.batch < 0) return;
  const Sequence whole = whole_sequence(p, at.batch);
  const Trimmed part = trimmed_sequence(p, at.batch);
  const int first = at.tile * kBlockM, end = min_of(first + kBlockM, whole.seqlen_k), units = max_of(p.head_dim, p.head_dim_v) / 8;
  if (first >= part.k_begin && end <= part.k_begin + part.sequence.seqlen_k) return;
  const bool packed = p.cu_seqlens_k != nullptr;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < (end - first) * units; i += kPreprocessThreads) {
    const int row = first + i / units, column = i % units * 8;
    if (row >= part.k_begin && row < part.k_begin + part.sequence.seqlen_k) continue;
    const auto clear = [&](const Elements& to, int columns) {
      if (column < columns)
        *reinterpret_cast<uint4*>(row_of(to, packed, at.batch, whole.k_row + row, at.head) + column) = make_uint4(0, 0, 0, 0);
    };
    clear(p.dk, p.head_dim);
    clear(p.dv, p.head_dim_v);
  }
}

// CTAs on an SM at a time, of which registers hold the loads. At 64 columns six are faster than four, though seven registers are spilled.
constexpr int preprocess_ctas(int columns) { return columns <= 64 ? 6 : columns <= 128 ? 3 : 2; }
// A CTA has one tile of rows, the last one first: what the next kernel begins with is then still in L2. Eight threads have a row, in two
// passes; all their loads are issued before anything else is done. head_dim_v is at most kColumns.
template <ptx::Element kElement, int kColumns>
__global__ void __launch_bounds__(kPreprocessThreads, preprocess_ctas(kColumns))
    backward_preprocess(const __grid_constant__ BackwardParams p) {
  ptx::launch_dependents();
  constexpr int kPassRows = kPreprocessThreads / 8, kPasses = kBlockM / kPassRows, kRuns = (kColumns + 63) / 64;
  const int index = static_cast<int>(gridDim.x - 1 - blockIdx.x), thread = static_cast<int>(threadIdx.x), lane = thread % 8;
  const RowTile at = find_tile(p, index);
  const bool packed = p.cu_seqlens_q != nullptr;
  Sequence whole{};
  uint4 o[kPasses][kRuns], grad[kPasses][kRuns];
  float lse[kPasses], dlse[kPasses];
  if (at.batch >= 0) {
    whole = whole_sequence(p, at.batch);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = at.tile * kBlockM + pass * kPassRows + thread / 8;
      const bool inside = row < whole.seqlen_q;
      const uint16_t* o_row = row_of(p.o, packed, at.batch, whole.q_row + row, at.head) + lane * 8;
      const uint16_t* grad_row = row_of(p.do_, packed, at.batch, whole.q_row + row, at.head) + lane * 8;
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        const bool there = inside && run * 64 + lane * 8 < p.head_dim_v;
        o[pass][run] = there ? __ldcs(reinterpret_cast<const uint4*>(o_row + run * 64)) : make_uint4(0, 0, 0, 0);
        grad[pass][run] = there ? *reinterpret_cast<const uint4*>(grad_row + run * 64) : make_uint4(0, 0, 0, 0);
      }
      lse[pass] = inside ? p.lse[(packed ? 0 : at.batch * p.lse_batch) + at.head * p.lse_head + whole.q_row + row] : 0;
      dlse[pass] = inside && p.dlse ? p.dlse[(packed ? 0 : at.batch * p.dlse_batch) + at.head * p.dlse_head + whole.q_row + row] : 0;
    }
  }

  const long long threads = static_cast<long long>(gridDim.x) * kPreprocessThreads;
  for (long long i = static_cast<long long>(index) * kPreprocessThreads + thread; i < p.zeros; i += threads)
    reinterpret_cast<uint4*>(p.turn)[i] = make_uint4(0, 0, 0, 0);
  if (index < p.ring * p.group * p.q_tiles) {
    float4* sum = reinterpret_cast<float4*>(p.dq_sum + static_cast<long long>(index) * (kBlockM * p.sum_columns));
    for (int i = thread; i < kBlockM * p.sum_columns / 4; i += kPreprocessThreads) sum[i] = make_float4(0, 0, 0, 0);
  }
  const bool all_keys = p.alike && p.part.sequence.seqlen_k == p.seqlen_k;
  if (!all_keys && !p.accumulate) clear_keys(p, index);
  if (at.batch < 0) return;
  const Trimmed part = trimmed_sequence(p, at.batch);
  const long long tiles = at.head * p.tiles + first_tile(p, whole.q_row, at.batch);
  float dsink = 0;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int row = at.tile * kBlockM + pass * kPassRows + thread / 8;
    if (row >= part.sequence.seqlen_q) write_row(p, tiles + at.tile, row % kBlockM, -INFINITY, 0, lane);  // past the end: p = 0
    float delta = 0;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) delta += tile::dot<kElement>(o[pass][run], grad[pass][run]);
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2) delta += __shfl_xor_sync(0xffffffff, delta, distance);
    if (row >= whole.seqlen_q) continue;
    const int r = row - part.q_begin;  // of those that take part
    const bool takes_part = r >= 0 && r < part.sequence.seqlen_q;
    if (!takes_part && !p.accumulate)
      for (int column = lane * 8; column < p.head_dim; column += 64)
        *reinterpret_cast<uint4*>(row_of(p.dq, packed, at.batch, whole.q_row + row, at.head) + column) = make_uint4(0, 0, 0, 0);
    delta -= dlse[pass];
    if (p.dsink && lane == 0 && p.sink[at.head] != -INFINITY) dsink -= ptx::exp2((p.sink[at.head] - lse[pass]) * kLog2e) * delta;
    const bool sees = lse[pass] != -INFINITY;  // a row whose scores are all -inf gives and takes nothing
    if (takes_part) write_row(p, tiles + r / kBlockM, r % kBlockM, sees ? -lse[pass] * kLog2e : -INFINITY, sees ? -delta : 0, lane);
  }
  if (!p.dsink) return;
  __shared__ float warps[kPreprocessThreads / 32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) dsink += __shfl_xor_sync(0xffffffff, dsink, distance);
  if (thread % 32 == 0) warps[thread / 32] = dsink;
  __syncthreads();
  if (thread != 0) return;
  dsink = 0;
  for (const float warp : warps) dsink += warp;
  p.dsink_sum[tiles + at.tile] = dsink;
}

// dsink of a head: its tiles' sums in a fixed order. By 128 threads.
__device__ __forceinline__ void write_dsink(const BackwardParams& p, int head) {
  const int thread = static_cast<int>(threadIdx.x);
  double sum = 0;
  for (int b = 0; b < p.batch; ++b) {
    const Sequence whole = whole_sequence(p, b);
    const float* sums = p.dsink_sum + head * p.tiles + first_tile(p, whole.q_row, b);
    for (int i = thread; i < ceil_div(whole.seqlen_q, kBlockM); i += 128) sum += static_cast<double>(sums[i]);
  }
  __shared__ double warps[4];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffff, sum, distance);
  if (thread % 32 == 0) warps[thread / 32] = sum;
  __syncthreads();
  if (thread == 0) p.dsink[head] = static_cast<float>(warps[0] + warps[1] + warps[2] + warps[3]);
}

__device__ __forceinline__ bool is_spoilt(const SpoiltRows& rows, int warp, int row) { return rows.of[warp][row / 8] >> row % 8 * 4 & 1; }

// Rows that are not finite, in a tile of dq and in one of dk and dv, by 128 threads of which a warp has 16.
template <ptx::Element kElement>
__device__ __forceinline__ void repair_queries(const BackwardParams& p, int index, int head_dim) {
  const RowTile at = find_tile(p, index);
  if (at.batch < 0) return;
  const Trimmed part = trimmed_sequence(p, at.batch);
  const PlainGradients<kElement> plain{p, part, at.batch};
  const int warp = static_cast<int>(threadIdx.x) / 32, first = at.tile * kBlockM + 16 * warp, parts = head_dim / 32;
  if (at.tile * kBlockM >= part.sequence.seqlen_q) return;
  const long long tile = at.head * p.tiles + first_tile(p, whole_sequence(p, at.batch).q_row, at.batch) + at.tile;
#pragma unroll 1
  for (int row = 0; row < min_of(16, part.sequence.seqlen_q - first); ++row) {
    unsigned runs = 0;
    for (int i = 0; i < parts; ++i) runs |= is_spoilt(p.spoilt[tile * parts + i], warp, row) << i;
    if (runs) plain.repair_dq(at.head, first + row, runs);
  }
}
template <ptx::Element kElement>
__device__ __forceinline__ void repair_keys(const BackwardParams& p, int index) {
  const RowTile at = find_key_tile(p, index);
  if (at.batch < 0) return;
  const Trimmed part = trimmed_sequence(p, at.batch);
  const PlainGradients<kElement> plain{p, part, at.batch};
  const int warp = static_cast<int>(threadIdx.x) / 32, first = at.tile * kBlockM + 16 * warp;
  const long long tile = at.head * p.key_tiles + first_key_tile(p, whole_sequence(p, at.batch).k_row, at.batch) + at.tile;
#pragma unroll 1
  for (int which = 0; which < 2; ++which)
#pragma unroll 1
    for (int row = 0; row < min_of(16, part.sequence.seqlen_k - first); ++row)
      if (is_spoilt(p.spoilt_keys[tile].rows[which], warp, row)) plain.repair_key(which, at.head, first + row);
}

// The last num_heads CTAs write dsink. The others look after rows that are not finite, if there are any: a tile of dq, and one of dk and
// dv.
template <ptx::Element kElement>
__global__ void __launch_bounds__(kPostprocessThreads) backward_postprocess(const __grid_constant__ BackwardParams p, int head_dim) {
  ptx::wait_for_previous();
  const int ctas = static_cast<int>(gridDim.x) - (p.dsink ? p.num_heads : 0), index = static_cast<int>(blockIdx.x);
  if (index >= ctas) return write_dsink(p, index - ctas);
  if (p.counters->spoilt == 0) return;
  const int tiles = max_of(static_cast<int>(p.num_heads * p.tiles), static_cast<int>(p.num_heads / p.group * p.key_tiles));
#pragma unroll 1
  for (long long i = index; i < tiles; i += ctas) {
    repair_queries<kElement>(p, static_cast<int>(i), head_dim);
    repair_keys<kElement>(p, static_cast<int>(i));
  }
}

}  // namespace tilewise
