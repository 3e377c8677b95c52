// Exact attention backward on Hopper: a block of keys with its dk and dv stays on an SM while the queries that see it pass by. Read from
// top to bottom, it is in the order of events.
//
// A CTA owns 64 keys per main warpgroup of one key/value head and walks over tiles of 64 queries of every query head of the group:
//   S^T = K Q^T      P^T = 2^(S^T - lse)         dV += P^T dO
//   dP^T = V dO^T    dS^T = P^T (dP^T - delta)   dK += dS^T Q     dQ += dS K
// Main warpgroups have 64 keys each and never wait for one another: scores are computed with keys as rows, so that P^T and dS^T are
// already the register operands of the products that follow. Only dS goes through shared memory, to another warpgroup, which multiplies
// it with K and adds dQ to float32 sums in global memory straight from its registers. One thread loads.
// A main warpgroup issues   dP(i) | dV(i) | dK(i) S(i+1) | dP(i+1)   so that its exponentials run under its own dP, its dS under its own
// dV.
#pragma once

#include "cuda/kernels/gradient_work.cuh"
#include "cuda/ptx/scalar.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/cycle.cuh"
#include "cuda/tile/fragment.cuh"
#include "cuda/tile/gemm.cuh"
#include "cuda/tile/load.cuh"
#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/shared.cuh"
#include "cuda/tile/store_row.cuh"

namespace tilewise {

constexpr int kLoaderRegisters = 24;
constexpr int kSlots = 2;  // tiles of ds on their way to the dq warpgroup

template <BackwardConfig C>
struct BackwardShared {
  static constexpr int kRows = 64;
  tile::Tile<kRows, C.head_dim> k[C.key_tiles()];
  tile::Tile<kRows, C.head_dim_v> v[C.key_tiles()];
  tile::Tile<kBlockM, C.head_dim> q[C.stages];
  tile::Tile<kBlockM, C.head_dim_v> do_[C.stages];
  tile::Tile<kBlockM, kRows> ds[kSlots][C.key_tiles()];                               // queries are rows, 64 keys columns
  tile::Tile<C.split ? 8 : kBlockM, kRows> nothing;                                   // zeros, for keys that a tile of queries does not see
  uint4 weights[C.modified ? C.mains : 1][C.modified ? 4 : 1][C.modified ? 128 : 1];  // a thread's own: p times softcap's derivative
  float rows[C.stages][2][kBlockM];                                                   // -lse in units of log2; delta
  BackwardWork work;
  tile::Barrier k_full, v_full, q_full[C.stages], do_full[C.stages], q_empty[C.stages];
  tile::Barrier ds_full[kSlots][C.key_tiles()], ds_empty[kSlots][C.key_tiles()];

  __device__ __forceinline__ void init_barriers() {
    k_full.init(C.key_tiles());
    v_full.init(C.key_tiles());
    for (int i = 0; i < C.stages; ++i) {
      q_full[i].init(2);  // the tile and the rows
      do_full[i].init(1);
      q_empty[i].init(4 * C.mains);  // warps of the main warpgroups
    }
    for (int i = 0; i < kSlots; ++i)
      for (int j = 0; j < C.key_tiles(); ++j) {
        ds_full[i][j].init(4);
        ds_empty[i][j].init(4);
      }
    ::cuda::ptx::fence_mbarrier_init(::cuda::ptx::sem_release, ::cuda::ptx::scope_cluster);
  }
};

// One main warpgroup: 64 keys, their dk and dv.
template <BackwardConfig C>
struct KeyGradients {
  const BackwardParams& params;
  BackwardShared<C>& shared;
  const int part;                       // which warpgroup
  const int keys = C.split ? 0 : part;  // which 64 keys
  const bool leader = threadIdx.x % 32 == 0;

