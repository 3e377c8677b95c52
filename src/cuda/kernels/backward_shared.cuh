// What the warpgroups of the backward kernel share, and the warps that serve them: one claims works, others load or keep turns.
#pragma once

#include "cuda/kernels/gradient_work.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/scalar.cuh"
#include "cuda/tile/cycle.cuh"
#include "cuda/tile/load.cuh"
#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/shared.cuh"

namespace tilewise {

constexpr int kLoaderRegisters = 32;
constexpr int kSlots = 2;  // tiles of ds on their way to the dq warpgroup

// Of the other CTA of a pair: its keys, of the columns of dq that this one adds for both, and its ds.
template <bool kPair, int kColumns>
struct OtherTiles {};
template <int kColumns>
struct OtherTiles<true, kColumns> {
  tile::Tile<64, kColumns> k;
  tile::Tile<kBlockM, 64> ds;
};

template <BackwardConfig C>
struct BackwardShared {
  static constexpr int kRows = 64;
  tile::Tile<kRows, C.head_dim> k[C.own_tiles()];
  tile::Tile<kRows, C.head_dim_v> v[C.own_tiles()];
  tile::Tile<C.block_m, C.head_dim> q[C.stages];
  tile::Tile<C.block_m, C.head_dim_v> do_[C.stages];
  tile::Tile<C.block_m, kRows> ds[kSlots][C.own_tiles()];  // queries are rows, 64 keys columns
  OtherTiles<C.pair, C.dq_columns> other;
  static constexpr int kRowBytes = C.addends ? kAddendBytes : kRowFloats * 4;  // of a tile
  // 8 rows of 8 columns, 1 for those of the addends.
  alignas(128) unsigned char ones[128];
  alignas(128) unsigned char rows[C.stages][C.tiles() * kRowBytes];  // gradient_params.h
  BackwardWork work[2];                                              // the present one and the next
  tile::Barrier work_full[2], work_empty[2], claim_next, keys_empty;
  tile::Barrier sums_free, sums_added, share_ready, share_written;  // for each claim: may it be done, has it been
  tile::Barrier k_full, v_full, q_full[C.stages], do_full[C.stages], q_empty[C.stages];
  tile::Barrier do_empty[C.stages], p_full[kSlots];             // of roles; else q_empty stands for do too
  tile::Barrier my_turn, added, told;                           // where the order of additions to dq matters: see Turns
  tile::Barrier other_k_full, other_ds_full, other_claim_full;  // of a pair
  int other_claim;                                              // what the other CTA has claimed for both
  tile::Barrier ds_full[kSlots][C.own_tiles()], ds_empty[kSlots][C.own_tiles()];

