// Which work a CTA of the backward pass does: its sequence, also among packed ones, its block, and the steps of queries that see it.
#pragma once

#include "cuda/kernels/gradient_params.h"
#include "cuda/tile/store_row.cuh"

namespace tilewise {

// Finds number `index` of the places for blocks of packed sequences. Sequence b has those from cu_seqlens[b] / block + b on, as many as it
// has blocks (first_tile(), first_key_tile()); others are nobody's. By one whole warp, which takes a 32nd of the sequences at a time.
__device__ __forceinline__ Place find_place(const int* cu_seqlens, int batch, int block, int index) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int begin = 0, step = batch, row = 0, next_row = 0;
#pragma unroll 1
  do {
    const int end = min_of(begin + step, batch);
    step = ceil_div(step, 32);
    const int b = min_of(begin + lane * step, batch);
    const int here = cu_seqlens[b], there = cu_seqlens[min_of(b + step, batch)];
    const unsigned before = __ballot_sync(0xffffffff, b < end && here / block + b <= index);  // the first lanes
    if (before == 0) return {-1, 0, 0};                                                       // in front of the first sequence
    const int owner = __popc(before) - 1;
    begin += owner * step;
    row = __shfl_sync(0xffffffff, here, owner);
    next_row = __shfl_sync(0xffffffff, there, owner);
  } while (step > 1);
  const int number = index - (row / block + begin), blocks = ceil_div(next_row - row, block);
  return number < blocks ? Place{begin, number, blocks} : Place{-1, 0, 0};
}

__device__ __forceinline__ Sequence whole_sequence(const BackwardParams& p, int batch) {
  return sequence_of(batch, p.seqlen_q, p.seqlen_k, p.cu_seqlens_q, p.cu_seqlens_k, nullptr);
}
__device__ __forceinline__ Trimmed trimmed_sequence(const BackwardParams& p, int batch) {
  if (p.alike) return p.part;
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
                                               const Elements& to, int batch, long long row, int head, int column, int columns,
                                               int thread) {
  const bool packed = p.cu_seqlens_q != nullptr;
  if (p.accumulate)
    tile::add_row(sum, r, factor, inside ? row_of<float>(to, packed, batch, row, head) + column : nullptr, columns - column, thread);
  else
    tile::store_row<kElement>(sum, r, factor, inside ? row_of(to, packed, batch, row, head) + column : nullptr, columns - column, thread);
}

// Tiles of dq that are written from their sums. Not packed, all are of one sequence.
struct ShareWork {
  Sequence sequence;     // not packed: its rows that take part
  long long first_tile;  // of the sequence; packed: 0
  int batch, head;       // not packed; the first head of the unit
  int begin, tiles;      // tiles of the unit
  int first_sum;         // of the unit: tile of the ring of sums
  bool again;            // another unit will use the sums
};

// What a CTA, or a pair, does for a claim. Written by one warp, read by all.
struct BackwardWork {
  static constexpr int kMost = 2;
  Trimmed part;
  long long first_tile, first_key_tile;
  int claim, unit;
  int batch, head;              // of keys and values
  int n_block, n_begin;         // of the trimmed sequence
  int run_begin, run_end;       // deterministic: the run of n_block
  int first_sum;                // tile of the ring of sums
  uint32_t parity;              // of the phases of K and V, which are loaded once for each work that has steps
  BlockRange all, mine[kMost];  // steps of queries that see the block, and each 64 keys of it
  ShareWork share;
};

// A way through steps: i from begin to end stands for step i, or for last - i where they fall; between full_begin and full_end all pairs
// are visible.
struct Walk {
  bool falling;
  int begin, end, last, full_begin, full_end;
  __device__ __forceinline__ int step(int i) const { return falling ? last - i : i; }
  __device__ __forceinline__ bool at_edge(int i) const { return i < full_begin || i >= full_end; }
};