  float s[32];  // 64 keys x 64 queries
  uint32_t p[16];
  static constexpr int kWidth = C.split ? C.head_dim / 2 : C.head_dim, kWidthV = C.split ? C.head_dim_v / 2 : C.head_dim_v;
  float dk[kWidth / 2], dv[kWidthV / 2];
  tile::Cycle<C.stages> rows;  // the present tile of queries
  tile::Ring<kSlots> slot;     // where its ds goes

  __device__ __forceinline__ void issue_scores() {
    ptx::wgmma_fence();
    tile::multiply_scores<C.element, C.head_dim, kBlockM>(s, shared.k[keys], shared.q[rows.stage], 0);
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void issue_dp(float (&to)[32]) {
    ptx::wgmma_fence();
    tile::multiply_scores<C.element, C.head_dim_v, kBlockM>(to, shared.v[keys], shared.do_[rows.stage], 0);
    ptx::wgmma_commit();
  }

  // Pairs of a block at the edge that are not visible become 0.
  __device__ __forceinline__ void mask(float (&x)[32], int m) {
    const Band& band = shared.work.part.band;
    const int key = shared.work.n_begin + 64 * keys + tile::this_lane().row, query = m * kBlockM + tile::this_lane().column;
    int begin[2], end[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      begin[r] = first_query(band, key + 8 * r) - query;
      end[r] = key + 8 * r < band.seqlen_k ? end_query(band, key + 8 * r) - query : -kUnbounded;
    }
#pragma unroll
    for (int i = 0; i < 32; ++i)
      if (tile::column_of(i) < begin[tile::row_of(i)] || tile::column_of(i) >= end[tile::row_of(i)]) x[i] = 0;
  }

  // s becomes p in float32.
  __device__ __forceinline__ void probabilities(int head, int m, bool edge) {
    const float* lse = shared.rows[rows.stage][0] + tile::this_lane().column;
    float slope = 0, distance = 0;
    if constexpr (C.modified) {
      slope = params.alibi_slopes ? params.alibi_slopes[shared.work.batch * params.alibi_batch + head] * kLog2e : 0;
      distance = static_cast<float>(shared.work.n_begin + 64 * keys + tile::this_lane().row - (m * kBlockM + tile::this_lane().column) -
                                    shared.work.part.band.offset);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 l = *reinterpret_cast<const float2*>(lse + 8 * j);
      float slopes[4];  // of the softcap
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int i = 4 * j + n;
        if constexpr (C.modified) {
          float x = s[i] * params.scale_log2;
          slopes[n] = 1;
          if (params.softcap_log2 > 0) {
            const float tanh = 1 - 2 * __fdividef(1, 1 + ptx::exp2(s[i] * params.tanh_factor));  // to 1e-7 everywhere
            slopes[n] = 1 - tanh * tanh;
            x = params.softcap_log2 * tanh;
          }
          x -= slope * fabsf(distance + static_cast<float>(8 * tile::row_of(i) - tile::column_of(i)));
          s[i] = ptx::exp2(x + (n % 2 ? l.y : l.x));
        } else {
          s[i] = ptx::exp2(fmaf(s[i], params.scale_log2, n % 2 ? l.y : l.x));
        }
      }
      if constexpr (C.modified)
        reinterpret_cast<uint2*>(&my_weights(j / 2))[j % 2] =
            make_uint2(ptx::pack<C.element>(s[4 * j] * slopes[0], s[4 * j + 1] * slopes[1]),
                       ptx::pack<C.element>(s[4 * j + 2] * slopes[2], s[4 * j + 3] * slopes[3]));
    }
    if (edge) mask(s, m);
  }
  static __device__ __forceinline__ void pack(const float (&x)[32], uint32_t (&to)[16]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) to[i] = ptx::pack<C.element>(x[2 * i], x[2 * i + 1]);
  }

  // Element i of two in a register.
  static __device__ __forceinline__ float half_of(uint32_t x, int i) {
    return ptx::to_float<C.element>(static_cast<uint16_t>(i % 2 ? x >> 16 : x));
  }
  // What waits in shared memory for dp, for want of registers.
  __device__ __forceinline__ uint4& my_weights(int i) { return shared.weights[part][i][threadIdx.x % 128]; }

