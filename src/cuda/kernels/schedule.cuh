// Which tiles a CTA computes, in which order; a tile is block_m queries of one head. Units of work go round the CTAs, every other round
// backwards, so that where units shrink what a CTA has too much of in one round it has too little of in the next. There is no counter in
// memory: nothing to reset, and every run is alike. Units come in the order of the heads, so that CTAs that run together read the same
// keys and values from L2:
//   equal tiles (no mask, or a window)   one by one
//   a causal mask                        in pairs of one long and one short tile, all equal work; those of the last heads, from
//                                        params.paired_heads on, one by one and falling in size, which fills the end
//   packed sequences                     32 at a time, the longest first; in pairs where something bounds the right, else one by one
#pragma once

#include "core/mask.h"
#include "core/sequence.h"
#include "cuda/kernels/params.h"

namespace tilewise {

// One tile, as the scheduling warp tells it to the others.
template <int kParts>
struct WorkItem {
  bool valid;  // false: no more work
  int batch, head, m_begin;
  Sequence sequence;
  Band band;
  int blocks_begin, blocks_end;  // key blocks that the tile sees
  // What a warpgroup's 64 rows see of them.
  struct alignas(16) Part {
    int begin, full_begin, full_end, end;  // as in BlockRange
    int before, behind;                    // blocks of the tile to the right and to the left
    int q_place;                           // where its queries are: a position of the ring
    uint32_t result;                       // its finished tile is the warpgroup's n-th
    __device__ __forceinline__ bool empty() const { return begin >= end; }
  } part[kParts];
};

// Walks this CTA's tiles; all 32 lanes of one warp call it together.
struct Schedule {
  int round = 0, second = -1;  // second: the tile that completes a pair
  int batch = 0, head = 0;
  unsigned first = 0;                                                  // packed: units before the chunk of sequences that the lanes hold
  int chunk = -1, chunk_batch = 0, chunk_m_blocks = 0, chunk_end = 0;  // this lane's sequence, and the units up to its end

  // Packed: units of work of one head of a sequence.
  static __device__ __forceinline__ int units_of(const ForwardParams& params, int m_blocks) {
    return params.window_right >= 0 ? (m_blocks + 1) / 2 : m_blocks;
  }
  // Packed: lane i holds the i-th longest sequence of the chunk.
  __device__ __forceinline__ void load_chunk(const ForwardParams& params, int index, int block_m) {
    const int lane = static_cast<int>(threadIdx.x) % 32, batch = index * 32 + lane;
    const int length = batch < params.batch ? params.cu_seqlens_q[batch + 1] - params.cu_seqlens_q[batch] : -1;
    int rank = 0;
    for (int other = 0; other < 32; ++other) {
      const int theirs = __shfl_sync(0xffffffff, length, other);
      rank += theirs > length || (theirs == length && other < lane);
    }
    // The lane whose rank is mine.
    int source = 0;
    for (int other = 0; other < 32; ++other)
      if (__shfl_sync(0xffffffff, rank, other) == lane) source = other;
    const int my_length = __shfl_sync(0xffffffff, length, source);
    chunk = index;
    chunk_batch = index * 32 + source;
    chunk_m_blocks = my_length > 0 ? ceil_div(my_length, block_m) : 0;
    chunk_end = units_of(params, chunk_m_blocks) * params.num_heads;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = __shfl_up_sync(0xffffffff, chunk_end, distance);
      if (lane >= distance) chunk_end += before;
    }
  }

  // Fills the item, which lies in shared memory. False: no tile is left. The ranges are one lane's work each.
  template <int kParts>
  __device__ __forceinline__ bool next(const ForwardParams& params, int block_n, WorkItem<kParts>& item) {
    constexpr int kBlockM = 64 * kParts;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane == 0) item.valid = false;
    int m_block = second;
    second = -1;
    if (m_block < 0) {
      const int ctas = static_cast<int>(gridDim.x), cta = static_cast<int>(blockIdx.x);
      unsigned index = round * ctas + (round % 2 == 0 ? cta : ctas - 1 - cta), m_blocks, pairs;  // the host sees to it that 32 bits suffice
      ++round;
      if (!params.cu_seqlens_q) {
        m_blocks = ceil_div(params.seqlen_q, kBlockM);
        pairs = (m_blocks + 1) / 2;
        const unsigned heads = params.batch * params.num_heads, paired = params.paired_heads;
        if (index < paired * pairs) {
          head = index / pairs;
          index -= head * pairs;
          m_block = m_blocks - 1 - index;
          if (m_block != static_cast<int>(index)) second = index;
        } else {
          index -= paired * pairs;
          if (index >= (heads - paired) * m_blocks) return false;
          const unsigned runs = params.falling ? heads - paired : m_blocks, run = index / runs;
          head = params.falling ? paired + index % runs : run;
          m_block = m_blocks - 1 - (params.falling ? run : index % runs);
        }
        batch = head / params.num_heads;
        head -= batch * params.num_heads;
      } else {
        unsigned total = chunk < 0 ? 0 : __shfl_sync(0xffffffff, chunk_end, 31);
        while (chunk < 0 || index >= first + total) {
          if ((chunk + 1) * 32 >= params.batch) return false;
          first += total;
          load_chunk(params, chunk + 1, kBlockM);
          total = __shfl_sync(0xffffffff, chunk_end, 31);
        }
        index -= first;
        const int holder = __popc(__ballot_sync(0xffffffff, static_cast<unsigned>(chunk_end) <= index));
        m_blocks = __shfl_sync(0xffffffff, chunk_m_blocks, holder);
        const unsigned units = units_of(params, m_blocks);
        batch = __shfl_sync(0xffffffff, chunk_batch, holder);
        index -= __shfl_sync(0xffffffff, chunk_end, holder) - units * params.num_heads;
        head = index / units;
        index -= head * units;
        m_block = m_blocks - 1 - index;
        if (units < m_blocks && m_block != static_cast<int>(index)) second = index;
      }
    }
    const int m_begin = m_block * kBlockM;
    const Sequence sequence =
        sequence_of(batch, params.seqlen_q, params.seqlen_k, params.cu_seqlens_q, params.cu_seqlens_k, params.seqused_k);
    const Band band = make_band(sequence.seqlen_q, sequence.seqlen_k, params.window_left, params.window_right, params.top_left);
    if (lane == 0) {
      item.batch = batch;
      item.head = head;
      item.m_begin = m_begin;
      item.sequence = sequence;
      item.band = band;
    }
    // Lane i has part i, the lane after them the whole tile.
    const int begin = m_begin + (lane < kParts ? 64 * lane : 0), end = min_of(begin + (lane < kParts ? 64 : kBlockM), band.seqlen_q);
    const BlockRange range = begin < end ? kv_blocks(band, begin, end, block_n) : BlockRange{0, 0, 0, 0};
    const int all_begin = __shfl_sync(0xffffffff, range.begin, kParts), all_end = __shfl_sync(0xffffffff, range.end, kParts);
    if (lane < kParts) {
      const bool any = range.begin < range.end;
      item.part[lane] = {range.begin,
                         range.full_begin,
                         range.full_end,
                         range.end,
                         all_end - (any ? range.end : all_begin),
                         any ? range.begin - all_begin : 0,
                         0,
                         0};
    }
    if (lane == 0) {
      item.blocks_begin = all_begin;
      item.blocks_end = all_end;
      item.valid = true;
    }
    __syncwarp();
    return true;
  }
};

}  // namespace tilewise
