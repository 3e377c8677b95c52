// Exact attention forward on Hopper, one pass over keys and values: read from top to bottom, it is in the order of events.
//
// A CTA stays on its SM and works through tiles of 64 queries per consumer warpgroup. Four streams run at once, tied by barriers only:
//   warp 0 of the loaders   decides the tiles, publishes them as work items, loads queries
//   warp 1, warp 2          load key blocks and value blocks, right to left, into rings of kStages
//   consumer warpgroups     each 64 queries on its own: s = q k^T, softmax, o += p v, with p staying in registers
// A consumer issues the scores of its next block together with p v of the present one, across the end of a tile too, and while it waits
// and does its softmax the tensor cores serve the other consumers. Only blocks at the mask's edge are masked.
// Every tile is computed by one CTA in one order, whatever else runs: results repeat bit by bit.
#pragma once

#include "core/mask.h"
#include "core/sequence.h"
#include "cuda/kernels/params.h"
#include "cuda/kernels/schedule.cuh"
#include "cuda/ptx/scalar.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/fragment.cuh"
#include "cuda/tile/gemm.cuh"
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
  Q q[C.q_slots][C.consumers];
  K k[C.stages];
  V v[C.stages];
  WorkItem<C.consumers> item[kItems];
  tile::Barrier item_full[kItems], item_empty[kItems];
  tile::Barrier q_full[C.q_slots][C.consumers], q_empty[C.q_slots][C.consumers];
  tile::Barrier k_full[C.stages], k_empty[C.stages], v_full[C.stages], v_empty[C.stages];

  __device__ __forceinline__ void init_barriers() {
    constexpr int kWarps = 4 * C.consumers;
    for (int i = 0; i < kItems; ++i) {
      item_full[i].init(32);
      item_empty[i].init(32 * kWarps + 2);  // and the loaders of keys and of values
    }
    for (int i = 0; i < C.q_slots; ++i)
      for (int j = 0; j < C.consumers; ++j) {
        q_full[i][j].init(1);
        q_empty[i][j].init(4);
      }
    for (int i = 0; i < C.stages; ++i) {
      k_full[i].init(1);
      v_full[i].init(1);
      k_empty[i].init(kWarps);
      v_empty[i].init(kWarps);
    }
    ::cuda::ptx::fence_mbarrier_init(::cuda::ptx::sem_release, ::cuda::ptx::scope_cluster);
  }
};

// The same value, known to the compiler to be the same in all lanes: places of operands then live in uniform registers.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffff, x, 0); }

// Decides the tiles and loads queries. One warp.
template <ForwardConfig C>
__device__ __forceinline__ void load_queries(const ForwardParams& params, ForwardShared<C>& shared) {
  const bool leader = threadIdx.x % 32 == 0;
  tile::Ring<kItems> items;
  tile::Ring<C.q_slots> slots[C.consumers];
  Schedule schedule;
  for (bool more = true; more; items.advance()) {
    shared.item_empty[items.stage()].wait(items.parity() ^ 1);
    WorkItem<C.consumers>& item = shared.item[items.stage()];
    more = schedule.next(params, C.block_n, item);
    shared.item_full[items.stage()].arrive();  // every lane, for what it has written
    __syncwarp();
    if (!more) break;
#pragma unroll
    for (int part = 0; part < C.consumers; ++part) {
      if (item.part[part].begin >= item.part[part].end) continue;  // sees nothing and asks for nothing
      const int stage = slots[part].stage(), row = item.m_begin + 64 * part;
      shared.q_empty[stage][part].wait(slots[part].parity() ^ 1);
      if (leader)
        tile::load_rows(shared.q[stage][part], &params.q_map, shared.q_full[stage][part], item.sequence.q_row + row,
                        item.sequence.seqlen_q - row, item.head, params.cu_seqlens_q ? 0 : item.batch);
      slots[part].advance();
    }
  }
}

