// What a CTA of the forward kernel keeps in shared memory, and the four warps that move data: one decides the tiles and loads queries, two
// load blocks of keys and of values, right to left, into rings, one stores finished tiles. The rows in it that need it are computed anew
// on the way out.
#pragma once

#include "core/mask.h"
#include "core/sequence.h"
#include "cuda/kernels/params.h"
#include "cuda/kernels/schedule.cuh"
#include "cuda/ptx/scalar.cuh"
#include "cuda/tile/load.cuh"
#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/rows.cuh"
#include "cuda/tile/shared.cuh"
#include "cuda/tile/store.cuh"

namespace tilewise {

constexpr int kItems = 4;  // work items published ahead

template <ForwardConfig C>
struct ForwardShared {
  using Q = tile::Tile<64, C.head_dim>;
  using K = tile::Tile<C.block_n, C.head_dim>;
  using V = tile::Tile<C.block_n, C.head_dim_v>;
  // Every warpgroup has a place for finished tiles, or all have one in common: who asks first (o_wanted) gets it, the next panel by panel.
  static constexpr bool kOwnPlaces = C.o_slots == C.consumers;
  static_assert(kOwnPlaces || (C.o_slots == 1 && C.consumers == 2));
  static constexpr int kPieces = kOwnPlaces ? 1 : C.head_dim_v / 64;
  static_assert(kOwnPlaces || C.head_dim_v % 64 == 0);
  using O = tile::Tile<64, C.head_dim_v / kPieces>;
  Q q[C.q_slots];
  K k[C.k_stages];
  V v[C.v_stages];
  O o[C.o_slots][kPieces];
  float lse[C.consumers][64];
  bool spoilt[C.consumers][kPieces][4];  // some row of a warp of the finished tile is NaN
  WorkItem<C.consumers> item[kItems];
  tile::Barrier item_full[kItems], item_empty[kItems];
  tile::Barrier q_full[C.q_slots], q_empty[C.q_slots], o_full[C.consumers][kPieces], o_empty[C.consumers][kPieces];
  tile::Barrier o_wanted[C.consumers];
  tile::Barrier k_full[C.k_stages], k_empty[C.k_stages], v_full[C.v_stages], v_empty[C.v_stages];
  tile::Barrier begun;  // the first keys are there

  __device__ __forceinline__ static constexpr int o_slot(int part) { return kOwnPlaces ? part : 0; }