  // Columns that are not there.
  __device__ __forceinline__ void clear_columns(int head_dim, int head_dim_v) {
    const int thread = static_cast<int>(threadIdx.x), threads = C.threads();
    for (auto& tile : k) tile::clear_panels(tile, head_dim, thread, threads);
    for (auto& tile : v) tile::clear_panels(tile, head_dim_v, thread, threads);
    for (auto& tile : q) tile::clear_panels(tile, head_dim, thread, threads);
    for (auto& tile : do_) tile::clear_panels(tile, head_dim_v, thread, threads);
    if constexpr (C.pair) tile::clear_panels(other.k, max_of(head_dim - ptx::cluster_rank() * C.dq_columns, 0), thread, threads);
  }
  __device__ __forceinline__ void init_ones() {
    if (threadIdx.x >= 8) return;
    reinterpret_cast<uint4*>(ones)[threadIdx.x] = make_uint4(0x3f803f80, 0x3f80, 0, 0);  // three bfloat16
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
  }
  __device__ __forceinline__ void init_barriers(bool deterministic) {
    for (int i = 0; i < 2; ++i) {
      work_full[i].init(32);
      // The warpgroups, and a warp that loads; deterministic also threads that watch turns and tell them, else of pairs another warp that
      // loads; of pairs a thread that exchanges.
      work_empty[i].init(128 * (C.mains + 1) + 32 + (deterministic ? 2 : C.pair ? 32 : 0) + (C.pair ? 1 : 0));
    }
    claim_next.init(C.ctas());
    keys_empty.init(4 + 128 * C.mains);  // dq's warps have used k for the last time, all main threads have seen k and v come
    sums_free.init(1);
    sums_added.init(4);
    share_ready.init(1);
    share_written.init(4 * C.mains);
    k_full.init(C.own_tiles());
    v_full.init(C.own_tiles());
    for (int i = 0; i < C.stages; ++i) {
      q_full[i].init(2);  // the tile and the rows
      do_full[i].init(1);
      // Warps or threads that have used it; of roles, of the one that is last.
      q_empty[i].init(C.pair ? 128 : (C.addends ? 4 : 128) * C.mains);
      do_empty[i].init(4 * C.mains);
    }
    for (int i = 0; i < kSlots; ++i) p_full[i].init(128);
    my_turn.init(1);
    added.init(4);
    told.init(1);
    for (int i = 0; i < kSlots; ++i)
      for (int j = 0; j < C.own_tiles(); ++j) {
        ds_full[i][j].init(C.pair ? 128 : 4);
        ds_empty[i][j].init(4 * C.ctas());
      }
    other_k_full.init(1);
    other_ds_full.init(1);
    other_claim_full.init(1);
    ::cuda::ptx::fence_mbarrier_init(::cuda::ptx::sem_release, ::cuda::ptx::scope_cluster);
  }
};

// Bytes to launch with: behind the last addends there is memory, because memcheck takes each 8 columns of them for 16.
template <BackwardConfig C>
constexpr size_t kSharedBytes = sizeof(BackwardShared<C>) + (C.addends ? C.tiles() * kAddendBytes : 0);

// A role's way through what the CTA claims.
template <BackwardConfig C>
struct Claims {
  const BackwardParams& params;
  BackwardShared<C>& shared;
  tile::Ring<2> place;

  __device__ __forceinline__ const BackwardWork& work() const { return shared.work[place.stage()]; }
  // Steps come from the last one on: all blocks of keys that see it begin there and read the same queries at the same time. Not of roles
  // (measured), nor where the order of additions to dq matters: blocks that begin at different steps need not wait for one another.
  __device__ __forceinline__ bool falling() const { return !C.pair && !params.deterministic; }
  // Through a range of steps; `whole`: all keys of the block are there, else every step is at the edge. Its values are known to be the same
  // in all lanes.
  __device__ __forceinline__ Walk walk(const BlockRange& range, bool whole) const {
    const int begin = ptx::uniform(range.begin), end = ptx::uniform(range.end);
    const int full_begin = ptx::uniform(range.full_begin), full_end = ptx::uniform(whole ? range.full_end : range.full_begin);
    const int both = begin + end;
    if (falling())
      return {.falling = true, .begin = begin, .end = end, .last = both - 1, .full_begin = both - full_end, .full_end = both - full_begin};
    return {.falling = false, .begin = begin, .end = end, .last = 0, .full_begin = full_begin, .full_end = full_end};
  }
  // Which of a pair this CTA is, and the steps of its own keys.
  static __device__ __forceinline__ int rank() { return C.pair ? ptx::cluster_rank() : 0; }
  __device__ __forceinline__ const BlockRange& own_steps() const { return C.pair ? work().mine[rank()] : work().all; }
  // Waits for the present one; false: it is past the last.
  __device__ __forceinline__ bool enter() {
    shared.work_full[place.stage()].wait(place.parity());
    return work().claim < params.claims;
  }
  // Goes on to the next. Every thread arrives, for what it has read.
  __device__ __forceinline__ void leave() {
    shared.work_empty[place.stage()].arrive();
    place.advance();
  }
};

// One warp: claims, finds what claims mean, and keeps in step with other CTAs.
// The next claim comes when few loads of the one before are left to issue: late, so that who is fast gets more, and early enough to load
// the next block of keys as soon as it can be, though to find out what a claim means takes long beside all else. Even the first
// is not the CTA's number: others may wait for what has been claimed, so it must be somebody's who is running. What others have done is
// asked here, and what the main warpgroups have written is told here, because the way to global memory and back takes thousands of clocks;
// nobody waits for a claim that is not smaller than his own, but for the other CTA of a pair, which runs at the same time.
template <BackwardConfig C>
struct Claimer {
  const BackwardParams& params;
  BackwardShared<C>& shared;
  const bool leader = threadIdx.x % 32 == 0;

