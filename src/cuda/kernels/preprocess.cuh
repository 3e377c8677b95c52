// Around the backward kernel. Before it: delta and lse of every row, zeros in dq's sums, in the counters and in rows of gradients that take
// no part, and the order of packed sequences' blocks. After it: dsink, and rows of dq, dk and dv that are not finite and should be.
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

// What the backward kernel needs of row `row` of the workspace: -lse in units of log2, and -delta.
__device__ __forceinline__ void write_row(const BackwardParams& p, long long row, float lse, float delta) {
  if (p.addends) {
    const int inside = static_cast<int>(row) & (p.block_m - 1);  // of a step
    uint4* addends = reinterpret_cast<uint4*>(p.addends) + 2 * row - inside;
    addends[0] = split(lse / (2 * p.scale_log2));
    addends[p.block_m] = split(delta / 2);
  } else {
    const int inside = static_cast<int>(row) & (kBlockM - 1);
    float* rows = p.rows + 2 * (row - inside) + row_place(inside);
    rows[0] = lse;
    rows[kBlockM] = delta;
  }
}

// Zeros in rows of a gradient from `begin` to `end` that are not among those from first to last, by one warp.
__device__ __forceinline__ void clear_rows(const Elements& to, bool packed, int batch, long long row, int head, int columns, int begin,
                                           int end, int first, int last) {
  const int units = columns / 8;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) % 32; i < (end - begin) * units; i += 32) {
    const int at = begin + i / units;
    if (at >= first && at < last) continue;
    *reinterpret_cast<uint4*>(row_of(to, packed, batch, row + at, head) + i % units * 8) = make_uint4(0, 0, 0, 0);
  }
}

// Zeros in rows of dk and dv that take no part, of a tile. By one warp.
__device__ __forceinline__ void clear_keys(const BackwardParams& p, int index) {
  const RowTile at = find_key_tile(p, index);
  if (at.batch < 0) return;
  const Sequence whole = whole_sequence(p, at.batch);
  const Trimmed part = trimmed_sequence(p, at.batch);
  const int begin = at.tile * kBlockM, end = min_of(begin + kBlockM, whole.seqlen_k), last = part.k_begin + part.sequence.seqlen_k;
  if (begin >= part.k_begin && end <= last) return;
  const bool packed = p.cu_seqlens_k != nullptr;
  clear_rows(p.dk, packed, at.batch, whole.k_row, at.head, p.head_dim, begin, end, part.k_begin, last);
  clear_rows(p.dv, packed, at.batch, whole.k_row, at.head, p.head_dim_v, begin, end, part.k_begin, last);
}