  // dp becomes ds in float32.
  __device__ __forceinline__ void score_gradients(float (&dp)[32], int m, bool edge) {
    const float* delta = shared.rows[rows.stage][1] + tile::this_lane().column;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 d = *reinterpret_cast<const float2*>(delta + 8 * j);
      uint2 w = make_uint2(p[2 * j], p[2 * j + 1]);
      if constexpr (C.modified) w = reinterpret_cast<const uint2*>(&my_weights(j / 2))[j % 2];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float weight = C.keep_p ? s[4 * j + n] : half_of(n < 2 ? w.x : w.y, n);
        dp[4 * j + n] = weight * (dp[4 * j + n] - (n % 2 ? d.y : d.x));
      }
    }
    if (edge) mask(dp, m);  // 0 times what is not finite
  }

  // Waits for a free slot and writes ds there, with queries as rows.
  __device__ __forceinline__ void store_ds(const uint32_t (&ds)[16]) {
    if (C.split && part > 0) return;  // has the same
    shared.ds_empty[slot.stage()][keys].wait(slot.parity() ^ 1);
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32 % 4, row = lane % 8;
    const auto tile = static_cast<uint32_t>(__cvta_generic_to_shared(shared.ds[slot.stage()][keys].bytes));
    const uint32_t at = tile + (lane / 16 * 8 + row) * 128 + ((2 * warp + lane / 8 % 2) ^ row) * 16;
#pragma unroll
    for (int step = 0; step < 4; ++step) ptx::store_matrices_transposed(at + step * 16 * 128, ds + 4 * step);
  }

  // Hands back tiles of queries that these keys do not see.
  __device__ __forceinline__ void skip(int count) {
#pragma unroll 1
    for (; count > 0; --count, rows.advance()) {
      shared.q_full[rows.stage].wait(rows.parity);
      shared.do_full[rows.stage].wait(rows.parity);
      if (leader) shared.q_empty[rows.stage].arrive();
    }
  }

  __device__ __forceinline__ bool at_edge(const BlockRange& range, int m) {
    return m < range.full_begin || m >= range.full_end || shared.work.n_begin + 64 * keys + 64 > shared.work.part.band.seqlen_k;
  }
  // This warpgroup's columns of x^T times a tile of queries.
  template <int kColumns, class T>
  __device__ __forceinline__ void add_product(float (&sum)[kColumns / 2], const uint32_t (&x)[16], const T& rows_) {
    const uint32_t first = tile::operand(rows_.bytes, T::kPanelBytes) + (C.split ? (part * (kColumns / 64) * T::kPanelBytes) >> 4 : 0);
#pragma unroll
    for (int step = 0; step < kBlockM / 16; ++step) ptx::Wgmma<C.element, kColumns>::rs(sum, x + 4 * step, first + ((step * 2048) >> 4), 1);
  }
  __device__ __forceinline__ void issue_dv() {
    ptx::wgmma_fence();
    add_product<kWidthV>(dv, p, shared.do_[rows.stage]);
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void issue_dk(const uint32_t (&ds)[16], int stage) {
    ptx::wgmma_fence();
    add_product<kWidth>(dk, ds, shared.q[stage]);
    ptx::wgmma_commit();
  }
  // ds is in its slot: lets the dq warpgroup have it.
  __device__ __forceinline__ void pass_ds() {
    if (C.split && part > 0) return;
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
    __syncwarp();
    shared.ds_full[slot.stage()][keys].arrive_if(leader);
    slot.advance();
  }

  // The tiles of one head that these keys see, each product issued as soon as it may be.
  __device__ __forceinline__ void run_ahead(int head, const BlockRange& range, int begin, int end) {
    float dp[32];
    uint32_t ds[16];
    shared.q_full[rows.stage].wait(rows.parity);
    issue_scores();
    shared.do_full[rows.stage].wait(rows.parity);
    issue_dp(dp);
    for (int m = begin;; ++m) {
      const bool edge = at_edge(range, m);
      ptx::wgmma_wait<1>();
      tile::hold(s);
      probabilities(head, m, edge);
      pack(s, p);
      issue_dv();
      ptx::wgmma_wait<1>();
      tile::hold(dp);
      score_gradients(dp, m, edge);
      pack(dp, ds);
      store_ds(ds);
      issue_dk(ds, rows.stage);
      pass_ds();
      if (m + 1 == end) break;
      ptx::wgmma_wait<1>();  // dv's product, long on its way: the registers of p and s may be one
      tile::hold(p);
      const int stage = rows.stage;
      rows.advance();
      shared.q_full[rows.stage].wait(rows.parity);
      issue_scores();
      ptx::wgmma_wait<1>();  // dk's product: this tile's operands are free, and the registers of ds and dp may be one
      tile::hold(ds);
      shared.q_empty[stage].arrive_if(leader);
      shared.do_full[rows.stage].wait(rows.parity);
      issue_dp(dp);
    }
    ptx::wgmma_wait<0>();
    tile::hold(p);
    tile::hold(ds);
  }

  // The same where registers are few: dp takes the place of s, ds that of p. What is computed in float32 runs under the product issued
  // last, which reads the registers that the result is packed into.
  __device__ __forceinline__ void run_in_place(int head, const BlockRange& range, int begin, int end) {
    shared.q_full[rows.stage].wait(rows.parity);
    issue_scores();
    ptx::wgmma_wait<0>();  // from here on a product of dk is behind the scores
    for (int m = begin;; ++m) {
      const bool edge = at_edge(range, m);
      ptx::wgmma_wait<1>();
      tile::hold(s);
      probabilities(head, m, edge);
      ptx::wgmma_wait<0>();  // dk's product of the tile before
      tile::hold(p);
      if (m > begin) shared.q_empty[rows.stage == 0 ? C.stages - 1 : rows.stage - 1].arrive_if(leader);
      pack(s, p);
      shared.do_full[rows.stage].wait(rows.parity);
      issue_dp(s);
      issue_dv();
      ptx::wgmma_wait<1>();
      tile::hold(s);
      score_gradients(s, m, edge);
      ptx::wgmma_wait<0>();  // dv's product
      tile::hold(p);
      pack(s, p);
      store_ds(p);
      pass_ds();
      if (m + 1 == end) break;
      const int stage = rows.stage;
      rows.advance();
      shared.q_full[rows.stage].wait(rows.parity);
      issue_scores();
      issue_dk(p, stage);
    }
    issue_dk(p, rows.stage);
    ptx::wgmma_wait<0>();
    tile::hold(p);
  }

  __device__ __forceinline__ void run_head(int head, const BlockRange& range, int begin, int end) {
    if constexpr (C.ahead)
      run_ahead(head, range, begin, end);
    else
      run_in_place(head, range, begin, end);
    tile::hold(dk);
    tile::hold(dv);
    shared.q_empty[rows.stage].arrive_if(leader);
    rows.advance();
  }

  __device__ __forceinline__ void write() {
    const bool packed = params.cu_seqlens_k != nullptr;
    const int key = shared.work.n_begin + 64 * keys + tile::this_lane().row;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool inside = key + 8 * r < shared.work.part.band.seqlen_k;
      const long long row = shared.work.part.sequence.k_row + key + 8 * r;
      const int first = C.split ? part * kWidth : 0, first_v = C.split ? part * kWidthV : 0;
      uint16_t* to_v = inside ? row_of(params.dv, packed, shared.work.batch, row, shared.work.head) + first_v : nullptr;
      uint16_t* to_k = inside ? row_of(params.dk, packed, shared.work.batch, row, shared.work.head) + first : nullptr;
      tile::store_row<C.element>(dv, r, 1, to_v, params.head_dim_v - first_v);
      tile::store_row<C.element>(dk, r, params.scale, to_k, params.head_dim - first);
    }
  }

  __device__ __forceinline__ void run() {
#pragma unroll
    for (float& x : dk) x = 0;
#pragma unroll
    for (float& x : dv) x = 0;
    const BlockRange& range = shared.work.mine[keys];
    const int all_begin = ptx::uniform(shared.work.all.begin), all_end = ptx::uniform(shared.work.all.end);
    const int begin = ptx::uniform(range.begin), end = ptx::uniform(range.end);
    if (all_begin < all_end) {
      shared.k_full.wait(0);
      shared.v_full.wait(0);
    }
    const int first_head = shared.work.head * params.group;
    for (int head = 0; head < params.group; ++head) {
      if (begin == end) {
        skip(all_end - all_begin);
        continue;
      }
      skip(begin - all_begin);
      run_head(first_head + head, range, begin, end);
      skip(all_end - end);
    }
    write();
  }
};

