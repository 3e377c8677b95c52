// Exact attention forward on Hopper, one pass over keys and values. The kernel is at the end of the file and Consumer::run() before it;
// what they call stands above, in the order of events.
//
// A CTA stays on its SM and works through tiles of 64 queries per consumer warpgroup. These run at once, tied by barriers only:
//   four warps            move data (forward_memory.cuh): tiles and queries, keys, values, results
//   consumer warpgroups   each 64 queries on its own: s = q k^T, softmax, o += p v, with p staying in registers
// A consumer issues the scores of its next block and p v of the present one, across the end of a tile too. Its softmax runs under its own
// p v and the other consumers' products. Only blocks at the mask's edge are masked.
// Every tile is computed by one CTA in one order, whatever else runs: results repeat bit by bit.
#pragma once

#include <cfloat>

#include "core/mask.h"
#include "cuda/kernels/forward_memory.cuh"
#include "cuda/kernels/params.h"
#include "cuda/ptx/scalar.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/fragment.cuh"
#include "cuda/tile/gemm.cuh"
#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/rows.cuh"
#include "cuda/tile/shared.cuh"
#include "cuda/tile/store.cuh"

namespace tilewise {

using ptx::uniform;

// One warpgroup's pipeline over the blocks of its tiles, one after the other as if they were one long row. In each step the scores of the
// next block are issued, then the product of the present block's p with its values: while the tensor cores do both, and those of the other
// warpgroups, the scores turn into exponentials. What else there is to do is done behind the issue of scores, while they are multiplied.
template <ForwardConfig C>
struct Consumer {
  using Shared = ForwardShared<C>;
  using Item = WorkItem<C.consumers>;
  static constexpr int kOutputs = C.head_dim_v / 2;

  const ForwardParams& params;
  Shared& shared;
  const int part;  // which warpgroup
  const bool leader = threadIdx.x % 32 == 0;

  float s[C.block_n / 2];     // scores of the next block, then its exponentials
  uint32_t p[C.block_n / 4];  // exponentials of the present block
  float o[kOutputs];
  tile::Rows rows;  // of the tile that s belongs to
  float factor;     // from scores to powers of two
  bool settled;     // every row of this warp has met a key: its maximum may be kept

  tile::Ring<kItems> items;  // the tile of s
  tile::Ring<C.k_stages> keys;
  tile::Ring<C.v_stages> values;
  int k_stage, q_stage;                             // where the operands of s are
  int block;                                        // of s, falling to `begin`
  int begin, full_begin, full_end, before, behind;  // of its tile
  bool accumulate;                                  // the present block is not its tile's first
  bool present;                                     // there is one

