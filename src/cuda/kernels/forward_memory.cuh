// The four warps of the forward kernel that move data: one decides the tiles and loads queries, two load blocks of keys and of values,
// right to left, into rings, one stores finished tiles.
#pragma once

#include "core/sequence.h"
#include "cuda/kernels/forward_repair.cuh"
#include "cuda/kernels/forward_shared.cuh"
#include "cuda/kernels/params.h"
#include "cuda/kernels/schedule.cuh"
#include "cuda/ptx/scalar.cuh"
#include "cuda/tile/load.cuh"
#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/store.cuh"

namespace tilewise {

// Decides the tiles and loads queries. One warp.
template <ForwardConfig C>
__device__ __forceinline__ void load_queries(const ForwardParams& params, ForwardShared<C>& shared) {
  const bool leader = threadIdx.x % 32 == 0;
  tile::Ring<kItems> items;
  tile::Ring<C.q_slots> q_ring;
  uint32_t results[C.consumers] = {};
  Schedule schedule;
  for (bool more = true; more; items.advance()) {
    shared.item_empty[items.stage()].wait(items.parity() ^ 1);
    WorkItem<C.consumers>& item = shared.item[items.stage()];
    more = schedule.next(params, C.block_n, item);
    // Places for queries go round all warpgroups that have work: which one a warpgroup gets is part of the item. Where places are few, and
    // the last rows meet their keys before the first rows do, their queries come first.
    const tile::Ring<C.q_slots> first = q_ring;
#pragma unroll
    for (int part = 0; part < C.consumers; ++part) {
      if (leader) item.part[part].result = results[part];
      results[part] += more && !item.part[part].empty();
    }
    const bool last_first = !ForwardShared<C>::kOwnPlaces && more && item.part[C.consumers - 1].before < item.part[0].before;
    const auto nth = [&](int i) { return last_first ? C.consumers - 1 - i : i; };
#pragma unroll
    for (int i = 0; i < C.consumers; ++i) {
      if (leader) item.part[nth(i)].q_place = q_ring.position;
      if (more && !item.part[nth(i)].empty()) q_ring.advance();
    }
    shared.item_full[items.stage()].arrive();  // every lane, for what it has written
    __syncwarp();
    if (!more) break;
    q_ring = first;
    // All that a load needs is there before its place is free.
    const int begin = ptx::uniform(item.m_begin), length = ptx::uniform(item.sequence.seqlen_q);
    const int q_row = ptx::uniform(static_cast<int>(item.sequence.q_row)), head = ptx::uniform(item.head);
    const int batch = params.cu_seqlens_q ? 0 : ptx::uniform(item.batch);
    unsigned empty = 0;  // parts that see nothing and ask for nothing, as bits
    for (int part = 0; part < C.consumers; ++part) empty |= item.part[part].empty() << part;
    empty = ptx::uniform(empty);
#pragma unroll 1
    for (int i = 0; i < C.consumers; ++i) {
      const int part = nth(i), row = begin + 64 * part;
      if (empty >> part & 1) continue;
      shared.q_empty[q_ring.stage()].wait(q_ring.parity() ^ 1);
      if (ptx::elect())
        tile::load_rows(shared.q[q_ring.stage()], &params.q_map, shared.q_full[q_ring.stage()], q_row + row, length - row, head, batch,
                        params.head_dim);
      q_ring.advance();
    }
  }
}

// Loads the blocks of keys or of values of every tile, right to left. One warp.
template <ForwardConfig C, bool kValues, class T, int kStages>
__device__ __forceinline__ void load_keys(const ForwardParams& params, ForwardShared<C>& shared, T (&tiles)[kStages],
                                          const CUtensorMap& map, int columns, tile::Barrier (&full)[kStages],
                                          tile::Barrier (&empty)[kStages]) {
  if (threadIdx.x % 32 != 0) return;
  tile::Ring<kItems> items;
  tile::Ring<kStages> ring;
  // All SMs begin at once, and what is needed first would come with all the rest. So the first keys come before values and other keys are
  // asked for, the first values before others. (At k_full the loader of values could come too late, when two phases have passed.)
  bool first = true;
  for (;; items.advance()) {
    shared.item_full[items.stage()].wait(items.parity());
    const WorkItem<C.consumers>& item = shared.item[items.stage()];
    if (!item.valid) return;
    const int batch = params.cu_seqlens_k ? 0 : item.batch, head = item.head / params.group;
    for (int block = item.blocks_end - 1; block >= item.blocks_begin; --block, ring.advance()) {
      empty[ring.stage()].wait(ring.parity() ^ 1);
      if (kValues && first) shared.begun.wait(0);
      const int row = block * C.block_n;
      tile::load_rows(tiles[ring.stage()], &map, full[ring.stage()], item.sequence.k_row + row, item.sequence.seqlen_k - row, head, batch,
                      columns);
      if (!first) continue;
      first = false;
      full[0].wait(0);
      if (!kValues) shared.begun.arrive();
    }
    shared.item_empty[items.stage()].arrive();
  }
}

// A row's place in o and lse.
template <ForwardConfig C>
__device__ __forceinline__ uint16_t* output_row(const ForwardParams& params, const WorkItem<C.consumers>& item, int query) {
  return static_cast<uint16_t*>(params.o.data) + (params.cu_seqlens_q ? 0 : item.batch * params.o.batch) +
         (item.sequence.q_row + query) * params.o.row + item.head * params.o.head;
}
// If lse is wanted; `batch` is 0 where sequences are packed.
__device__ __forceinline__ float* lse_row(const ForwardParams& params, int batch, int head, long long row) {
  return params.lse + batch * params.lse_batch + head * params.lse_head + row;
}

// Rows that see no key: o = 0, lse = -inf or the sink.
template <ForwardConfig C>
__device__ __forceinline__ void write_empty(const ForwardParams& params, const WorkItem<C.consumers>& item, int part) {
  const int thread = static_cast<int>(threadIdx.x) % 128, begin = item.m_begin + 64 * part;
  const int rows = min_of(64, item.sequence.seqlen_q - begin), units = params.head_dim_v / 8;
  for (int i = thread; i < rows * units; i += 128)
    *reinterpret_cast<uint4*>(output_row<C>(params, item, begin + i / units) + i % units * 8) = make_uint4(0, 0, 0, 0);
  if (!params.lse) return;
  float* lse = lse_row(params, params.cu_seqlens_q ? 0 : item.batch, item.head, item.sequence.q_row + begin);
  for (int i = thread; i < rows; i += 128) lse[i] = params.sink ? params.sink[item.head] : -INFINITY;
}

// Stores finished tiles and their lse. One warp, for which everything waits in short sequences: what the copy engine needs is in registers
// before a tile is finished, and known to be the same in all lanes.
template <ForwardConfig C>
struct Storer {
  using Shared = ForwardShared<C>;
  using Item = WorkItem<C.consumers>;
  using O = typename Shared::O;
  static constexpr int kPieces = Shared::kPieces;