// One thread: the block of keys, then every tile of queries with its rows.
template <BackwardConfig C>
struct Loader {
  const BackwardParams& params;
  BackwardShared<C>& shared;

  __device__ __forceinline__ void load_keys() {
    const Trimmed& part = shared.work.part;
    const int batch = params.cu_seqlens_k ? 0 : shared.work.batch;
#pragma unroll 1
    for (int i = 0; i < C.key_tiles(); ++i) {
      const int row = shared.work.n_begin + 64 * i, valid = max_of(part.sequence.seqlen_k - row, 0);
      tile::load_rows(shared.k[i], &params.k_map, shared.k_full, part.sequence.k_row + row, valid, shared.work.head, batch);
      tile::load_rows(shared.v[i], &params.v_map, shared.v_full, part.sequence.k_row + row, valid, shared.work.head, batch);
    }
  }
  __device__ __forceinline__ void run() {
    const Trimmed& part = shared.work.part;
    const int begin = shared.work.all.begin, end = shared.work.all.end;
    if (begin >= end) return;
    load_keys();
    tile::Cycle<C.stages> at;
    bool first = true;
    const int batch = params.cu_seqlens_q ? 0 : shared.work.batch;
#pragma unroll 1
    for (int head = 0; head < params.group; ++head)
#pragma unroll 1
      for (int m = begin; m < end; ++m, at.advance()) {
        const int row = m * kBlockM, q_head = shared.work.head * params.group + head;
        const long long q_row = part.sequence.q_row + row;
        shared.q_empty[at.stage].wait(at.parity ^ 1);
        tile::load_rows(shared.q[at.stage], &params.q_map, shared.q_full[at.stage], q_row, part.sequence.seqlen_q - row, q_head, batch);
        tile::load_rows(shared.do_[at.stage], &params.do_map, shared.do_full[at.stage], q_row, part.sequence.seqlen_q - row, q_head, batch);
        if (first) ptx::wait_for_previous();  // the rows come from the preprocess kernel
        first = false;
        shared.q_full[at.stage].arrive_and_expect(sizeof(shared.rows[at.stage]));
        ::cuda::ptx::cp_async_bulk(::cuda::ptx::space_cluster, ::cuda::ptx::space_global, shared.rows[at.stage],
                                   params.rows + tile_index(params, shared.work, head, m) * 2 * kBlockM, sizeof(shared.rows[at.stage]),
                                   &shared.q_full[at.stage].state);
      }
  }
};

