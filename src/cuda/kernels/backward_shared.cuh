// What the warpgroups of the backward kernel share, the warp that loads, and the warpgroup that sums dq.
#pragma once

#include "cuda/kernels/gradient_work.cuh"
#include "cuda/ptx/scalar.cuh"
#include "cuda/tile/cycle.cuh"
#include "cuda/tile/gemm.cuh"
#include "cuda/tile/load.cuh"
#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/shared.cuh"

namespace tilewise {

constexpr int kLoaderRegisters = 24;
constexpr int kSlots = 2;  // tiles of ds on their way to the dq warpgroup

template <BackwardConfig C>
struct BackwardShared {
  static constexpr int kRows = 64;
  tile::Tile<kRows, C.head_dim> k[C.key_tiles()];
  tile::Tile<kRows, C.head_dim_v> v[C.key_tiles()];
  tile::Tile<C.block_m, C.head_dim> q[C.stages];
  tile::Tile<C.block_m, C.head_dim_v> do_[C.stages];
  tile::Tile<C.block_m, kRows> ds[kSlots][C.key_tiles()];                      // queries are rows, 64 keys columns
  tile::Tile<C.roles ? 8 : C.block_m, kRows> nothing;                          // zeros, for keys that a step's queries do not see
  static constexpr int kRowBytes = C.addends ? kAddendBytes : kRowFloats * 4;  // of a tile
  // 8 rows with 1 for the columns of the addends. Not last: memcheck takes them for the 64 rows that the product sees.
  alignas(256) unsigned char ones[256];
  alignas(256) unsigned char rows[C.stages][C.tiles() * kRowBytes];  // gradient_params.h
  BackwardWork work;
  tile::Barrier k_full, v_full, q_full[C.stages], do_full[C.stages], q_empty[C.stages];
  tile::Barrier do_empty[C.stages], p_full[kSlots];  // of roles; else q_empty stands for do too
  tile::Barrier my_turn, added;                      // where the order of additions to dq matters: see Turns
  tile::Barrier ds_full[kSlots][C.key_tiles()], ds_empty[kSlots][C.key_tiles()];

  // Columns that are not there.
  __device__ __forceinline__ void clear_columns(int head_dim, int head_dim_v) {
    const int thread = static_cast<int>(threadIdx.x), threads = C.threads();
    for (auto& tile : k) tile::clear_panels(tile, head_dim, thread, threads);
    for (auto& tile : v) tile::clear_panels(tile, head_dim_v, thread, threads);
    for (auto& tile : q) tile::clear_panels(tile, head_dim, thread, threads);
    for (auto& tile : do_) tile::clear_panels(tile, head_dim_v, thread, threads);
  }
  __device__ __forceinline__ void init_ones() {
    const int row = static_cast<int>(threadIdx.x) / 2, half = threadIdx.x % 2;
    if (row >= 8) return;
    const bool here = half == 0;  // three bfloat16
    *reinterpret_cast<uint4*>(ones + tile::narrow_offset(row, half)) = make_uint4(here ? 0x3f803f80 : 0, here ? 0x3f80 : 0, 0, 0);
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
  }
  __device__ __forceinline__ void init_barriers() {
    k_full.init(C.key_tiles());
    v_full.init(C.key_tiles());
    for (int i = 0; i < C.stages; ++i) {
      q_full[i].init(2);  // the tile and the rows
      do_full[i].init(1);
      q_empty[i].init(C.roles ? 4 : 4 * C.mains);  // warps of the main warpgroups; of roles, of the one that is last
      do_empty[i].init(4 * C.mains);
    }
    for (int i = 0; i < kSlots; ++i) p_full[i].init(4);
    my_turn.init(1);
    added.init(4);
    for (int i = 0; i < kSlots; ++i)
      for (int j = 0; j < C.key_tiles(); ++j) {
        ds_full[i][j].init(4);
        ds_empty[i][j].init(4);
      }
    ::cuda::ptx::fence_mbarrier_init(::cuda::ptx::sem_release, ::cuda::ptx::scope_cluster);
  }
};

// One thread: the block of keys, then every step's queries with their rows. Of roles two threads: q and do come and go at their own times.
template <BackwardConfig C>
struct Loader {
  const BackwardParams& params;
  BackwardShared<C>& shared;
  int head = 0, m = shared.work.all.begin;
  tile::Cycle<C.stages> at;