  // All works of a unit have added to its sums, or all shares are written where sums are used again: there are as many of them then. Of a
  // pair both CTAs count.
  __device__ __forceinline__ bool all(const int& count) const { return ptx::load_acquire(&count) == params.k_blocks * C.ctas(); }
  // What a claim's sums wait for: dq of the unit that had their place before, if there was one.
  __device__ __forceinline__ bool is_free(int before) const { return before < 0 || all(params.progress[before].written); }
  // Whether all of the unit that a claim writes a share of have added to its sums.
  __device__ __forceinline__ bool is_summed(int claim) const {
    return claim < params.lag || claim >= params.claims || all(params.progress[(claim - params.lag) / params.shares].added);
  }

  // Whether what the preprocess kernels do for a unit has been done.
  __device__ __forceinline__ bool is_ready(int unit) const {
    return unit < params.ahead || ptx::load_acquire(&params.progress[unit].ready) == 2 * params.group * params.q_tiles;
  }

  // By one thread; of a pair the first claims, and tells the other.
  __device__ __forceinline__ int next_claim(int count) {
    if constexpr (C.pair) {
      if (ptx::cluster_rank() == 1) {
        shared.other_claim_full.arrive_and_expect(4);
        shared.other_claim_full.wait(count % 2);
        return shared.other_claim;
      }
    }
    const int claim = atomicAdd(&params.counters->claims, 1);
    if constexpr (C.pair) {
      ptx::store_in(ptx::address_in(1, &shared.other_claim), claim, ptx::address_in(1, &shared.other_claim_full));
    }
    return claim;
  }
  __device__ __forceinline__ void run() {
    uint32_t parity = 0;
    if (params.ahead == params.units)
      ptx::wait_for_previous();
    else
      while (!__all_sync(0xffffffff, ptx::load_acquire(&params.counters->begun) != 0)) __nanosleep(20);
#pragma unroll 1
    for (int count = 0, before = 0;; ++count) {
      BackwardWork& work = shared.work[count % 2];
      const int phase = count % 2 ^ 1;  // of the claim before
      int claim = 0;
      if (leader) claim = next_claim(count);
      claim = ptx::uniform(claim);
      shared.work_empty[count % 2].wait(count / 2 % 2 ^ 1);
      const bool any = find_work<C>(params, work, claim);
      if (leader) work.parity = parity;
      if (any) parity ^= 1;
      const int unit = ptx::uniform(leader ? work.unit : 0);  // which the first lane has written
      // Works without steps wait too: what they are counted for lets the ring's next unit add, and its sums must be 0 by then.
      if (claim < params.works) {
        while (!__all_sync(0xffffffff, is_ready(unit))) __nanosleep(20);
        ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_global);  // the copy engine reads what they have written
      }
      shared.work_full[count % 2].arrive();                            // every lane, for what it has written
      if (leader) find_share(params, work.share, claim - params.lag);  // nobody reads it before share_ready
      __syncwarp();
      const int unit_before = claim < params.works ? unit - params.ring : -1;
      const bool free = __all_sync(0xffffffff, is_free(unit_before)), ready = __all_sync(0xffffffff, is_summed(claim));
      // Not before all have passed the phase before, or two phases could pass unseen.
      if (count > 0) shared.sums_added.wait(phase);
      __syncwarp();
      if (free) shared.sums_free.arrive_if(leader);
      if (count > 0) shared.share_written.wait(phase);
      __syncwarp();
      if (ready) shared.share_ready.arrive_if(leader);
      if (count > 0 && leader && before >= params.lag) ptx::add_release(&params.progress[(before - params.lag) / params.shares].written, 1);
      before = claim;
      if (claim >= params.claims) break;
      if (!free) {
        while (!__all_sync(0xffffffff, is_free(unit_before))) __nanosleep(20);
        shared.sums_free.arrive_if(leader);
      }
      if (!ready) {
        while (!__all_sync(0xffffffff, is_summed(claim)))
          __nanosleep(claim < params.works ? 20 : 500);  // who has no work is not in a hurry
        shared.share_ready.arrive_if(leader);
      }
      if (Claims<C>::rank() == 0) shared.claim_next.wait(count % 2);
    }
    ptx::wait_for_previous();  // so that this kernel does not end before it
  }
};