// One warpgroup: dq of every tile.
template <BackwardConfig C>
struct QueryGradients {
  static constexpr int kWidth = C.dq_columns, kThreads = 128;
  const BackwardParams& params;
  BackwardShared<C>& shared;
  const int thread = static_cast<int>(threadIdx.x) % kThreads;

  __device__ __forceinline__ void run() {
    const int begin = ptx::uniform(shared.work.all.begin), end = ptx::uniform(shared.work.all.end);
    for (int i = thread; i < shared.nothing.kBytes / 16; i += kThreads)
      reinterpret_cast<uint4*>(shared.nothing.bytes)[i] = make_uint4(0, 0, 0, 0);
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
    ptx::barrier_sync(1, kThreads);
    ptx::wait_for_previous();
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
        if (params.deterministic) {
          if (m > begin || head > 0) end_turn(m > begin ? head : head - 1, m > begin ? m - 1 : end - 1);
          wait_for_turn(head, m);
        }
        float* sum = params.dq_sum + tile_index(params, shared.work, head, m) * kBlockM * C.head_dim + thread * 4;
#pragma unroll
        for (int columns = 0; columns < C.head_dim; columns += kWidth) {
          float dq[kWidth / 2];
          ptx::wgmma_fence();
#pragma unroll
          for (int step = 0; step < 4 * C.key_tiles(); ++step) {
            const auto& k = shared.k[step / 4];
            const uint32_t b = tile::operand(k.bytes, k.kPanelBytes) + ((columns / 64 * k.kPanelBytes + step % 4 * 2048) >> 4);
            ptx::Wgmma<C.element, kWidth>::st(dq, a[step / 4] + ((step % 4 * 32) >> 4), b, step > 0);
          }
          ptx::wgmma_commit();
          ptx::wgmma_wait<0>();
          tile::hold(dq);
          if (columns + kWidth == C.head_dim)
#pragma unroll
            for (int i = 0; i < C.key_tiles(); ++i) {
              shared.ds_empty[slot[i].stage()][i].arrive_if(seen[i] && thread % 32 == 0);
              if (seen[i]) slot[i].advance();
            }
#pragma unroll
          for (int j = 0; j < kWidth / 8; ++j) ptx::add_global(sum + (columns / 8 + j) * kThreads * 4, dq + 4 * j);
        }
      }
    if (params.deterministic && begin < end) end_turn(params.group - 1, end - 1);
  }

  // Where the order of additions matters: a tile's turn ends late, when the additions have long been on their way.
  __device__ __forceinline__ void end_turn(int head, int m) {
    __threadfence();
    ptx::barrier_sync(1, kThreads);
    if (thread == 0) ptx::add_release(params.turn + tile_index(params, shared.work, head, m), 1);
  }
  __device__ __forceinline__ void wait_for_turn(int head, int m) {
    if (thread == 0) {
      const int turn = turn_of(shared.work.part.band, m, shared.work.n_block, C.block_n());
      while (ptx::load_acquire(params.turn + tile_index(params, shared.work, head, m)) != turn) __nanosleep(20);
    }
    ptx::barrier_sync(1, kThreads);
  }
};