  __device__ __forceinline__ bool more() const { return head < params.group && m < shared.work.all.end; }
  __device__ __forceinline__ void next() {
    at.advance();
    if (++m == shared.work.all.end) m = shared.work.all.begin, ++head;
  }
  template <class T>
  __device__ __forceinline__ void load_keys(T (&to)[C.key_tiles()], const CUtensorMap& map, tile::Barrier& full, int columns) {
    const Sequence& sequence = shared.work.part.sequence;
#pragma unroll 1
    for (int i = 0; i < C.key_tiles(); ++i) {
      const int row = shared.work.n_begin + 64 * i;
      tile::load_rows(to[i], &map, full, sequence.k_row + row, sequence.seqlen_k - row, shared.work.head,
                      params.cu_seqlens_k ? 0 : shared.work.batch, columns);
    }
  }
  template <class T>
  __device__ __forceinline__ void load_queries(T& to, const CUtensorMap& map, tile::Barrier& full, int columns) {
    const Sequence& sequence = shared.work.part.sequence;
    const int row = m * C.block_m;
    tile::load_rows(to, &map, full, sequence.q_row + row, sequence.seqlen_q - row, shared.work.head * params.group + head,
                    params.cu_seqlens_q ? 0 : shared.work.batch, columns);
  }
  __device__ __forceinline__ void load_k() { load_keys(shared.k, params.k_map, shared.k_full, params.head_dim); }
  __device__ __forceinline__ void load_v() { load_keys(shared.v, params.v_map, shared.v_full, params.head_dim_v); }
  __device__ __forceinline__ void load_do() {
    load_queries(shared.do_[at.stage], params.do_map, shared.do_full[at.stage], params.head_dim_v);
  }
  __device__ __forceinline__ void load_q() { load_queries(shared.q[at.stage], params.q_map, shared.q_full[at.stage], params.head_dim); }
  __device__ __forceinline__ void load_rows() {
    if (head == 0 && m == shared.work.all.begin) ptx::wait_for_previous();  // they come from the preprocess kernel
    shared.q_full[at.stage].arrive_and_expect(sizeof(shared.rows[at.stage]));
    const auto* rows = C.addends ? params.addends : reinterpret_cast<const unsigned char*>(params.rows);
    ::cuda::ptx::cp_async_bulk(::cuda::ptx::space_cluster, ::cuda::ptx::space_global, shared.rows[at.stage],
                               rows + tile_index<C>(params, shared.work, head, m) * shared.kRowBytes, sizeof(shared.rows[at.stage]),
                               &shared.q_full[at.stage].state);
  }
  __device__ __forceinline__ void load_step() {
    shared.q_empty[at.stage].wait(at.parity ^ 1);
    load_q();
    load_do();
    load_rows();
    next();
  }
  __device__ __forceinline__ void run() {
    if (more()) load_k(), load_v();
#pragma unroll 1
    while (more()) load_step();
  }
  __device__ __forceinline__ void run_q() {
    if (more()) load_k();
#pragma unroll 1
    for (; more(); next()) {
      shared.q_empty[at.stage].wait(at.parity ^ 1);
      load_q();
      load_rows();
    }
  }
  __device__ __forceinline__ void run_do() {
    if (more()) load_v();
#pragma unroll 1
    for (; more(); next()) {
      shared.do_empty[at.stage].wait(at.parity ^ 1);
      load_do();
    }
  }
};

// One thread, where the order of additions to dq matters: tells the dq warpgroup when a step's turn has come, and the next block of keys
// when the additions have been made. So nobody waits for the way to global memory and back, which takes longer than the additions.
template <BackwardConfig C>
struct Turns {
  const BackwardParams& params;
  BackwardShared<C>& shared;