// One warp: each work's block of keys, then every step's queries with their rows. Of pairs two warps: q and do come and go at their own
// times. What a work says is not read in the steps: behind additions to dq each read of shared memory takes hundreds of clocks.
template <BackwardConfig C>
struct Loader : Claims<C> {
  using Claims<C>::params, Claims<C>::shared, Claims<C>::work;
  tile::Cycle<C.stages> at;
  const bool leader = threadIdx.x % 32 == 0;
  // When that few steps are left to load, the next work is claimed: where the order of additions matters late, for who claims first is
  // waited for.
  const int claim_ahead = params.deterministic ? 1 : 4;

  // Rows of one sequence.
  struct Rows {
    int first, count, batch;
  };
  static __device__ __forceinline__ Rows make_rows(long long first, int count, int batch, bool packed) {
    return {ptx::uniform(static_cast<int>(first)), ptx::uniform(count), packed ? 0 : ptx::uniform(batch)};
  }
  template <class T>
  static __device__ __forceinline__ void load(T& to, const CUtensorMap& map, tile::Barrier& full, const Rows& rows, int row, int head,
                                              int columns) {
    tile::load_rows(to, &map, full, rows.first + row, rows.count - row, head, rows.batch, columns);
  }
  template <class T>
  __device__ __forceinline__ void load_keys(T (&to)[C.own_tiles()], const CUtensorMap& map, tile::Barrier& full, const Rows& rows, int head,
                                            int columns) {
    const int begin = ptx::uniform(work().n_begin) + 64 * this->rank();
    if (!ptx::elect()) return;
#pragma unroll
    for (int i = 0; i < C.own_tiles(); ++i) load(to[i], map, full, rows, begin + 64 * i, head, columns);
  }
  // Of a pair, the other's keys.
  __device__ __forceinline__ void load_other(const Rows& rows, int head) {
    const int row = ptx::uniform(work().n_begin) + 64 * (1 - this->rank());
    if (ptx::elect())
      tile::load_rows(shared.other.k, &params.k_map, shared.other_k_full, rows.first + row, rows.count - row, head, rows.batch,
                      params.head_dim, this->rank() * C.dq_columns);
  }
  // The next work may be claimed; of a pair, when both say so.
  __device__ __forceinline__ void claim_next(bool now) {
    if constexpr (C.pair)
      ptx::arrive_in(ptx::address_in(0, &shared.claim_next), leader && now);
    else
      shared.claim_next.arrive_if(leader && now);
  }
  // What belongs to q with kQ, to do with kDo.
  template <bool kQ, bool kDo>
  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (; this->enter(); this->leave()) {
      const Walk walk = this->walk(this->own_steps(), true);
      const Sequence& sequence = work().part.sequence;
      const Rows queries = make_rows(sequence.q_row, sequence.seqlen_q, work().batch, params.cu_seqlens_q != nullptr);
      const int kv_head = ptx::uniform(work().head);
      int left = params.group * (walk.end - walk.begin);
      if (ptx::uniform(work().all.end - work().all.begin) > 0) {
        const Rows keys = make_rows(sequence.k_row, sequence.seqlen_k, work().batch, params.cu_seqlens_k != nullptr);
        shared.keys_empty.wait(ptx::uniform(work().parity) ^ 1);
        if constexpr (kQ) load_keys(shared.k, params.k_map, shared.k_full, keys, kv_head, params.head_dim);
        if constexpr (kQ && C.pair) load_other(keys, kv_head);
        if constexpr (kDo) load_keys(shared.v, params.v_map, shared.v_full, keys, kv_head, params.head_dim_v);
      }
      if constexpr (kQ) claim_next(left < claim_ahead);
#pragma unroll 1
      for (int head = kv_head * params.group; left > 0; ++head) {
        const unsigned char* rows = (C.addends ? params.addends : reinterpret_cast<const unsigned char*>(params.rows)) +
                                    (head * params.tiles + work().first_tile) * shared.kRowBytes;
#pragma unroll 1
        for (int i = walk.begin; i < walk.end; ++i, --left, at.advance()) {
          const int m = walk.step(i), row = m * C.block_m;
          if constexpr (kQ) claim_next(left == claim_ahead);
          const auto load_do = [&] {
            load(shared.do_[at.stage], params.do_map, shared.do_full[at.stage], queries, row, head, params.head_dim_v);
          };
          if constexpr (C.pair && kDo) {  // before q, whose place is free later
            shared.do_empty[at.stage].wait(at.parity ^ 1);
            if (ptx::elect()) load_do();
          }
          if constexpr (kQ) {
            tile::Barrier& full = shared.q_full[at.stage];
            shared.q_empty[at.stage].wait(at.parity ^ 1);
            if (ptx::elect()) {
              load(shared.q[at.stage], params.q_map, full, queries, row, head, params.head_dim);
              if constexpr (!C.pair) load_do();
              full.arrive_and_expect(sizeof(shared.rows[0]));
              ::cuda::ptx::cp_async_bulk(::cuda::ptx::space_cluster, ::cuda::ptx::space_global, shared.rows[at.stage],
                                         rows + static_cast<long long>(m) * sizeof(shared.rows[0]), sizeof(shared.rows[0]), &full.state);
            }
          }
        }
      }
    }
  }
};