  const ForwardParams& params;
  Shared& shared;
  const int lane = static_cast<int>(threadIdx.x) % 32;

  // Lets a warpgroup write a piece of its tile, when all stores but the last kLeft have read what they store.
  template <int kLeft>
  __device__ __forceinline__ void give_place(int part, int piece) {
    if (ptx::elect()) tile::wait_stored<kLeft>();
    __syncwarp();
    shared.o_empty[part][piece].arrive();  // every lane, for what it has read
  }
  template <int kPiece = 0>
  __device__ __forceinline__ void give_places(int part) {
    give_place<kPieces - 1 - kPiece>(part, kPiece);
    if constexpr (kPiece + 1 < kPieces) give_places<kPiece + 1>(part);
  }
  // Where a part's tile goes.
  struct Target {
    int row, rows, head, batch, q_row;
    uint32_t parity;
  };
  __device__ __forceinline__ Target target_of(const Item& item, int part) const {
    const int row = ptx::uniform(item.m_begin) + 64 * part;
    return {row,
            min_of(64, ptx::uniform(item.sequence.seqlen_q) - row),
            ptx::uniform(item.head),
            params.cu_seqlens_q ? 0 : ptx::uniform(item.batch),
            ptx::uniform(static_cast<int>(item.sequence.q_row)) + row,
            static_cast<uint32_t>(ptx::uniform(static_cast<int>(item.part[part].result & 1)))};
  }
  // Stores a part's tile from a piece on, and lets part `next` have the common place piece by piece (-1: nobody). Where a row is NaN it
  // goes on in a form of its own, so that nothing that the other needs has to be kept beside what Repair needs.
  template <bool kRepairs>
  __device__ __forceinline__ void store(const Item& item, int part, int next, int piece) {
    Target to = target_of(item, part);
#pragma unroll 1
    for (; piece < kPieces; ++piece) {
      shared.o_full[part][piece].wait(to.parity);
      O& tile = shared.o[Shared::o_slot(part)][piece];
      const bool there = piece * O::kColumns < params.head_dim_v;
      if (there && __any_sync(0xffffffff, lane < 4 && shared.spoilt[part][piece][lane % 4])) {
        if constexpr (!kRepairs) return store<true>(item, part, next, piece);
        Repair<C>{params, shared, item, part, piece}.run();
        to = target_of(item, part);
      }
      if (ptx::elect()) tile::store_rows(tile, &params.o_map, to.q_row, to.rows, to.head, to.batch, params.head_dim_v, piece * O::kColumns);
      if (next >= 0 && piece > 0) give_place<1>(next, piece - 1);
    }
    if (next >= 0) give_place<0>(next, kPieces - 1);
    if (params.lse) {
      float* lse = lse_row(params, to.batch, to.head, to.q_row);
#pragma unroll
      for (int i = lane; i < 64; i += 32)
        if (i < to.rows) lse[i] = shared.lse[part][i];
    }
  }
  __device__ __forceinline__ void run() {
    for (tile::Ring<kItems> items;; items.advance()) {
      shared.item_full[items.stage()].wait(items.parity());
      const Item& item = shared.item[items.stage()];
      if (!ptx::uniform(item.valid)) break;
      unsigned left = 0;  // parts with a tile to store, as bits
      for (int part = 0; part < C.consumers; ++part) left |= !item.part[part].empty() << part;
      left = ptx::uniform(left);
      const auto first = [&] { return __ffs(left) - 1; };  // -1: none
      int part = first();
      if constexpr (Shared::kOwnPlaces) {
        for (int own = 0; own < C.consumers; ++own)
          if (left >> own & 1) give_place<0>(own, 0);
      } else if (part >= 0) {
        const auto asks = [&] { return left >> part & 1 && shared.o_wanted[part].passed(item.part[part].result & 1); };
        while (!__all_sync(0xffffffff, asks())) part ^= 1;
        give_places(part);
      }
      while (part >= 0) {
        left ^= 1u << part;
        const int next = first();
        store<false>(item, part, Shared::kOwnPlaces ? -1 : next, 0);
        part = next;
      }
      __syncwarp();  // every lane has read the item
      if (lane == 0) shared.item_empty[items.stage()].arrive();
    }
    if (ptx::elect()) tile::wait_stored();  // the memory must stay until then
  }
};

}  // namespace tilewise