  // Columns that are not there.
  __device__ __forceinline__ void clear_columns(int head_dim, int head_dim_v) {
    const int thread = static_cast<int>(threadIdx.x), threads = C.threads();
    for (auto& tile : q) tile::clear_panels(tile, head_dim, thread, threads);
    for (auto& tile : k) tile::clear_panels(tile, head_dim, thread, threads);
    for (auto& tile : v) tile::clear_panels(tile, head_dim_v, thread, threads);
  }
  __device__ __forceinline__ void init_barriers() {
    constexpr int kWarps = 4 * C.consumers;
    for (int i = 0; i < kItems; ++i) {
      item_full[i].init(32);
      item_empty[i].init(32 * kWarps + 3);  // and the loaders of keys and of values, and who stores
    }
    for (int i = 0; i < C.q_slots; ++i) {
      q_full[i].init(1);
      q_empty[i].init(4);
    }
    for (int i = 0; i < C.consumers; ++i) {
      for (int piece = 0; piece < kPieces; ++piece) {
        o_full[i][piece].init(128);
        o_empty[i][piece].init(32);
      }
      o_wanted[i].init(4);
    }
    for (int i = 0; i < C.k_stages; ++i) {
      k_full[i].init(1);
      k_empty[i].init(kWarps);
    }
    for (int i = 0; i < C.v_stages; ++i) {
      v_full[i].init(1);
      v_empty[i].init(kWarps);
    }
    begun.init(1);
    ::cuda::ptx::fence_mbarrier_init(::cuda::ptx::sem_release, ::cuda::ptx::scope_cluster);
  }
};

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

// A row anew with plain arithmetic, by one warp, from the keys that it sees and no others: its lse, and the columns of o that `tile` has.
template <ForwardConfig C>
__device__ __forceinline__ void recompute_row(const ForwardParams& params, const WorkItem<C.consumers>& item, int query,
                                              typename ForwardShared<C>::O& tile, int first_column, float& lse) {
  const auto row_of = [&](const Elements& t, long long row, int head) {
    return static_cast<const uint16_t*>(t.data) + (params.cu_seqlens_q ? 0 : item.batch * t.batch) + row * t.row + head * t.head;
  };
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int begin = first_key(item.band, query), end = end_key(item.band, query);
  const uint16_t* q = row_of(params.q, item.sequence.q_row + query, item.head);
  const float slope = params.alibi_slopes ? params.alibi_slopes[item.batch * params.alibi_batch + item.head] : 0;
  float max = params.sink ? params.sink[item.head] * kLog2e : -INFINITY, sum = params.sink ? 1 : 0;
  // First the maximum and the sum, then 32 columns of o at a time.
#pragma unroll 1
  for (int columns = -32; columns < min_of(tile.kColumns, params.head_dim_v - first_column); columns += 32) {
    const int column = first_column + columns + lane;
    const bool inside = columns >= 0 && column < params.head_dim_v;
    float o = 0;
#pragma unroll 1
    for (int key = begin; key < end; ++key) {
      const uint16_t* k = row_of(params.k, item.sequence.k_row + key, item.head / params.group);
      float score = 0;
#pragma unroll 1
      for (int d = 0; d < params.head_dim; d += 32)
        if (d + lane < params.head_dim) score += ptx::to_float<C.element>(q[d + lane]) * ptx::to_float<C.element>(k[d + lane]);
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) score += __shfl_xor_sync(0xffffffff, score, distance);
      score = tile::modify(score * params.scale, params.softcap, slope * kLog2e, key - query - item.band.offset);
      if (columns < 0) {
        const float larger = fmaxf(max, score), shift = larger == -INFINITY ? 0 : larger;
        sum = sum * ptx::exp2(max - shift) + ptx::exp2(score - shift);
        max = larger;
      }
      const uint16_t* v = row_of(params.v, item.sequence.k_row + key, item.head / params.group);
      if (inside) o += ptx::exp2(score - (max == -INFINITY ? 0 : max)) * ptx::to_float<C.element>(v[column]);
      if (!__any_sync(0xffffffff, columns < 0 ? sum == sum : o == o)) break;
    }
    if (columns < 0 && lane == 0) lse = (max + log2f(sum)) * kLn2;
    if (inside)
      tile.at((query - item.m_begin) % 64, columns + lane) = static_cast<uint16_t>(ptx::pack<C.element>(sum == 0 ? 0 : o / sum, 0));
  }
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
  // Computes rows anew that are NaN.
  __device__ __forceinline__ void repair(const Item& item, int part, int piece) {
    const int row = item.m_begin + 64 * part;
    O& tile = shared.o[Shared::o_slot(part)][piece];
#pragma unroll 1
    for (int i = 0; i < 64 && row + i < item.sequence.seqlen_q; ++i) {
      uint32_t worst = 0;
      for (int column = 2 * lane; column < O::kColumns; column += 64)
        worst = ptx::max_or_nan<C.element>(worst, *reinterpret_cast<const uint32_t*>(&tile.at(i, column)));
      if (!__any_sync(0xffffffff, ptx::has_nan<C.element>(worst))) continue;
      __syncwarp();  // every lane has read the row
      recompute_row<C>(params, item, row + i, tile, piece * O::kColumns, shared.lse[part][i]);
    }
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
    __syncwarp();
  }
  // Stores a part's tile, and lets part `next` have the common place piece by piece (-1: nobody).
  __device__ __forceinline__ void store(const Item& item, int part, int next) {
    const int row = ptx::uniform(item.m_begin) + 64 * part, rows = min_of(64, ptx::uniform(item.sequence.seqlen_q) - row);
    const int head = ptx::uniform(item.head), batch = params.cu_seqlens_q ? 0 : ptx::uniform(item.batch);
    const int q_row = ptx::uniform(static_cast<int>(item.sequence.q_row)) + row;
    const uint32_t parity = ptx::uniform(item.part[part].result & 1);
#pragma unroll 1
    for (int piece = 0; piece < kPieces; ++piece) {
      shared.o_full[part][piece].wait(parity);
      const bool there = piece * O::kColumns < params.head_dim_v;
      if (there && __any_sync(0xffffffff, lane < 4 && shared.spoilt[part][piece][lane % 4])) repair(item, part, piece);
      if (ptx::elect())
        tile::store_rows(shared.o[Shared::o_slot(part)][piece], &params.o_map, q_row, rows, head, batch, params.head_dim_v,
                         piece * O::kColumns);
      if (next >= 0 && piece > 0) give_place<1>(next, piece - 1);
    }
    if (next >= 0) give_place<0>(next, kPieces - 1);
    if (params.lse) {
      float* lse = lse_row(params, batch, head, q_row);
#pragma unroll
      for (int i = lane; i < 64; i += 32)
        if (i < rows) lse[i] = shared.lse[part][i];
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
        store(item, part, Shared::kOwnPlaces ? -1 : next);
        part = next;
      }
      __syncwarp();  // every lane has read the item
      if (lane == 0) shared.item_empty[items.stage()].arrive();
    }
    if (ptx::elect()) tile::wait_stored();  // the memory must stay until then
  }
};

}  // namespace tilewise