// Row::kConfig is the configuration: nvcc 13.0 cannot name a kernel whose template argument is itself a struct.
template <class Row>
__global__ void __launch_bounds__(Row::kConfig.threads(), 1) backward_sm90(const __grid_constant__ BackwardParams params) {
  constexpr BackwardConfig C = Row::kConfig;
  static_assert(sizeof(BackwardShared<C>) <= 227 << 10);
  extern __shared__ __align__(1024) unsigned char memory[];
  BackwardShared<C>& shared = *reinterpret_cast<BackwardShared<C>*>(memory);
  if (threadIdx.x == 0) shared.init_barriers();
  if (threadIdx.x / 32 == 4) find_work<C>(params, shared.work);
  __syncthreads();
  ptx::launch_dependents();
  if (threadIdx.x < 128) {
    ptx::give_registers<kLoaderRegisters>();
    if (threadIdx.x == 0) Loader<C>{params, shared}.run();
  } else if (threadIdx.x < 256) {
    ptx::give_registers<C.dq_registers>();
    QueryGradients<C>{params, shared}.run();
  } else {
    ptx::take_registers<C.main_registers>();
    KeyGradients<C> gradients{params, shared, ptx::uniform(static_cast<int>(threadIdx.x) / 128 - 2)};
    gradients.run();
  }
}

}  // namespace tilewise