// Half a tile of rows by one warp, and zeros in its sums of dq. Four rows are read at a time, by eight lanes each, and as many times
// together as kRegisters hold. One of the eight lanes keeps the row's delta, so that each has one in the end. head_dim_v is at most
// kColumns.
template <ptx::Element kElement, int kColumns, int kRegisters>
__device__ __forceinline__ void preprocess_rows(const BackwardParams& p, int index) {
  constexpr int kRuns = (kColumns + 63) / 64, kAtOnce = kRegisters / (8 * kRuns);
  static_assert(kWarpRows / 4 % kAtOnce == 0);
  const int thread = static_cast<int>(threadIdx.x) % 32, lane = thread % 8, group = thread / 8;
  if (index / 2 < p.ring * p.group * p.q_tiles) {
    const int fours = kWarpRows * p.sum_columns / 4;
    float4* sum = reinterpret_cast<float4*>(p.dq_sum) + static_cast<long long>(index) * fours;
#pragma unroll 4
    for (int i = thread; i < fours; i += 32) sum[i] = make_float4(0, 0, 0, 0);
  }
  const RowTile at = find_tile(p, index / 2);
  if (at.batch < 0) {
    if (p.dsink && thread == 0) p.dsink_sum[index] = 0;  // packed: the workspace's tile is index / 2
    return;
  }
  const bool packed = p.cu_seqlens_q != nullptr;
  const Sequence whole = whole_sequence(p, at.batch);
  const int begin = at.tile * kBlockM + index % 2 * kWarpRows, left = whole.seqlen_q - begin;  // rows from here on
  const int mine = 4 * lane + group;
  const long long mine_row = whole.q_row + begin + mine;
  const float lse = mine < left ? p.lse[(packed ? 0 : at.batch * p.lse_batch) + at.head * p.lse_head + mine_row] : 0;
  const float dlse = mine < left && p.dlse ? p.dlse[(packed ? 0 : at.batch * p.dlse_batch) + at.head * p.dlse_head + mine_row] : 0;
  const uint16_t* o = row_of(p.o, packed, at.batch, whole.q_row + begin + group, at.head) + lane * 8;
  const uint16_t* grad = row_of(p.do_, packed, at.batch, whole.q_row + begin + group, at.head) + lane * 8;
  const long long o_step = 4 * p.o.row, grad_step = 4 * p.do_.row;
  float delta = 0;
#pragma unroll 1
  for (int i = 0; i < kWarpRows / 4; i += kAtOnce) {
    uint4 x[kAtOnce][kRuns], y[kAtOnce][kRuns];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j, o += o_step, grad += grad_step)
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        const bool there = 4 * (i + j) + group < left && run * 64 + lane * 8 < p.head_dim_v;
        x[j][run] = there ? __ldcs(reinterpret_cast<const uint4*>(o + run * 64)) : make_uint4(0, 0, 0, 0);
        y[j][run] = there ? *reinterpret_cast<const uint4*>(grad + run * 64) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      float sum = 0;
#pragma unroll
      for (int run = 0; run < kRuns; ++run) sum += tile::dot<kElement>(x[j][run], y[j][run]);
#pragma unroll
      for (int distance = 1; distance < 8; distance *= 2) sum += __shfl_xor_sync(0xffffffff, sum, distance);
      if (lane == i + j) delta = sum;
    }
  }
  delta -= dlse;
  const Trimmed part = trimmed_sequence(p, at.batch);
  const int q_begin = part.q_begin, seqlen = part.sequence.seqlen_q, row = begin + mine, r = row - q_begin;
  const long long tile = at.head * p.tiles + first_tile(p, whole.q_row, at.batch);  // the sequence's first, in the workspace
  const bool sees = lse != -INFINITY;  // a row whose scores are all -inf gives and takes nothing
  if (r >= 0 && r < seqlen) write_row(p, tile * kBlockM + r, sees ? -lse * kLog2e : -INFINITY, sees ? -delta : 0);
  if (row >= seqlen) write_row(p, tile * kBlockM + row, -INFINITY, 0);  // past the end of those that take part: p = 0
  const int end = begin + min_of(kWarpRows, left);
  if (!p.accumulate && (begin < q_begin || end > q_begin + seqlen))
    clear_rows(p.dq, packed, at.batch, whole.q_row, at.head, p.head_dim, begin, end, q_begin, q_begin + seqlen);
  if (!p.dsink) return;
  const float sink = p.sink[at.head];
  float dsink = mine < left && sink != -INFINITY ? -ptx::exp2((sink - lse) * kLog2e) * delta : 0;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) dsink += __shfl_xor_sync(0xffffffff, dsink, distance);
  if (thread == 0) p.dsink_sum[(tile + at.tile) * 2 + index % 2] = dsink;
}