// The place of a step's first tile in the workspace, and of its sums.
template <BackwardConfig C>
__device__ __forceinline__ long long tile_index(const BackwardParams& params, const BackwardWork& work, int head, int m) {
  return (work.head * params.group + head) * params.tiles + work.first_tile + m * C.tiles();
}
template <BackwardConfig C>
__device__ __forceinline__ float* sum_of(const BackwardParams& params, const BackwardWork& work, int head, int m) {
  return params.dq_sum +
         static_cast<long long>(work.first_sum + head * params.q_tiles + m * C.tiles()) * (kBlockM * C.sum_columns(params.deterministic));
}

// Finds what to do for a claim, by one warp. Each value is written by one lane. True: there are steps. Long blocks come first under a
// causal mask; where the order of additions to dq matters, whoever is waited for has been claimed before.
template <BackwardConfig C>
__device__ __forceinline__ bool find_work(const BackwardParams& params, BackwardWork& work, int claim) {
  static_assert(C.key_tiles() <= BackwardWork::kMost);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  BlockRange range{0, 0, 0, 0};  // lane 0: of all keys, 1 + i: of 64
  int n_begin = 0;
  if (claim < params.works) {
    const bool packed = params.cu_seqlens_k != nullptr;
    const int heads = params.num_heads / params.group;
    UnitBlock at = unit_block(params.order, params.units, params.k_blocks, params.deterministic && !packed, claim);
    const int unit = at.unit;
    Place place = {unit / heads, at.block, params.k_blocks};
    if (packed) {
      place = params.block_order[at.block];
      at.run_begin = 0;
      at.run_end = place.blocks;
    }
    if (lane == 0) work.unit = unit;
    if (place.batch < 0) {
      if (lane == 0) work.part.band.seqlen_k = 0;
    } else {
      n_begin = place.block * C.block_n();
      if (lane == 0) work.part = trimmed_sequence(params, place.batch);
      __syncwarp();
      const Band& band = work.part.band;
      const int seqlen_k = band.seqlen_k, begin = n_begin + (lane == 0 ? 0 : 64 * (lane - 1)), keys = lane == 0 ? C.block_n() : 64;
      if (lane <= C.key_tiles() && begin < seqlen_k) range = q_blocks(band, begin, min_of(begin + keys, seqlen_k), C.block_m);
      if (lane == 0) {
        const Sequence whole = whole_sequence(params, place.batch);
        work.first_tile = first_tile(params, whole.q_row, place.batch);
        work.first_key_tile = first_key_tile(params, whole.k_row, place.batch);
        work.first_sum = unit % params.ring * params.group * params.q_tiles + (packed ? static_cast<int>(work.first_tile) : 0);
        work.batch = place.batch;
        work.head = packed ? unit : unit % heads;
        work.n_block = place.block;
        work.run_begin = at.run_begin;
        work.run_end = at.run_end;
      }
    }
  }
  if (lane == 0) {
    work.claim = claim;
    work.n_begin = n_begin;
    work.all = range;
  } else if (lane <= C.key_tiles()) {
    work.mine[lane - 1] = range;
  }
  return __shfl_sync(0xffffffff, range.begin < range.end, 0);
}

// Finds share number `index` of dq, by one thread.
__device__ __forceinline__ void find_share(const BackwardParams& params, ShareWork& share, int index) {
  share.tiles = 0;
  if (index < 0 || index >= params.units * params.shares) return;
  const bool packed = params.cu_seqlens_q != nullptr;
  const int unit = index / params.shares, all = params.group * params.q_tiles, most = ceil_div(all, params.shares);
  share.begin = index % params.shares * most;
  share.tiles = min_of(most, all - share.begin);
  share.first_sum = unit % params.ring * all;
  share.again = unit + params.ring < params.units;
  const int heads = params.num_heads / params.group;
  share.head = (packed ? unit : unit % heads) * params.group;
  share.first_tile = 0;
  if (packed) return;
  share.batch = unit / heads;
  share.first_tile = first_tile(params, 0, share.batch);
  share.sequence = trimmed_sequence(params, share.batch).sequence;
}

}  // namespace tilewise