  __device__ __forceinline__ void run() {
    ptx::wait_for_previous();
    uint32_t parity = 0;
#pragma unroll 1
    for (int head = 0; head < params.group; ++head)
#pragma unroll 1
      for (int m = shared.work.all.begin; m < shared.work.all.end; ++m, parity ^= 1) {
        int* turn = params.turn + tile_index<C>(params, shared.work, head, m);
        const int mine = turn_of(shared.work.part.band, m, shared.work.n_block, C.block_m, C.block_n());
        while (ptx::load_acquire(turn) != mine) __nanosleep(20);
        shared.my_turn.arrive();
        shared.added.wait(parity);
        ptx::add_release(turn, 1);
      }
  }
};

// One warpgroup: dq of every step.
template <BackwardConfig C>
struct QueryGradients {
  static constexpr int kWidth = C.dq_columns, kPasses = C.head_dim / kWidth, kThreads = 128;
  const BackwardParams& params;
  BackwardShared<C>& shared;
  const int thread = static_cast<int>(threadIdx.x) % kThreads;

  __device__ __forceinline__ void run() {
    const int begin = ptx::uniform(shared.work.all.begin), end = ptx::uniform(shared.work.all.end);
    for (int i = thread; i < shared.nothing.kBytes / 16; i += kThreads)
      reinterpret_cast<uint4*>(shared.nothing.bytes)[i] = make_uint4(0, 0, 0, 0);
    for (int i = 0; i < C.key_tiles(); ++i)  // keys past the end are not loaded
      if (shared.work.n_begin + 64 * i >= shared.work.part.sequence.seqlen_k) tile::clear_panels(shared.k[i], 0, thread, kThreads);
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
    ptx::barrier_sync(1, kThreads);
    ptx::wait_for_previous();
    uint32_t parity = 0;
    tile::Ring<kSlots> slot[C.key_tiles()];
    int mine_begin[C.key_tiles()], mine_end[C.key_tiles()];
#pragma unroll
    for (int i = 0; i < C.key_tiles(); ++i) {
      mine_begin[i] = ptx::uniform(shared.work.mine[i].begin);
      mine_end[i] = ptx::uniform(shared.work.mine[i].end);
    }
#pragma unroll 1
    for (int head = 0; head < params.group; ++head)
#pragma unroll 1
      for (int m = begin; m < end; ++m) {
        bool seen[C.key_tiles()];
        uint32_t a[C.key_tiles()];
#pragma unroll
        for (int i = 0; i < C.key_tiles(); ++i) {
          seen[i] = m >= mine_begin[i] && m < mine_end[i];
          if (seen[i]) shared.ds_full[slot[i].stage()][i].wait(slot[i].parity());
          a[i] = tile::operand(seen[i] ? shared.ds[slot[i].stage()][i].bytes : shared.nothing.bytes, 16);
        }
        float* sum = params.dq_sum + tile_index<C>(params, shared.work, head, m) * kBlockM * C.head_dim + thread * 4;
#pragma unroll
        for (int pass = 0; pass < C.tiles() * kPasses; ++pass) {
          const int tile = pass / kPasses, columns = pass % kPasses * kWidth;
          float dq[kWidth / 2];
          ptx::wgmma_fence();
#pragma unroll
          for (int step = 0; step < 4 * C.key_tiles(); ++step) {
            const auto& k = shared.k[step / 4];
            const uint32_t b = tile::operand(k.bytes, k.kPanelBytes) + ((columns / 64 * k.kPanelBytes + step % 4 * 2048) >> 4);
            ptx::Wgmma<C.element, kWidth>::st(dq, a[step / 4] + ((tile * kBlockM * 128 + step % 4 * 32) >> 4), b, step > 0);
          }
          ptx::wgmma_commit();
          ptx::wgmma_wait<0>();
          tile::hold(dq);
          if (params.deterministic && pass == 0) {
            shared.my_turn.wait(parity);
            parity ^= 1;
          }
          if (pass + 1 == C.tiles() * kPasses)
#pragma unroll
            for (int i = 0; i < C.key_tiles(); ++i) {
              shared.ds_empty[slot[i].stage()][i].arrive_if(seen[i] && thread % 32 == 0);
              if (seen[i]) slot[i].advance();
            }
#pragma unroll
          for (int j = 0; j < kWidth / 8; ++j) {
            ptx::add_global(sum + (tile * C.head_dim / 8 + columns / 8 + j) * kThreads * 4, dq + 4 * j);
            if constexpr (C.pace > 0) ptx::pause<C.pace>();
          }
        }
        __syncwarp();
        if (params.deterministic) shared.added.arrive_if(thread % 32 == 0);
      }
  }
};

}  // namespace tilewise