// Two threads, where the order of additions to dq matters: one watches for each step's turn and tells the dq warpgroup, the other tells the
// next block of keys when the additions have been made. So nobody waits for the way to global memory and back, which takes longer than the
// additions: one thread for both ways was what everything waited for. A turn is told to the dq warpgroup when the additions before it have
// been seen by who tells, so that no barrier can be two phases ahead of anyone.
template <BackwardConfig C>
struct Turns : Claims<C> {
  using Claims<C>::params, Claims<C>::shared, Claims<C>::work;

  template <bool kWatch>
  __device__ __forceinline__ void run() {
    uint32_t parity = 0;
#pragma unroll 1
    for (; this->enter(); this->leave())
#pragma unroll 1
      for (int head = 0; head < params.group; ++head)
#pragma unroll 1
        for (int m = work().all.begin; m < work().all.end; ++m, parity ^= 1) {
          int* turn = params.turn + tile_index<C>(params, work(), head, m) * C.ctas() + this->rank();
          if (kWatch) {
            const int mine = turn_of(work().part.band, m, work().n_block, work().run_begin, work().run_end, C.block_m, C.block_n());
            while (ptx::load_acquire(turn) != mine) __nanosleep(20);
            shared.told.wait(parity ^ 1);  // nobody has still to see the turn before, or that its additions have been made
            shared.my_turn.arrive();
          } else {
            shared.added.wait(parity);
            shared.told.arrive();
            ptx::add_release(turn, 1);
          }
        }
  }
};

}  // namespace tilewise
