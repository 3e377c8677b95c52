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
  Q q[C.q_slots];
  K k[C.k_stages];
  V v[C.v_stages];
  WorkItem<C.consumers> item[kItems];
  tile::Barrier item_full[kItems], item_empty[kItems];
  tile::Barrier q_full[C.q_slots], q_empty[C.q_slots];
  tile::Barrier k_full[C.k_stages], k_empty[C.k_stages], v_full[C.v_stages], v_empty[C.v_stages];

  __device__ __forceinline__ void init_barriers() {
    constexpr int kWarps = 4 * C.consumers;
    for (int i = 0; i < kItems; ++i) {
      item_full[i].init(32);
      item_empty[i].init(32 * kWarps + 2);  // and the loaders of keys and of values
    }
    for (int i = 0; i < C.q_slots; ++i) {
      q_full[i].init(1);
      q_empty[i].init(4);
    }
    for (int i = 0; i < C.k_stages; ++i) {
      k_full[i].init(1);
      k_empty[i].init(kWarps);
    }
    for (int i = 0; i < C.v_stages; ++i) {
      v_full[i].init(1);
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
  int slot = 0;
  uint32_t parity = 0;
  Schedule schedule;
  for (bool more = true; more; items.advance()) {
    shared.item_empty[items.stage()].wait(items.parity() ^ 1);
    WorkItem<C.consumers>& item = shared.item[items.stage()];
    more = schedule.next(params, C.block_n, item);
    __syncwarp();
    // The slots go round all warpgroups that have work: which one a warpgroup gets is part of the item.
    uint32_t ask[C.consumers];
    int slots[C.consumers];
#pragma unroll
    for (int part = 0; part < C.consumers; ++part) {
      ask[part] = more && item.part[part].begin < item.part[part].end;
      slots[part] = slot | static_cast<int>(parity) << 8;
      if (leader) item.q_slot[part] = slot, item.q_parity[part] = parity;
      if (ask[part] && ++slot == C.q_slots) slot = 0, parity ^= 1;
    }
    shared.item_full[items.stage()].arrive();  // every lane, for what it has written
    __syncwarp();
    if (!more) break;
#pragma unroll
    for (int part = 0; part < C.consumers; ++part) {
      if (!ask[part]) continue;  // sees nothing and asks for nothing
      const int stage = slots[part] & 255, row = item.m_begin + 64 * part;
      shared.q_empty[stage].wait(slots[part] >> 8 ^ 1);
      if (leader)
        tile::load_rows(shared.q[stage], &params.q_map, shared.q_full[stage], item.sequence.q_row + row, item.sequence.seqlen_q - row,
                        item.head, params.cu_seqlens_q ? 0 : item.batch);
    }
  }
}

// Loads the blocks of keys or of values of every tile, right to left. One warp.
template <ForwardConfig C, class T, int kStages>
__device__ __forceinline__ void load_keys(const ForwardParams& params, ForwardShared<C>& shared, T (&tiles)[kStages],
                                          const CUtensorMap& map, tile::Barrier (&full)[kStages], tile::Barrier (&empty)[kStages]) {
  if (threadIdx.x % 32 != 0) return;
  int loaded = 0; (void)loaded;
  tile::Ring<kItems> items;
  tile::Ring<kStages> ring;
  for (;; items.advance()) {
    shared.item_full[items.stage()].wait(items.parity());
    const WorkItem<C.consumers>& item = shared.item[items.stage()];
    if (!item.valid) return;
    const int batch = params.cu_seqlens_k ? 0 : item.batch, head = item.head / params.group;
    for (int block = item.all.end - 1; block >= item.all.begin; --block, ring.advance()) {
      empty[ring.stage()].wait(ring.parity() ^ 1);
      const int row = block * C.block_n;
#ifdef X_NOLOAD
      static_assert(true);
      if (++loaded > kStages) full[ring.stage()].arrive();
      else
#endif
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

// A row anew with plain arithmetic, by one warp, from the keys that it sees and no others. Every branch is visibly uniform: one that is
// not, even here, drives the places of the main loop out of uniform registers, at a cost of 7 %.
template <ForwardConfig C>
__device__ __forceinline__ void recompute_row(const ForwardParams& params, const WorkItem<C.consumers>& item, int query) {
  const auto row_of = [&](const Elements& t, long long row, int head) {
    return static_cast<const uint16_t*>(t.data) + (params.cu_seqlens_q ? 0 : item.batch * t.batch) + row * t.row + head * t.head;
  };
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int begin = uniform(first_key(item.band, query)), end = uniform(end_key(item.band, query));
  const uint16_t* q = row_of(params.q, item.sequence.q_row + query, item.head);
  const float slope = params.alibi_slopes ? params.alibi_slopes[item.batch * params.alibi_batch + item.head] : 0;
  float max = params.sink ? params.sink[item.head] * kLog2e : -INFINITY, sum = params.sink ? 1 : 0;
  // First the maximum and the sum, then 32 columns of o at a time.
#pragma unroll 1
  for (int columns = -32; columns < params.head_dim_v; columns += 32) {
    const int column = columns + lane;
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
      if (inside) o += ptx::exp2(score - max) * ptx::to_float<C.element>(v[column]);
      if (uniform(!__any_sync(0xffffffff, columns < 0 ? sum == sum : o == o))) break;
    }
    if (columns < 0 && lane == 0) store_lse<C>(params, item, query, (max + log2f(sum)) * kLn2);
    if (inside) output_row<C>(params, item, query)[column] = static_cast<uint16_t>(ptx::pack<C.element>(o / sum, 0));
  }
}

// One warpgroup's pipeline over the blocks of its tiles, one after the other as if they were one long row. In each step the scores of the
// next block are issued, then the product of the present block's p with its values: while the tensor cores do both, and those of the other
// warpgroups, the scores turn into exponentials. A finished tile is packed, and stored under the products of the following step.
template <ForwardConfig C>
struct Consumer {
  using Shared = ForwardShared<C>;
  using Item = WorkItem<C.consumers>;
  static constexpr int kOutputs = C.head_dim_v / 2;

  const ForwardParams& params;
  Shared& shared;
  const int part;  // which warpgroup
  const bool leader = threadIdx.x % 32 == 0;

  float s[C.block_n / 2];      // scores of the next block, then its exponentials
  uint32_t p[C.block_n / 4];   // exponentials of the present block
  float o[kOutputs];
  uint32_t out[C.store_late ? kOutputs / 2 : 1];  // a finished tile
  tile::Rows rows;             // of the tile that s belongs to
  float factor;                // from scores to powers of two
  float scale[2];              // from o to a finished tile
  unsigned spoilt;             // rows of the finished tile that must be computed anew: bit 4 i + r is row i + 8 r of this warp

  tile::Ring<kItems> stored, items;  // the oldest tile that is not stored; the tile of s
  tile::Ring<C.k_stages> keys;
  tile::Ring<C.v_stages> values;
  int k_stage, q_slot;    // where the operands of s are
  int block, blocks_end;  // of s: its block, which falls to blocks_end
  bool settled;           // every row of this warp has met a key: its maximum may be kept

  // Each block's scores are issued by one warpgroup after the other, skipped blocks included, so that one's softmax runs under the
  // others' products: left alone, those who waited for the same keys stay in step and leave the tensor cores idle together.
  __device__ __forceinline__ void take_turn() {
    if constexpr (C.in_turn) ptx::barrier_sync(1 + part, 256);
  }
  __device__ __forceinline__ void pass_turn() {
    if constexpr (C.in_turn) ptx::barrier_arrive(1 + (part + 1 == C.consumers ? 0 : part + 1), 256);
  }

  // Hands blocks back unread that only other warpgroups see. Waiting for each keeps everyone within one round of the ring.
  template <int kStages>
  __device__ __forceinline__ void skip(tile::Barrier (&full)[kStages], tile::Barrier (&empty)[kStages], tile::Ring<kStages>& ring,
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
  __device__ __forceinline__ int blocks_before(const Item& item) { return uniform(item.all.end - item.part[part].end); }
  __device__ __forceinline__ int blocks_behind(const Item& item) { return uniform(item.part[part].begin - item.all.begin); }

  __device__ __forceinline__ bool has_work(const Item& item) {
    return uniform(item.valid && item.part[part].begin < item.part[part].end);
  }
  __device__ __forceinline__ void release_item() {
    shared.item_empty[stored.stage()].arrive();  // every lane, for what it has read
    stored.advance();
  }

  __device__ __forceinline__ void find_keys() {
    shared.k_full[keys.stage()].wait(keys.parity());
    k_stage = keys.stage();
    keys.advance();
  }
  // Enters the tile at `items`, of which `before` blocks of keys are passed by.
  __device__ __forceinline__ void enter(const Item& item, int before) {
    skip_keys(before);
    block = uniform(item.part[part].end) - 1;
    blocks_end = uniform(item.part[part].begin);
    q_slot = uniform(item.q_slot[part]);
    shared.q_full[q_slot].wait(item.q_parity[part]);
  }

  // Enters the tile behind the present one, whose last values are still held here: so it may only wait for keys that others can load
  // without them. Where a tile begins too far off, or there is none, false: the pipeline runs empty.
  __device__ __forceinline__ bool enter_next() {
    const Item& item = shared.item[items.stage()];
    const tile::Ring<kItems> following = items.next();
    shared.item_full[following.stage()].wait(following.parity());
    const Item& next = shared.item[following.stage()];
    const bool work = has_work(next);
    const int gap = blocks_behind(item) + (work ? blocks_before(next) : 0);
    if (!work || gap >= min_of(C.k_stages, C.v_stages)) return false;
    items = following;
    enter(next, gap);
    return true;
  }

  // Enters the next tile with work when the pipeline is empty, writing rows that see nothing on the way. False: no tile is left.
  __device__ __forceinline__ bool enter_first() {
    for (;;) {
      shared.item_full[items.stage()].wait(items.parity());
      const Item& item = shared.item[items.stage()];
      if (has_work(item)) {
        enter(item, blocks_before(item));
        return true;
      }
      if (!uniform(item.valid)) return false;
      write_empty<C>(params, item, part);
      const int blocks = uniform(item.all.end - item.all.begin);
#pragma unroll 1
      for (int i = 0; i < blocks; ++i) {
        skip_keys(1);
        skip_values(1);
      }
      release_item();
      items = stored;
    }
  }

  // Scores as they are exponentiated: modified, masked, and with a maximum where the old one will not do.
  __device__ __forceinline__ void prepare(const Item& item) {
    const int query = item.m_begin + 64 * part + tile::this_lane().row, key = block * C.block_n;
    const BlockRange range = item.part[part];
    if constexpr (C.modified) {
      const float slope = params.alibi_slopes ? params.alibi_slopes[item.batch * params.alibi_batch + item.head] * kLog2e : 0;
      tile::modify_block(s, params.scale, params.softcap, slope, query + item.band.offset, key);
    }
    if (block < range.full_begin || block >= range.full_end) tile::mask_block(s, item.band, query, key);
    if (C.modified || !settled)
      settled = rows.raise(s, factor);
    else
      rows.keep();
  }

  // The quads of lanes for which `condition` holds anywhere, as bits of `spoilt`.
  static __device__ __forceinline__ unsigned quads(bool condition, int r) {
    unsigned lanes = __ballot_sync(0xffffffff, condition);
    lanes |= lanes >> 1;
    return ((lanes | lanes >> 2) & 0x11111111) << r;
  }

  // What is left of a tile's rows: lse, and the factor of o.
  __device__ __forceinline__ void finish(const Item& item) {
    spoilt = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = item.m_begin + 64 * part + tile::this_lane().row + 8 * r;
      float sum = tile::row_sum(rows.sum[r]), max = rows.max[r], shrink = 1;
      if (params.sink) {
        const float sink = params.sink[item.head] * kLog2e, both = fmaxf(max, sink);
        shrink = both == -INFINITY ? 0 : ptx::exp2(max - both);
        sum = both == -INFINITY ? 0 : sum * shrink + ptx::exp2(sink - both);
        max = both;
      }
      const bool inside = query < item.sequence.seqlen_q;
      // A sum of 0 means that nothing was visible; NaN stays NaN.
      scale[r] = sum == 0 ? 0 : shrink / sum;
      if (inside && threadIdx.x % 4 == 0) store_lse<C>(params, item, query, sum == 0 ? -INFINITY : (max + log2f(sum)) * kLn2);
      spoilt |= quads(inside && sum == INFINITY, r);
    }
  }

  // A value that is infinite or NaN times the 0 of a pair that is not visible is NaN: such rows are rare, and computed anew.
  __device__ __forceinline__ void find_spoilt(const Item& item) {
    const BlockRange range = item.part[part];
    if (uniform(range.begin != range.full_begin || range.full_end != range.end)) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float product[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < kOutputs; ++i)
          if (tile::row_of(i) == r) product[i / 4 % 4] = fmaf(o[i], 0, product[i / 4 % 4]);
        const int query = item.m_begin + 64 * part + tile::this_lane().row + 8 * r;
        spoilt |= quads(product[0] + product[1] + product[2] + product[3] != 0 && scale[r] == scale[r] && query < item.sequence.seqlen_q, r);
      }
    }
  }
  // Pair i of the finished tile.
  __device__ __forceinline__ uint32_t finished(int i) {
    const float x = scale[tile::row_of(2 * i)];
    return ptx::pack<C.element>(o[2 * i] * x, o[2 * i + 1] * x);
  }

  // Stores the finished tile, the oldest.
  __device__ __forceinline__ void store() {
    const Item& item = shared.item[stored.stage()];
    const int first = item.m_begin + 64 * part + tile::this_lane().row;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = first + 8 * r;
      uint16_t* row = query < item.sequence.seqlen_q ? output_row<C>(params, item, query) : nullptr;
      if constexpr (C.store_late)
        tile::store_row<kOutputs / 2>([this](int i) { return out[i]; }, r, row, params.head_dim_v);
      else
        tile::store_row<kOutputs / 2>([this](int i) { return finished(i); }, r, row, params.head_dim_v);
    }
#pragma unroll 1
    for (; uniform(static_cast<int>(spoilt)) != 0; spoilt &= spoilt - 1) {
      const int bit = __ffs(static_cast<int>(spoilt)) - 1;
      __syncwarp();  // the row has been stored
      recompute_row<C>(params, item, uniform(first) + bit / 4 + 8 * (bit & 1));
    }
    release_item();
  }

  // Issues the scores of the next block and the product of the present one.
  __device__ __forceinline__ void multiply(bool accumulate) {
    ptx::wgmma_fence();
    tile::multiply_scores<C.element, C.head_dim, C.block_n>(s, shared.q[q_slot], shared.k[k_stage], 0);
    ptx::wgmma_commit();
    tile::multiply_values<C.element, C.head_dim_v, C.block_n>(o, p, shared.v[values.stage()], 0, accumulate);
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void pack() {
#pragma unroll
    for (int i = 0; i < C.block_n / 4; ++i) p[i] = ptx::pack<C.element>(s[2 * i], s[2 * i + 1]);
  }
  __device__ __forceinline__ void rescale() {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) o[i] *= rows.rescale[tile::row_of(i)];
  }

  // Steps in the middle of a tile: nothing is masked, begins or ends. This is where the time goes.
  __device__ __forceinline__ void middle(int count) {
#pragma unroll 1
    for (; count > 0; --count) {
      --block;
      find_keys();
      shared.v_full[values.stage()].wait(values.parity());
      take_turn();
      multiply(true);
      pass_turn();
      ptx::wgmma_wait<1>();
      tile::hold(s);
      shared.k_empty[k_stage].arrive_if(leader);
      shared.q_empty[q_slot].arrive_if(leader && block == blocks_end);
      rows.template exponentials<0, C.block_n / 2>(s, factor);
      ptx::wgmma_wait<0>();
      tile::hold(o);
      tile::hold(p);
      shared.v_empty[values.stage()].arrive_if(leader);
      values.advance();
      pack();
      if (rows.outgrown()) {
        rows.keep();
        rows.shrink(s);
        rescale();
        pack();
      }
    }
  }

  __device__ __forceinline__ void run() {
    if (part == C.consumers - 1) pass_turn();
    factor = C.modified ? 1.f : params.scale * kLog2e;
    for (uint32_t& x : p) x = 0;
    bool filled = false, first = false, waiting = false;  // p holds a block, the first of its tile; out waits to be stored
    for (;;) {
      // Where the next scores come from. Where there are none, the tensor cores multiply what lies at the last place and nobody looks at
      // it: with a branch around them the compiler would not let them run while the softmax does. So too the product of no block.
      const bool ends = !filled || block == blocks_end;  // the present block is its tile's last
      const int here = items.stage();
      bool scores = true;
      if (first && filled) skip_values(blocks_before(shared.item[here]));
      if (!ends) {
        --block;
      } else if (filled) {
        scores = enter_next();
      } else if (waiting) {
        scores = false;  // the pipeline runs empty
      } else if (!enter_first()) {
        return;
      }
      if (scores) find_keys();
      if (filled) shared.v_full[values.stage()].wait(values.parity());
      if (scores) take_turn();
      multiply(!first);
      if (scores) pass_turn();

      if (waiting) {
        store();
        waiting = false;
      }
      if (ends && filled) finish(shared.item[here]);
      if (ends) {
        rows.clear();
        settled = false;
      }

      ptx::wgmma_wait<1>();  // the scores
      tile::hold(s);
      shared.k_empty[k_stage].arrive_if(leader && scores);
      shared.q_empty[q_slot].arrive_if(leader && scores && block == blocks_end);
      if (scores) prepare(shared.item[items.stage()]);
      rows.template exponentials<0, C.block_n / 2>(s, factor);

      ptx::wgmma_wait<0>();  // the values
      tile::hold(o);
      tile::hold(p);
      pack();
      if (scores && rows.outgrown()) {
        rows.shrink(s);
        pack();
      }
      if (filled) {
        shared.v_empty[values.stage()].arrive_if(leader);
        values.advance();
        if (ends) {
          find_spoilt(shared.item[here]);
          if constexpr (C.store_late) {
#pragma unroll
            for (int i = 0; i < kOutputs / 2; ++i) out[i] = finished(i);
            waiting = true;
          }
          skip_values(blocks_behind(shared.item[here]));
          if (!scores) skip_keys(blocks_behind(shared.item[here]));
          if constexpr (!C.store_late) store();
        } else if (rows.moved()) {
          rescale();
        }
      }
      if (!scores && !waiting) items = stored;
      first = ends;
      filled = scores;

      if constexpr (!C.modified) {
        // Up to the next block that is masked or its tile's last.
        const BlockRange range = shared.item[items.stage()].part[part];
        if (filled && !first && settled && block <= uniform(range.full_end)) middle(block - uniform(max_of(range.full_begin, range.begin)));
      }
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