// Packed: where the blocks of sequence b come in the order of works. Sequences with many queries come first, so that the very last works
// are short. b == batch: the entries that are left, which are nobody's. By one warp, which looks at all sequences: with 10,000 of them some
// tens of microseconds in all, by estimate.
__device__ __forceinline__ void list_blocks(const BackwardParams& p, int b) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto queries = [&](int i) { return i < p.batch ? p.cu_seqlens_q[i + 1] - p.cu_seqlens_q[i] : -1; };
  const auto blocks_of = [&](int i) { return ceil_div(p.cu_seqlens_k[i + 1] - p.cu_seqlens_k[i], p.block_n); };
  int begin = 0;
  for (int other = lane; other < p.batch; other += 32)
    if (queries(other) > queries(b) || (queries(other) == queries(b) && other < b)) begin += blocks_of(other);
  begin = __reduce_add_sync(0xffffffff, begin);
  const int blocks = b < p.batch ? blocks_of(b) : p.k_blocks - begin;
  for (int i = lane; i < blocks; i += 32)
    p.block_order[begin + i] = b < p.batch ? Place{b, p.deterministic ? blocks - 1 - i : i, blocks} : Place{-1, 0, 0};
}

// The rows of the first units, the last ones first: what the next kernel begins with is then still in L2. Zeros in counters, and in rows of
// dk and dv that take no part. Four CTAs on an SM have 64 registers for loads; in the next kernel, of 1,024 threads, there are 32.
template <ptx::Element kElement, int kColumns>
__global__ void __launch_bounds__(kPreprocessThreads, 4) backward_preprocess(const __grid_constant__ BackwardParams p) {
  ptx::launch_dependents();
  constexpr int kWarps = kPreprocessThreads / 32;
  const int index = static_cast<int>(gridDim.x - 1 - blockIdx.x), warp = index * kWarps + static_cast<int>(threadIdx.x) / 32;
  const long long threads = static_cast<long long>(gridDim.x) * kPreprocessThreads;
  for (long long i = static_cast<long long>(index) * kPreprocessThreads + threadIdx.x; i < p.zeros; i += threads)
    reinterpret_cast<uint4*>(p.turn)[i] = make_uint4(0, 0, 0, 0);
  const int warps = static_cast<int>(gridDim.x) * kWarps;
  if (p.cu_seqlens_k && p.works > 0)
    for (int b = warps - 1 - warp; b <= p.batch; b += warps) list_blocks(p, b);  // by who begins first
  if (warp / 2 < (p.ahead < p.units ? p.ahead * p.group * p.q_tiles : p.num_heads * p.tiles))
    preprocess_rows<kElement, kColumns, 64>(p, warp);
  const bool all_keys = p.alike && p.part.sequence.seqlen_k == p.seqlen_k;
  if (all_keys || p.accumulate) return;
  for (long long i = warp; i < p.num_heads / p.group * p.key_tiles; i += warps) clear_keys(p, static_cast<int>(i));
}

// The rows of all other units, by CTAs that have an SM each, while the other SMs begin with the works of the first ones: those wait for
// this kernel unit by unit, and begin when all of its CTAs run.
template <ptx::Element kElement, int kColumns>
__global__ void __launch_bounds__(kRestThreads, 1) backward_preprocess_rest(const __grid_constant__ BackwardParams p) {
  // Only then may the next kernel begin: it does not wait for the first one, and would find the counters of the run before.
  ptx::wait_for_previous();
  if (blockIdx.x == 0 && threadIdx.x == 0) ptx::add_release(&p.counters->begun, 1);
  ptx::launch_dependents();
  const long long unit = 2 * p.group * p.q_tiles;  // its halves of tiles
#pragma unroll 1
  for (long long i = p.ahead * unit + threadIdx.x / 32 * gridDim.x + blockIdx.x; i < 2 * p.num_heads * p.tiles;
       i += gridDim.x * (kRestThreads / 32)) {
    preprocess_rows<kElement, kColumns, 32>(p, static_cast<int>(i));
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::add_release(&p.progress[i / unit].ready, 1);
  }
}

// dsink of a head: its tiles' sums in a fixed order. By 128 threads.
__device__ __forceinline__ void write_dsink(const BackwardParams& p, int head) {
  const int thread = static_cast<int>(threadIdx.x);
  const float* sums = p.dsink_sum + head * p.tiles * 2;
  double sum = 0;
#pragma unroll 4
  for (long long i = thread; i < p.tiles * 2; i += 128) sum += static_cast<double>(sums[i]);
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