  // Each block's scores are issued by one warpgroup after the other, skipped blocks included, so that one's softmax runs under the
  // others' products: left alone, those who waited for the same keys stay in step and leave the tensor cores idle together.
  __device__ __forceinline__ void take_turn() { ptx::barrier_sync(1 + part, 256); }
  __device__ __forceinline__ void pass_turn() { ptx::barrier_arrive(1 + (part + 1 == C.consumers ? 0 : part + 1), 256); }

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
  // All turns are taken before a key is handed back, so there must be places for as many: what the first and the last warpgroup's rows see
  // begins and ends no farther apart.
  static_assert(64 * (C.consumers - 1) <= C.block_n * C.k_stages);
  __device__ __forceinline__ void skip_keys(int count) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      take_turn();
      pass_turn();
    }
    skip(shared.k_full, shared.k_empty, keys, count);
  }
  __device__ __forceinline__ void skip_values(int count) { skip(shared.v_full, shared.v_empty, values, count); }

  __device__ __forceinline__ void find_keys() {
    shared.k_full[keys.stage()].wait(keys.parity());
    k_stage = keys.stage();
    keys.advance();
  }
  // Enters the tile at `items`, `gap` blocks of keys away.
  __device__ __forceinline__ void enter(const typename Item::Part& own, int gap) {
    block = uniform(own.end) - 1;
    begin = uniform(own.begin);
    full_begin = uniform(own.full_begin);
    full_end = uniform(own.full_end);
    before = uniform(own.before);
    behind = uniform(own.behind);
    const tile::Ring<C.q_slots> place{uniform(own.q_place)};
    q_stage = place.stage();
    if (gap > 0) skip_keys(gap);
    shared.q_full[q_stage].wait(place.parity());
    find_keys();
  }
  // Enters the tile behind the present one, whose last values are still held here: so it may only wait for keys that others can load
  // without them. Where a tile begins too far off, or there is none, false: the pipeline runs empty.
  __device__ __forceinline__ bool enter_next() {
    const tile::Ring<kItems> following = items.next();
    shared.item_full[following.stage()].wait(following.parity());
    const Item& next = shared.item[following.stage()];
    const typename Item::Part own = next.part[part];
    const int gap = behind + uniform(own.before);
    if (!uniform(next.valid && !own.empty()) || gap >= min_of(C.k_stages, C.v_stages)) return false;
    items = following;
    enter(own, gap);
    return true;
  }
  // Enters the next tile with work when the pipeline is empty, writing rows that see nothing on the way. False: no tile is left.
  __device__ __forceinline__ bool enter_first() {
    for (;; items.advance()) {
      shared.item_full[items.stage()].wait(items.parity());
      const Item& item = shared.item[items.stage()];
      const typename Item::Part own = item.part[part];
      if (!uniform(item.valid)) return false;
      if (uniform(!own.empty())) {
        enter(own, uniform(own.before));
        return true;
      }
      write_empty<C>(params, item, part);
#pragma unroll 1
      for (int i = uniform(own.before); i > 0; --i) {
        skip_keys(1);
        skip_values(1);
      }
      shared.item_empty[items.stage()].arrive();  // every lane, for what it has read
    }
  }

  __device__ __forceinline__ void issue_scores() {
    ptx::wgmma_fence();
    tile::multiply_scores<C.element, C.head_dim, C.block_n>(s, shared.q[q_stage], shared.k[k_stage], 0);
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void issue_values() {
    ptx::wgmma_fence();
    tile::multiply_values<C.element, C.head_dim_v, C.block_n>(o, p, shared.v[values.stage()], 0, accumulate);
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void wait_scores(bool valid) {
    ptx::wgmma_wait<1>();
    tile::hold(s);
    shared.q_empty[q_stage].arrive_if(leader && valid && block == begin);
  }
  // The block's exponentials. The keys are handed back in the middle: that the sum is never below 0 the compiler does not know, so it
  // computes one half before it lets the products with the values be waited for, and the other half while p is packed.
  __device__ __forceinline__ void exponentials(bool valid) {
    constexpr int kHalf = C.block_n / 4 / 4 * 4;
    rows.exponentials(s, factor, 0, kHalf);
    shared.k_empty[k_stage].arrive_if(leader && valid && !(rows.total() < 0));
    rows.exponentials(s, factor, kHalf, C.block_n / 2);
  }
  __device__ __forceinline__ void wait_values(bool valid) {
    ptx::wgmma_wait<0>();
    tile::hold(o);
    tile::hold(p);
    shared.v_empty[values.stage()].arrive_if(leader && valid);
    if (valid) values.advance();
  }
  __device__ __forceinline__ void pack() {
#pragma unroll
    for (int i = 0; i < C.block_n / 4; ++i) p[i] = ptx::pack<C.element>(s[2 * i], s[2 * i + 1]);
  }
  __device__ __forceinline__ void rescale() {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) o[i] *= rows.rescale[tile::row_of(i)];
  }

  // Scores as they are exponentiated: modified, masked, and with a maximum where the old one will not do.
  __device__ __forceinline__ void prepare() {
    const Item& item = shared.item[items.stage()];
    const int query = item.m_begin + 64 * part + tile::this_lane().row, key = block * C.block_n;
    if constexpr (C.modified) {
      const float slope = params.alibi_slopes ? params.alibi_slopes[item.batch * params.alibi_batch + item.head] * kLog2e : 0;
      tile::modify_block(s, params.scale, params.softcap, slope, query + item.band.offset, key);
    }
    if (block < full_begin || block >= full_end) tile::mask_block(s, item.band, query, key);
    if (C.modified || !settled)
      settled = rows.raise(s, factor);
    else
      rows.keep();
  }

  // The products of a step within a tile, until the scores are there.
  __device__ __forceinline__ void multiply() {
    --block;
    find_keys();
    take_turn();
    issue_scores();
    shared.v_full[values.stage()].wait(values.parity());
    issue_values();
    pass_turn();
    wait_scores(true);
  }
  // Steps where nothing is masked. This is where the time goes.
  __device__ __forceinline__ void plain_steps(int count) {
#pragma unroll 1
    for (; count > 0; --count) {
      multiply();
      const bool raise = !settled;
      if (raise) settled = rows.raise(s, factor);
      exponentials(true);
      wait_values(true);
      pack();
      if (raise || rows.outgrown()) {
        if (!raise) rows.keep();
        rows.shrink(s);
        rescale();
        pack();
      }
      accumulate = true;
    }
  }
  // Any other step within a tile.
  __device__ __forceinline__ void masked_step() {
    multiply();
    prepare();
    exponentials(true);
    wait_values(true);
    if (rows.outgrown()) rows.shrink(s);
    pack();
    if (rows.moved()) rescale();
    accumulate = true;
  }

  // What is left of a tile's rows: the factor of o, and lse. Of both rows step by step: each instruction waits for the one before.
  __device__ __forceinline__ void finish(const Item& item, float (&scale)[2], float (&lse)[2]) {
    float sum[2], max[2], shrink[2];
    tile::row_sums(rows.sum, sum);
#pragma unroll
    for (int r = 0; r < 2; ++r) max[r] = rows.max[r], shrink[r] = 1;
    if (params.sink) {
      const float sink = params.sink[item.head] * kLog2e;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float both = fmaxf(max[r], sink), shift = both == -INFINITY ? 0 : both;
        shrink[r] = ptx::exp2(max[r] - shift);
        sum[r] = sum[r] * shrink[r] + ptx::exp2(sink - shift);
        max[r] = both;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // A sum of 0 means that nothing was visible: o is 0, any finite factor will do, and the logarithm is -inf. Where the sum is not
      // finite, as in a row that outgrew float, the row becomes NaN, to be computed anew.
      const float inverse = shrink[r] * ptx::reciprocal(fmaxf(sum[r], FLT_MIN)), log = ptx::log2(sum[r]);
      scale[r] = sum[r] < INFINITY ? inverse : NAN;
      lse[r] = (max[r] + log) * kLn2;
    }
  }
  // Panels of o go through the common place one by one: between them the next tile's exponentials are computed.
  static constexpr bool kExponentialsBetween = !Shared::kOwnPlaces;
  // The finished tile, from o to shared memory, where it is stored from.
  __device__ __forceinline__ void write(const Item& item, const float (&scale)[2], const float (&lse)[2]) {
    const int row = tile::this_lane().row;
    const uint32_t parity = item.part[part].result & 1;
#pragma unroll
    for (int piece = 0; piece < Shared::kPieces; ++piece) {
      constexpr int kPairs = kOutputs / 2 / Shared::kPieces;
      shared.o_empty[part][piece].wait(parity);
      uint32_t worst = 0;
      tile::write_fragment<kPairs>(shared.o[Shared::o_slot(part)][piece], [&](int i) {
        const int at = 2 * (piece * kPairs + i), scores = C.block_n / 2;
        if (kExponentialsBetween) rows.exponentials(s, factor, at * scores / kOutputs, (at + 2) * scores / kOutputs);
        const uint32_t pair = ptx::pack<C.element>(o[at] * scale[tile::row_of(at)], o[at + 1] * scale[tile::row_of(at)]);
        worst = ptx::max_or_nan<C.element>(worst, pair);
        return pair;
      });
      if (piece == 0 && threadIdx.x % 4 == 0) shared.lse[part][row] = lse[0], shared.lse[part][row + 8] = lse[1];
      // NaN: of a row that should be so, of one that outgrew float, or because a value that is not finite met the 0 of a pair that is not
      // visible. Such rows are rare; who stores them finds out, and computes anew what must be.
      const bool spoilt = __any_sync(0xffffffff, ptx::has_nan<C.element>(worst));
      if (leader) shared.spoilt[part][piece][threadIdx.x % 128 / 32] = spoilt;
      ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
      shared.o_full[part][piece].arrive();  // every lane, for what it has written
    }
  }

  // Whether a tile's sums are finished before its last product is issued, while the other warpgroup waits for its turn: with two of head
  // dimension 64 that is 3 % faster (causal s512, H200), elsewhere up to 3 % slower.
  static constexpr bool kFinishFirst = C.head_dim == 64 && C.consumers == 2;

  // From the last block of a tile, or none, to the first scores of the next, or none. Where there are none, the tensor cores multiply
  // what lies at the last place and nobody looks at it: with a branch around them the compiler would not let them run while the softmax
  // does. So too the product of no block.
  __device__ __forceinline__ bool change_tile() {
    const tile::Ring<kItems> finished = items;
    const Item& item = shared.item[finished.stage()];
    const int passed_by = behind;
    bool more = true;
    if (present)
      more = enter_next();
    else if (!enter_first())
      return false;
    if (more) take_turn();
    issue_scores();
    float scale[2], lse[2];
    shared.o_wanted[part].arrive_if(!Shared::kOwnPlaces && leader && present);
    if (kFinishFirst && present) finish(item, scale, lse);
    if (present) shared.v_full[values.stage()].wait(values.parity());
    issue_values();
    if (more) pass_turn();
    if (!kFinishFirst && present) finish(item, scale, lse);
    rows.clear();
    settled = false;
    wait_scores(more);
    prepare();
    if (!kExponentialsBetween || !present) exponentials(more);
    wait_values(present);
    if (present) {
      shared.k_empty[k_stage].arrive_if(kExponentialsBetween && leader && more);
      // Before write(), which may wait for another warpgroup's tile, for which that one needs the turns passed here.
      if (passed_by > 0) {
        if (!more) skip_keys(passed_by);
        skip_values(passed_by);
      }
      write(item, scale, lse);
      if (!more) items.advance();
      shared.item_empty[finished.stage()].arrive();  // every lane, for what it has read
    }
    pack();
    if (more && before > 0) skip_values(before);
    accumulate = false;
    present = more;
    return true;
  }

  __device__ __forceinline__ void run() {
    if (part == C.consumers - 1) pass_turn();  // the first turn is the first warpgroup's
    factor = C.modified ? 1.f : params.scale * kLog2e;
    for (uint32_t& x : p) x = 0;
    block = begin = full_begin = full_end = before = behind = q_stage = k_stage = 0;
    accumulate = present = false;
    while (change_tile()) {
      while (present && block > begin) {
        const int plain = block <= full_end ? block - max_of(full_begin, begin) : 0;
        if (!C.modified && plain > 0)
          plain_steps(plain);
        else
          masked_step();
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
  if (params.head_dim < C.head_dim || params.head_dim_v < C.head_dim_v) shared.clear_columns(params.head_dim, params.head_dim_v);
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::give_registers<C.loader_registers()>();
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (warp == 0) load_queries<C>(params, shared);
    if (warp == 1) load_keys<C, false>(params, shared, shared.k, params.k_map, params.head_dim, shared.k_full, shared.k_empty);
    if (warp == 2) load_keys<C, true>(params, shared, shared.v, params.v_map, params.head_dim_v, shared.v_full, shared.v_empty);
    if (warp == 3) Storer<C>{params, shared}.run();
  } else {
    ptx::take_registers<C.consumer_registers()>();
    Consumer<C> consumer{params, shared, uniform(static_cast<int>(threadIdx.x) / 128 - 1)};
    consumer.run();
  }
}

}  // namespace tilewise
