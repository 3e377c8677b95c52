// Around the backward kernel. Before it: delta and lse of every row, dq's sums set to 0. After it: dq from its sums, dsink, and rows
// of dq, dk and dv that are not finite and should be.
// A CTA has one tile of 64 rows of one head.
#pragma once

#include "cuda/kernels/gradient_rows.cuh"
#include "cuda/kernels/gradient_work.cuh"
#include "cuda/ptx/scalar.cuh"
#include "cuda/tile/fragment.cuh"
#include "cuda/tile/shared.cuh"
#include "cuda/tile/store_row.cuh"

namespace tilewise {

// A CTA's tile of rows: blockIdx.x counts tiles, then heads, then sequences, and all of that backwards: what the next kernel begins with is
// then still in L2. batch is -1 where there is none.
struct RowTile {
  int batch, head, tile;
};
__device__ __forceinline__ RowTile find_tile(const BackwardParams& p) {
  const int index = static_cast<int>(p.num_heads * p.tiles) - 1 - static_cast<int>(blockIdx.x);
  if (index < 0) return {-1, 0, 0};
  const int head = index / p.q_tiles, tile = index % p.q_tiles;
  if (!p.cu_seqlens_q) return {head / p.num_heads, head % p.num_heads, tile};
  const int tiles = p.block_m / kBlockM;
  const Place place = find_place(p.cu_seqlens_q, p.batch, p.block_m, tile / tiles);
  return {place.batch, head, place.block * tiles + tile % tiles};
}

// And its tile of keys.
__device__ __forceinline__ RowTile find_key_tile(const BackwardParams& p) {
  if (p.k_tiles == 0) return {-1, 0, 0};
  const auto index = static_cast<int>(blockIdx.x);
  const int heads = p.num_heads / p.group, head = index / p.k_tiles, tile = index % p.k_tiles;
  if (!p.cu_seqlens_k) return {head < p.batch * heads ? head / heads : -1, head % heads, tile};
  const Place place = find_place(p.cu_seqlens_k, p.batch, kBlockM, tile);
  return {head < heads ? place.batch : -1, head, place.block};
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

// What the backward kernel needs of a row of a tile.
__device__ __forceinline__ void write_row(const BackwardParams& p, long long tile, int row, float lse, float delta) {
  if (p.addends) {
    unsigned char* addends = p.addends + tile * kAddendBytes;
    for (const float x : {lse / p.scale_log2, delta}) {
      *reinterpret_cast<uint4*>(addends + tile::narrow_offset(row, 0)) = split(x);
      *reinterpret_cast<uint4*>(addends + tile::narrow_offset(row, 1)) = make_uint4(0, 0, 0, 0);
      addends += kAddendBytes / 2;
    }
    return;
  }
  float* rows = p.rows + tile * kRowFloats + row_place(row);
  rows[0] = lse;
  rows[kBlockM] = delta;
}

template <ptx::Element kElement>
__global__ void __launch_bounds__(kPreprocessThreads) backward_preprocess(const __grid_constant__ BackwardParams p, int head_dim) {
  ptx::launch_dependents();
  const RowTile at = find_tile(p);
  if (at.batch < 0) return;
  const Sequence whole = whole_sequence(p, at.batch);
  const Trimmed part = trimmed_sequence(p, at.batch);
  const long long tiles = at.head * p.tiles + first_tile(p, whole.q_row, at.batch);
  const bool packed = p.cu_seqlens_q != nullptr;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 8;

  float4* sum = reinterpret_cast<float4*>(p.dq_sum + (tiles + at.tile) * kBlockM * head_dim);
  for (int i = thread; i < kBlockM * head_dim / 4; i += kPreprocessThreads) sum[i] = make_float4(0, 0, 0, 0);
  if (thread < kBlockM && at.tile * kBlockM + thread >= part.sequence.seqlen_q) {  // rows past the end: p = 0
    write_row(p, tiles + at.tile, thread, -INFINITY, 0);
  }
  if (thread == 0) p.turn[tiles + at.tile] = 0;

  float dsink = 0;
#pragma unroll
  for (int pass = 0; pass < kBlockM * 8 / kPreprocessThreads; ++pass) {
    const int row = at.tile * kBlockM + pass * (kPreprocessThreads / 8) + thread / 8;
    const bool inside = row < whole.seqlen_q;
    float delta = 0;
    if (inside) {
      const uint16_t* o = row_of(p.o, packed, at.batch, whole.q_row + row, at.head);
      const uint16_t* grad = row_of(p.do_, packed, at.batch, whole.q_row + row, at.head);
#pragma unroll 4
      for (int column = lane * 8; column < p.head_dim_v; column += 64) {
        const uint4 a = *reinterpret_cast<const uint4*>(o + column), b = *reinterpret_cast<const uint4*>(grad + column);
        const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          delta += ptx::to_float<kElement>(static_cast<uint16_t>(x[i])) * ptx::to_float<kElement>(static_cast<uint16_t>(y[i]));
          delta += ptx::to_float<kElement>(static_cast<uint16_t>(x[i] >> 16)) * ptx::to_float<kElement>(static_cast<uint16_t>(y[i] >> 16));
        }
      }
    }
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2) delta += __shfl_xor_sync(0xffffffff, delta, distance);
    if (!inside || lane != 0) continue;
    const float lse = p.lse[(packed ? 0 : at.batch * p.lse_batch) + at.head * p.lse_head + whole.q_row + row];
    if (p.dlse) delta -= p.dlse[(packed ? 0 : at.batch * p.dlse_batch) + at.head * p.dlse_head + whole.q_row + row];
    if (p.dsink && p.sink[at.head] != -INFINITY) dsink -= ptx::exp2((p.sink[at.head] - lse) * kLog2e) * delta;
    const int r = row - part.q_begin;
    if (r < 0 || r >= part.sequence.seqlen_q) continue;
    const bool sees = lse != -INFINITY;  // a row whose scores are all -inf gives and takes nothing
    write_row(p, tiles + r / kBlockM, r % kBlockM, sees ? -lse * kLog2e : -INFINITY, sees ? -delta : 0);
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

// What a CTA of the postprocess kernel works on: the sums of its tile of dq, and the rows of its tile of dk and dv that are not finite.
struct RowSums {
  RowTile at;
  Trimmed part;
  const float4* sum;
  // False: there is no such tile.
  __device__ __forceinline__ bool find(const BackwardParams& p, int head_dim) {
    at = find_tile(p);
    if (at.batch < 0) return false;
    const Sequence whole = whole_sequence(p, at.batch);
    part = trimmed_sequence(p, at.batch);
    const long long tile = at.head * p.tiles + first_tile(p, whole.q_row, at.batch) + at.tile;
    sum = reinterpret_cast<const float4*>(p.dq_sum + tile * kBlockM * head_dim);
    return true;
  }
  // 32 columns, as a thread of the tensor cores holds them.
  __device__ __forceinline__ void read(int columns, float (&x)[16]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 four = sum[(columns / 8 + i) * 128 + static_cast<int>(threadIdx.x)];
      x[4 * i] = four.x, x[4 * i + 1] = four.y, x[4 * i + 2] = four.z, x[4 * i + 3] = four.w;
    }
  }
};
struct KeyRows {
  RowTile at;
  Trimmed part;
  const SpoiltKeys* spoilt;
  __device__ __forceinline__ bool find(const BackwardParams& p) {
    at = find_key_tile(p);
    if (at.batch < 0) return false;
    const Sequence whole = whole_sequence(p, at.batch);
    part = trimmed_sequence(p, at.batch);
    spoilt = p.spoilt + at.head * p.key_tiles + first_key_tile(p, whole.k_row, at.batch) + at.tile;
    return true;
  }
};

// Rows that are not finite, by 128 threads of which a warp has 16. Out of line: such rows are rare, and nothing is kept for them.
template <ptx::Element kElement>
__device__ __noinline__ void repair_queries(const BackwardParams& p, int head_dim) {
  RowSums rows;
  rows.find(p, head_dim);
  const PlainGradients<kElement> plain{p, rows.part, rows.at.batch};
  const int first = rows.at.tile * kBlockM + static_cast<int>(threadIdx.x) / 32 * 16;
#pragma unroll 1
  for (int columns = 0; columns < head_dim; columns += 32) {
    float x[16];
    rows.read(columns, x);
    const unsigned early = tile::infinite_rows(x, 0), late = tile::infinite_rows(x, 1);
#pragma unroll 1
    for (int i = 0; i < min_of(16, rows.part.sequence.seqlen_q - first); ++i)
      if ((i < 8 ? early : late) >> i % 8 * 4 & 1) plain.repair_dq(rows.at.head, first + i, columns);
  }
}
template <ptx::Element kElement>
__device__ __noinline__ void repair_keys(const BackwardParams& p) {
  KeyRows keys;
  keys.find(p);
  const PlainGradients<kElement> plain{p, keys.part, keys.at.batch};
  const int warp = static_cast<int>(threadIdx.x) / 32, first = keys.at.tile * kBlockM + 16 * warp;
#pragma unroll 1
  for (int i = 0; i < min_of(16, keys.part.sequence.seqlen_k - first); ++i)
#pragma unroll 1
    for (int which = 0; which < 2; ++which)
      if (keys.spoilt->rows[which][warp][i / 8] >> i % 8 * 4 & 1) plain.repair_key(which, keys.at.head, first + i);
}

// dq of a tile: its sums, rounded once.
template <ptx::Element kElement>
__device__ __forceinline__ void write_dq(const BackwardParams& p, int head_dim) {
  RowSums rows;
  if (!rows.find(p, head_dim)) return;
  const RowTile& at = rows.at;
  const Sequence& sequence = rows.part.sequence;
  const bool packed = p.cu_seqlens_q != nullptr;
  const int thread = static_cast<int>(threadIdx.x);
  const Sequence whole = whole_sequence(p, at.batch);
  const int outside = p.accumulate ? 0 : whole.seqlen_q - sequence.seqlen_q, units = p.head_dim / 8;
  for (int i = thread; i < min_of(kBlockM, outside - at.tile * kBlockM) * units; i += 128) {
    const int row = outside_row(at.tile * kBlockM + i / units, rows.part.q_begin, sequence.seqlen_q);
    *reinterpret_cast<uint4*>(row_of(p.dq, packed, at.batch, whole.q_row + row, at.head) + i % units * 8) = make_uint4(0, 0, 0, 0);
  }
  if (at.tile * kBlockM >= sequence.seqlen_q) return;
  const int first = at.tile * kBlockM + tile::this_lane().row;
  float zero = 0;  // times every sum
#pragma unroll 2
  for (int columns = 0; columns < head_dim; columns += 32) {
    float x[16];
    rows.read(columns, x);
#pragma unroll
    for (const float y : x) zero += 0 * y;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      bool inside = first + 8 * r < sequence.seqlen_q;
      if (p.accumulate && (tile::infinite_rows(x, r) >> thread % 32 & 1)) inside = false;  // what is added cannot be taken back
      write_gradient<kElement>(p, x, r, p.scale, inside, p.dq, at.batch, sequence.q_row + first + 8 * r, at.head, columns, p.head_dim);
    }
  }
  if (!__any_sync(0xffffffff, !(zero == 0))) return;
  __syncwarp();  // what has been stored is stored again
  repair_queries<kElement>(p, head_dim);
}

// Looks after a tile of dk and dv.
template <ptx::Element kElement>
__device__ __forceinline__ void check_keys(const BackwardParams& p) {
  KeyRows keys;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (!keys.find(p) || keys.at.tile * kBlockM + 16 * warp >= keys.part.sequence.seqlen_k) return;
  unsigned any = 0;  // with what nobody wrote for keys past the end
#pragma unroll
  for (int which = 0; which < 2; ++which) any |= keys.spoilt->rows[which][warp][0] | keys.spoilt->rows[which][warp][1];
  if (any != 0) repair_keys<kElement>(p);
}

// The last num_heads CTAs write dsink, the others a tile of dq, and look after one of dk and dv.
template <ptx::Element kElement>
__global__ void __launch_bounds__(kPostprocessThreads, 8)
    backward_postprocess(const __grid_constant__ BackwardParams p, int head_dim, int tile_ctas) {
  ptx::wait_for_previous();
  if (static_cast<int>(blockIdx.x) >= tile_ctas) return write_dsink(p, static_cast<int>(blockIdx.x) - tile_ctas);
  write_dq<kElement>(p, head_dim);
  check_keys<kElement>(p);
}

}  // namespace tilewise
