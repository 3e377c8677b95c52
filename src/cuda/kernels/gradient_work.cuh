// Which work a CTA of the backward pass does: its sequence, also among packed ones, its block, and the steps of queries that see it.
#pragma once

#include "cuda/kernels/gradient_params.h"
#include "cuda/tile/store_row.cuh"

namespace tilewise {

// Which sequence and which of its blocks of `block` rows. batch is -1 past the last.
struct Place {
  int batch, block, blocks;
};

// Finds number `index` of the blocks of all packed sequences. By one whole warp.
__device__ __forceinline__ Place find_place(const int* cu_seqlens, int batch, int block, int index) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
  for (int begin = 0; begin < batch; begin += 32) {
    const int b = begin + lane;
    const int blocks = b < batch ? ceil_div(cu_seqlens[b + 1] - cu_seqlens[b], block) : 0;
    int end = blocks;  // of this and all before it
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(0xffffffff, end, distance);
      if (lane >= distance) end += other;
    }
    const unsigned found = __ballot_sync(0xffffffff, index < end);
    if (found) {
      const int owner = __ffs(static_cast<int>(found)) - 1;
      return {begin + owner, index - __shfl_sync(0xffffffff, end - blocks, owner), __shfl_sync(0xffffffff, blocks, owner)};
    }
    index -= __shfl_sync(0xffffffff, end, 31);
  }
  return {-1, 0, 0};
}

__device__ __forceinline__ Sequence whole_sequence(const BackwardParams& p, int batch) {
  return sequence_of(batch, p.seqlen_q, p.seqlen_k, p.cu_seqlens_q, p.cu_seqlens_k, nullptr);
}
__device__ __forceinline__ Trimmed trimmed_sequence(const BackwardParams& p, int batch) {
  return trim(sequence_of(batch, p.seqlen_q, p.seqlen_k, p.cu_seqlens_q, p.cu_seqlens_k, p.seqused_k), p.window_left, p.window_right,
              p.top_left);
}

template <class T = uint16_t>
__device__ __forceinline__ T* row_of(const Elements& t, bool packed, int batch, long long row, int head) {
  return static_cast<T*>(t.data) + (packed ? 0 : batch * t.batch) + row * t.row + head * t.head;
}

// Row r of this thread's fragment of a gradient, from `column` on: stored, or added where the caller wants that.
template <ptx::Element kElement, int kCount>
__device__ __forceinline__ void write_gradient(const BackwardParams& p, const float (&sum)[kCount], int r, float factor, bool inside,
                                               const Elements& to, int batch, long long row, int head, int column, int columns) {
  const bool packed = p.cu_seqlens_q != nullptr;
  if (p.accumulate)
    tile::add_row(sum, r, factor, inside ? row_of<float>(to, packed, batch, row, head) + column : nullptr, columns - column);
  else
    tile::store_row<kElement>(sum, r, factor, inside ? row_of(to, packed, batch, row, head) + column : nullptr, columns - column);
}

// What a CTA does. Written once, read by all.
struct BackwardWork {
  static constexpr int kMost = 2;
  Trimmed part;
  long long first_tile, first_key_tile;
  int batch, head;              // of keys and values
  int n_block, n_begin;         // of the trimmed sequence
  BlockRange all, mine[kMost];  // steps of queries that see the block, and each 64 keys of it
};

// The place of a step's first tile in the workspace.
template <BackwardConfig C>
__device__ __forceinline__ long long tile_index(const BackwardParams& params, const BackwardWork& work, int head, int m) {
  return (work.head * params.group + head) * params.tiles + work.first_tile + m * C.tiles();
}

// Finds the CTA's work and writes 0 to rows of dk and dv that take no part (adds none, where gradients are added). By one warp. Long blocks
// come first under a causal mask; where the order of additions to dq matters, blocks come falling, so that whoever is waited for has been
// launched before.
template <BackwardConfig C>
__device__ __forceinline__ void find_work(const BackwardParams& params, BackwardWork& work) {
  static_assert(C.key_tiles() <= BackwardWork::kMost);
  const bool packed = params.cu_seqlens_k != nullptr;
  const auto index = static_cast<int>(blockIdx.x);
  const int head = index / params.k_blocks, block = index % params.k_blocks;
  Place place = {head / (params.num_heads / params.group), block, params.k_blocks};
  if (packed) place = find_place(params.cu_seqlens_k, params.batch, C.block_n(), block);
  if (place.batch >= 0) {
    if (params.deterministic) place.block = place.blocks - 1 - place.block;
    const Sequence whole = whole_sequence(params, place.batch);
    work.part = trimmed_sequence(params, place.batch);
    work.first_tile = first_tile(params, whole.q_row, place.batch);
    work.first_key_tile = first_key_tile(params, whole.k_row, place.batch);
    work.batch = place.batch;
    work.head = packed ? head : head % (params.num_heads / params.group);
    work.n_block = place.block;
    work.n_begin = place.block * C.block_n();
    const Band& band = work.part.band;
    const auto steps_of = [&](int begin, int keys) {
      return begin < band.seqlen_k ? q_blocks(band, begin, min_of(begin + keys, band.seqlen_k), C.block_m) : BlockRange{0, 0, 0, 0};
    };
    work.all = steps_of(work.n_begin, C.block_n());
    for (int i = 0; i < C.key_tiles(); ++i) work.mine[i] = steps_of(work.n_begin + 64 * i, 64);
    __syncwarp();
    const int outside = params.accumulate ? 0 : min_of(C.block_n(), whole.seqlen_k - band.seqlen_k - work.n_begin),
              lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
    for (int i = 0; i < outside; ++i) {
      const int row = outside_row(work.n_begin + i, work.part.k_begin, band.seqlen_k);
      uint16_t* dk = row_of(params.dk, packed, work.batch, whole.k_row + row, work.head);
      uint16_t* dv = row_of(params.dv, packed, work.batch, whole.k_row + row, work.head);
      if (lane * 8 < params.head_dim) *reinterpret_cast<uint4*>(dk + lane * 8) = make_uint4(0, 0, 0, 0);
      if (lane * 8 < params.head_dim_v) *reinterpret_cast<uint4*>(dv + lane * 8) = make_uint4(0, 0, 0, 0);
    }
  } else {
    work.all = {0, 0, 0, 0};
    for (BlockRange& range : work.mine) range = {0, 0, 0, 0};
    work.part.band.seqlen_k = work.n_begin = 0;
  }
}

}  // namespace tilewise