// Loads the blocks of keys or of values of every tile, right to left. One warp.
template <ForwardConfig C, class T>
__device__ __forceinline__ void load_keys(const ForwardParams& params, ForwardShared<C>& shared, T (&tiles)[C.stages],
                                          const CUtensorMap& map, tile::Barrier (&full)[C.stages], tile::Barrier (&empty)[C.stages]) {
  if (threadIdx.x % 32 != 0) return;
  tile::Ring<kItems> items;
  tile::Ring<C.stages> ring;
  for (;; items.advance()) {
    shared.item_full[items.stage()].wait(items.parity());
    const WorkItem<C.consumers>& item = shared.item[items.stage()];
    if (!item.valid) return;
    const int batch = params.cu_seqlens_k ? 0 : item.batch, head = item.head / params.group;
    for (int block = item.all.end - 1; block >= item.all.begin; --block, ring.advance()) {
      empty[ring.stage()].wait(ring.parity() ^ 1);
      const int row = block * C.block_n;
      tile::load_rows(tiles[ring.stage()], &map, full[ring.stage()], item.sequence.k_row + row, item.sequence.seqlen_k - row, head, batch);
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
template <ForwardConfig C>
__device__ __forceinline__ void store_lse(const ForwardParams& params, const WorkItem<C.consumers>& item, int query, float lse) {
  if (params.lse)
    params.lse[(params.cu_seqlens_q ? 0 : item.batch * params.lse_batch) + item.head * params.lse_head + item.sequence.q_row + query] = lse;
}

// Rows that see no key: o = 0, lse = -inf or the sink.
template <ForwardConfig C>
__device__ __forceinline__ void write_empty(const ForwardParams& params, const WorkItem<C.consumers>& item, int part) {
  const int thread = static_cast<int>(threadIdx.x) % 128, begin = item.m_begin + 64 * part;
  const int rows = min_of(64, item.sequence.seqlen_q - begin), units = params.head_dim_v / 8;
  for (int i = thread; i < rows * units; i += 128)
    *reinterpret_cast<uint4*>(output_row<C>(params, item, begin + i / units) + i % units * 8) = make_uint4(0, 0, 0, 0);
  for (int i = thread; i < rows; i += 128) store_lse<C>(params, item, begin + i, params.sink ? params.sink[item.head] : -INFINITY);
}

// A row anew with plain arithmetic, by one warp, from the keys that it sees and no others. `lse2` is its log2 of the sum. Every branch is
// visibly uniform: one that is not, even here, drives the places of the main loop out of uniform registers, at a cost of 7 %.
template <ForwardConfig C>
__device__ __forceinline__ void recompute_row(const ForwardParams& params, const WorkItem<C.consumers>& item, int query, float lse2) {
  const auto row_of = [&](const Elements& t, long long row, int head) {
    return static_cast<const uint16_t*>(t.data) + (params.cu_seqlens_q ? 0 : item.batch * t.batch) + row * t.row + head * t.head;
  };
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int begin = uniform(first_key(item.band, query)), end = uniform(end_key(item.band, query));
  const uint16_t* q = row_of(params.q, item.sequence.q_row + query, item.head);
  const float slope = params.alibi_slopes ? params.alibi_slopes[item.batch * params.alibi_batch + item.head] : 0;
#pragma unroll 1
  for (int columns = 0; columns < params.head_dim_v; columns += 32) {
    const int column = columns + lane;
    const bool inside = column < params.head_dim_v;
    float sum = 0;
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
      const uint16_t* v = row_of(params.v, item.sequence.k_row + key, item.head / params.group);
      if (inside) sum += ptx::exp2(score - lse2) * ptx::to_float<C.element>(v[column]);
      if (uniform(!__any_sync(0xffffffff, sum == sum))) break;
    }
    if (inside) output_row<C>(params, item, query)[column] = static_cast<uint16_t>(ptx::pack<C.element>(sum, 0));
  }
}

// One warpgroup's pipeline. `ahead` issues scores one block ahead of the softmax; the members behind it follow.
template <ForwardConfig C>
struct Consumer {
  using Shared = ForwardShared<C>;
  static constexpr int kOutputs = C.head_dim_v / 2;

  const ForwardParams& params;
  Shared& shared;
  const int part;  // which warpgroup
  const bool leader = threadIdx.x % 32 == 0;

  float s[C.block_n / 2];
  uint32_t p[C.block_n / 4];
  float o[kOutputs];
  tile::Rows rows;

  tile::Ring<kItems> items;       // the present tile
  tile::Ring<C.q_slots> queries;  // its queries
  tile::Ring<C.stages> keys;      // the block whose scores are issued next
  tile::Ring<C.stages> values;    // the present block
  bool primed;                    // the scores of the next block have been issued
  int q_stage, k_stage;           // where its operands are
  float factor;

  // Each block's scores are issued by one warpgroup after the other, skipped blocks included, so that one's softmax runs under the
  // others' products: left alone, those who waited for the same keys stay in step and leave the tensor cores idle together.
  __device__ __forceinline__ void take_turn() {
    if constexpr (C.in_turn) ptx::barrier_sync(1 + part, 256);
  }
  __device__ __forceinline__ void pass_turn() {
    if constexpr (C.in_turn) ptx::barrier_arrive(1 + (part + 1 == C.consumers ? 0 : part + 1), 256);
  }

  // Hands blocks back unread that only other warpgroups see. Waiting for each keeps everyone within one round of the ring.
  __device__ __forceinline__ void skip(tile::Barrier (&full)[C.stages], tile::Barrier (&empty)[C.stages], tile::Ring<C.stages>& ring,
                                       int count) {
#pragma unroll 1
    for (; count > 0; --count, ring.advance()) {
      full[ring.stage()].wait(ring.parity());
      if (leader) empty[ring.stage()].arrive();
    }
  }
  __device__ __forceinline__ void skip_keys(int count) {
    if constexpr (C.in_turn)
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        take_turn();
        pass_turn();
      }
    skip(shared.k_full, shared.k_empty, keys, count);
  }
  __device__ __forceinline__ void skip_values(int count) { skip(shared.v_full, shared.v_empty, values, count); }

  // Blocks of the tile to the right and to the left of this warpgroup's.
  __device__ __forceinline__ int blocks_before(const WorkItem<C.consumers>& item) { return uniform(item.all.end - item.part[part].end); }
  __device__ __forceinline__ int blocks_behind(const WorkItem<C.consumers>& item) {
    return uniform(item.part[part].begin - item.all.begin);
  }

  __device__ __forceinline__ void find_keys() {
    shared.k_full[keys.stage()].wait(keys.parity());
    k_stage = keys.stage();
    keys.advance();
  }

  // Finds the operands of the next tile's first block. Values are still held here, so it may only wait for keys that others can load
  // without them: where a tile begins too far off, it leaves the pipeline to run empty.
  __device__ __forceinline__ void find_next(const WorkItem<C.consumers>& item) {
    const tile::Ring<kItems> following = items.next();
    shared.item_full[following.stage()].wait(following.parity());
    const WorkItem<C.consumers>& next = shared.item[following.stage()];
    const int gap = blocks_behind(item) + blocks_before(next);
    primed = uniform(next.valid && next.part[part].begin < next.part[part].end) && gap < C.stages;
    if (!primed) return;
    skip_keys(gap);
    const tile::Ring<C.q_slots> slot = queries.next();
    shared.q_full[slot.stage()][part].wait(slot.parity());
    q_stage = slot.stage();
    find_keys();
  }

  // Where there is no next block, the tensor cores multiply what lies at the last place and nobody looks at it: with a branch around
  // them the compiler would not let them run while the softmax does.
  __device__ __forceinline__ void issue_scores() {
    tile::multiply_scores<C.element, C.head_dim, C.block_n>(s, shared.q[q_stage][part], shared.k[k_stage], 0);
  }

  // Starts the pipeline at the present tile.
  __device__ __forceinline__ void prime(const WorkItem<C.consumers>& item) {
    skip_keys(blocks_before(item));
    q_stage = queries.stage();
    shared.q_full[q_stage][part].wait(queries.parity());
    find_keys();
    primed = true;
    take_turn();
    ptx::wgmma_fence();
    issue_scores();
    ptx::wgmma_commit();
    pass_turn();
  }

  // Whether the present tile has blocks for this warpgroup; waits until it is known.
  __device__ __forceinline__ bool here_is_work() {
    shared.item_full[items.stage()].wait(items.parity());
    const WorkItem<C.consumers>& item = shared.item[items.stage()];
    return uniform(item.valid && item.part[part].begin < item.part[part].end);
  }
  // Moves to the next tile with work, writing rows that see nothing on the way. False: no tile is left.
  __device__ __forceinline__ bool find_work() {
    while (!here_is_work()) {
      const WorkItem<C.consumers>& item = shared.item[items.stage()];
      if (!item.valid) return false;
      write_empty<C>(params, item, part);
      const int blocks = uniform(item.all.end - item.all.begin);
#pragma unroll 1
      for (int i = 0; i < blocks; ++i) {
        skip_keys(1);
        skip_values(1);
      }
      release_item();
    }
    return true;
  }
  __device__ __forceinline__ void release_item() {
    shared.item_empty[items.stage()].arrive();  // every lane, for what it has read
    items.advance();
  }

  // A block, from scores in registers to o. `fresh`: the first of its tile, `last`: its last.
  __device__ __forceinline__ void step(const WorkItem<C.consumers>& item, int key, bool edge, bool fresh, bool last) {
    const int query = item.m_begin + 64 * part + tile::this_lane().row;
    if constexpr (C.modified) {
      const float slope = params.alibi_slopes ? params.alibi_slopes[item.batch * params.alibi_batch + item.head] * kLog2e : 0;
      tile::modify_block(s, params.scale, params.softcap, slope, query + item.band.offset, key);
    }
    if (edge) tile::mask_block(s, item.band, query, key);
    if (fresh || !tile::add_block_stale<C.element>(rows, s, factor, p)) {
      float rescale[2];
      tile::add_block_exact<C.element>(rows, s, factor, p, rescale);
      if (!fresh && __any_sync(0xffffffff, rescale[0] != 1 || rescale[1] != 1)) {
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) o[i] *= rescale[tile::row_of(i)];
      }
    }
    if (last) find_next(item);
    if (primed) take_turn();
    ptx::wgmma_fence();
    tile::multiply_values<C.element, C.head_dim_v, C.block_n>(o, p, shared.v[values.stage()], 0, !fresh);
    ptx::wgmma_commit();
    if (!last) find_keys();
    ptx::wgmma_fence();
    issue_scores();
    ptx::wgmma_commit();
    if (primed) pass_turn();
  }

  // All that was issued is done.
  __device__ __forceinline__ void wait() {
    ptx::wgmma_wait<0>();
    tile::hold(o);
    tile::hold(s);
    tile::hold(p);
  }

  // o and lse of the finished tile. The scores of the next are on their way.
  __device__ __forceinline__ void write(const WorkItem<C.consumers>& item) {
    const int begin = item.m_begin + 64 * part + tile::this_lane().row;
    const BlockRange range = item.part[part];
    const bool masked = range.begin != range.full_begin || range.full_end != range.end;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = begin + 8 * r;
      float sum = tile::row_sum(rows.sum[r]), max = rows.max[r], shrink = 1;
      if (params.sink) {
        const float sink = params.sink[item.head] * kLog2e, both = fmaxf(max, sink);
        shrink = both == -INFINITY ? 0 : ptx::exp2(max - both);
        sum = both == -INFINITY ? 0 : sum * shrink + ptx::exp2(sink - both);
        max = both;
      }
      const bool inside = query < item.sequence.seqlen_q;
      const float lse2 = sum == 0 ? -INFINITY : max + log2f(sum);
      // A sum of 0 means that nothing was visible; NaN stays NaN.
      tile::store_row<C.element>(o, r, sum == 0 ? 0 : shrink / sum, inside ? output_row<C>(params, item, query) : nullptr,
                                 params.head_dim_v);
      if (inside && threadIdx.x % 4 == 0) store_lse<C>(params, item, query, lse2 * kLn2);
      if (masked) {
        // A value that is infinite or NaN times the 0 of a pair that is not visible is NaN: such rows are rare, and computed again.
        float product[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < kOutputs; ++i)
          if (tile::row_of(i) == r) product[i / 4 % 4] = fmaf(o[i], 0, product[i / 4 % 4]);
        unsigned spoilt = __ballot_sync(0xffffffff, product[0] + product[1] + product[2] + product[3] != 0 && inside && lse2 < INFINITY);
#pragma unroll 1
        while (uniform(static_cast<int>(spoilt)) != 0) {
          const int lane = __ffs(static_cast<int>(spoilt)) - 1;
          __syncwarp();  // the row has been stored
          recompute_row<C>(params, item, __shfl_sync(0xffffffff, query, lane), __shfl_sync(0xffffffff, lse2, lane));
          spoilt &= ~(0xfu << lane / 4 * 4);
        }
      }
    }
  }

  __device__ __forceinline__ void run() {
    if (part == C.consumers - 1) pass_turn();
    factor = C.modified ? 1.f : params.scale * kLog2e;
    for (uint32_t& x : p) x = 0;
    while (find_work()) {
      prime(shared.item[items.stage()]);
      do {
        const WorkItem<C.consumers>& item = shared.item[items.stage()];
        const BlockRange range = item.part[part];
        const int blocks = uniform(range.end - range.begin);
        rows.clear();
        skip_values(blocks_before(item));
        for (int done = 0; done < blocks; ++done) {
          const bool last = done + 1 == blocks;
          const int block = range.end - 1 - done, key = block * C.block_n;
          const bool edge = block < range.full_begin || block >= range.full_end;
          shared.v_full[values.stage()].wait(values.parity());
          wait();
          shared.k_empty[values.stage()].arrive_if(leader);
          shared.q_empty[queries.stage()][part].arrive_if(leader && last);
          step(item, key, edge, done == 0, last);
          ptx::wgmma_wait<1>();  // the product with the values, which was issued before the last scores
          shared.v_empty[values.stage()].arrive_if(leader);
          values.advance();
        }
        wait();
        skip_values(blocks_behind(item));
        if (!primed) skip_keys(blocks_behind(item));
        queries.advance();
        write(item);
        release_item();
      } while (primed);
    }
  }
};

// Row::kConfig is the configuration: nvcc 13.0 cannot name a kernel whose template argument is itself a struct.
template <class Row>
__global__ void __launch_bounds__(Row::kConfig.threads(), 1) forward_sm90(const __grid_constant__ ForwardParams params) {
  constexpr ForwardConfig C = Row::kConfig;
  extern __shared__ __align__(1024) unsigned char memory[];
  ForwardShared<C>& shared = *reinterpret_cast<ForwardShared<C>*>(memory);
  if (threadIdx.x == 0) shared.init_barriers();
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::give_registers<C.loader_registers()>();
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (warp == 0) load_queries<C>(params, shared);
    if (warp == 1) load_keys<C>(params, shared, shared.k, params.k_map, shared.k_full, shared.k_empty);
    if (warp == 2) load_keys<C>(params, shared, shared.v, params.v_map, shared.v_full, shared.v_empty);
  } else {
    ptx::take_registers<C.consumer_registers()>();
    Consumer<C> consumer{params, shared, uniform(static_cast<int>(threadIdx.x) / 128 - 1)};
    consumer.run();
  }
}

}  // namespace tilewise
