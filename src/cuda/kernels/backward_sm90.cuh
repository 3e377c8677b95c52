// Exact attention backward on Hopper: a block of keys with its dk and dv stays on an SM while the queries that see it pass by. Read from
// top to bottom, it is in the order of events.
//
// A CTA stays on its SM. It owns 64 keys per main warpgroup of one key/value head (above head dimension 128 otherwise: backward_roles.cuh,
// backward_pair.cuh) and walks in steps over the queries of every query head of the group, then takes the next block of keys:
//   S^T = K Q^T      P^T = 2^(S^T - lse)         dV += P^T dO
//   dP^T = V dO^T    dS^T = P^T (dP^T - delta)   dK += dS^T Q     dQ += dS K
// Main warpgroups have 64 keys each and share no barrier but those of queries and of places for dS: scores are computed with keys as rows,
// so that P^T and dS^T are already the register operands of the products that follow. Only dS goes through shared memory, to another
// warpgroup, which multiplies it with K and adds dQ to float32 sums in global memory straight from its registers. One warp loads.
#pragma once

#include "cuda/kernels/backward_queries.cuh"
#include "cuda/kernels/backward_shares.cuh"
#include "cuda/ptx/scalar.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/cycle.cuh"
#include "cuda/tile/fragment.cuh"
#include "cuda/tile/gemm.cuh"
#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/shared.cuh"
#include "cuda/tile/store_row.cuh"

namespace tilewise {

// One main warpgroup: 64 keys, their dk and dv.
template <BackwardConfig C>
struct KeyGradients : Claims<C> {
  using Claims<C>::params, Claims<C>::shared, Claims<C>::work;
  const int part;                                                   // which warpgroup
  const int own = C.pair ? 0 : part;                                // which 64 keys of the CTA
  const int keys = C.pair ? ptx::uniform(Claims<C>::rank()) : own;  // and of the work
  const bool leader = threadIdx.x % 32 == 0;

  static constexpr int kScores = C.block_m / 2;
  float s[kScores];  // 64 keys x a step's queries
  uint32_t p[kScores / 2], rounded[kScores / 2];
  float dk[C.head_dim / 2], dv[C.head_dim / 2];
  tile::Cycle<C.stages> rows;  // of the present step
  tile::Ring<kSlots> slot;     // where its ds goes

  // s += -lse / scale or -delta of each query.
  __device__ __forceinline__ void add_rows(int which) {
    if constexpr (C.addends)
      ptx::Wgmma<ptx::Element::kBFloat16, C.block_m>::template ss<ptx::kNarrowRepeated, ptx::kNarrow>(
          s, tile::operand(shared.ones, 0), tile::operand(shared.rows[rows.stage] + which * C.tiles() * (kAddendBytes / 2), 0), 1);
  }
  __device__ __forceinline__ void issue_scores() {
    ptx::wgmma_fence();
    tile::multiply_scores<C.element, C.head_dim, C.block_m>(s, shared.k[own], shared.q[rows.stage], 0);
    add_rows(0);
    ptx::wgmma_commit();
  }
  // In the place of s.
  __device__ __forceinline__ void issue_dp() {
    shared.do_full[rows.stage].wait(rows.parity);
    ptx::wgmma_fence();
    tile::multiply_scores<C.element, C.head_dim_v, C.block_m>(s, shared.v[own], shared.do_[rows.stage], 0);
    add_rows(1);
    ptx::wgmma_commit();
  }

  // Pairs of a block at the edge that are not visible become 0.
  __device__ __forceinline__ void mask(float (&x)[kScores], int m) {
    const Band& band = work().part.band;
    const int key = work().n_begin + 64 * keys + tile::this_lane().row, query = m * C.block_m + tile::this_lane().column;
    // Of this thread's queries, two in every 8, those before one, as bits.
    const auto before = [&](int end) {
      const int c = min_of(max_of(end - query, 0), C.block_m), count = c / 8 * 2 + min_of(c % 8, 2);
      return count >= 32 ? 0xffffffffu : (1u << count) - 1;
    };
    static_assert(kScores <= 64);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = key + 8 * r;
      const uint32_t seen = row < band.seqlen_k ? before(end_query(band, row)) & ~before(first_query(band, row)) : 0;
#pragma unroll
      for (int i = 0; i < kScores; ++i)
        if (tile::row_of(i) == r && !(seen >> (i / 4 * 2 + i % 2) & 1)) x[i] = 0;
    }
  }

  // s becomes p in float32.
  __device__ __forceinline__ void probabilities(int head, int m, bool edge) {
    float slope = 0, distance = 0;
    if constexpr (C.modified) {
      wait_for_slot();
      slope = params.alibi_slopes ? params.alibi_slopes[work().batch * params.alibi_batch + head] * kLog2e : 0;
      distance = static_cast<float>(work().n_begin + 64 * keys + tile::this_lane().row - (m * C.block_m + tile::this_lane().column) -
                                    work().part.band.offset);
    }
#pragma unroll
    for (int j = 0; j < kScores / 8; ++j) {
      const float4 four = C.addends ? float4{} : kAhead ? ahead[j] : row_values(0, j);
      const float lse[4] = {four.x, four.y, four.z, four.w};
      float slopes[8];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int i = 8 * j + n;
        float x = s[i] * params.scale_log2;
        if constexpr (C.modified) {
          slopes[n] = 1;
          if (params.softcap_log2 > 0) {
            const float tanh = 1 - 2 * __fdividef(1, 1 + ptx::exp2(s[i] * params.tanh_factor));  // to 1e-7 everywhere
            slopes[n] = 1 - tanh * tanh;
            x = params.softcap_log2 * tanh;
          }
          x -= slope * fabsf(distance + static_cast<float>(8 * tile::row_of(i) - tile::column_of(i)));
        }
        s[i] = ptx::exp2(x + lse[n / 4 * 2 + n % 2]);
      }
      if constexpr (C.modified)
        my_place(j) = make_uint4(ptx::pack<C.element>(slopes[0], slopes[1]), ptx::pack<C.element>(slopes[2], slopes[3]),
                                 ptx::pack<C.element>(slopes[4], slopes[5]), ptx::pack<C.element>(slopes[6], slopes[7]));
    }
    if (edge) mask(s, m);
  }
  // What is known of this thread's queries in columns 16 j to 16 j + 15 of the step: -lse or -delta.
  __device__ __forceinline__ float4 row_values(int which, int j) const {
    return reinterpret_cast<const float4*>(
        shared.rows[rows.stage])[j / 4 * (kRowFloats / 4) + which * (kBlockM / 4) + j % 4 * 4 + threadIdx.x % 4];
  }
  // All of it, before a wait that it can be read during; modified rows lack the registers.
  static constexpr bool kAhead = !C.modified && !C.addends;
  float4 ahead[kScores / 8];
  __device__ __forceinline__ void read_rows(int which) {
    if constexpr (kAhead)
#pragma unroll
      for (int j = 0; j < kScores / 8; ++j) ahead[j] = row_values(which, j);
  }
  // Element i of two in a register.
  static __device__ __forceinline__ float half_of(uint32_t x, int i) {
    return ptx::to_float<C.element>(static_cast<uint16_t>(i % 2 ? x >> 16 : x));
  }
  // dp becomes the gradient of a score over its p: dp - delta, times the softcap's derivative.
  __device__ __forceinline__ void subtract_delta(float (&dp)[kScores]) {
#pragma unroll
    for (int j = 0; j < kScores / 8; ++j) {
      const float4 four = kAhead ? ahead[j] : row_values(1, j);
      const float delta[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int n = 0; n < 8; ++n) dp[8 * j + n] += delta[n / 4 * 2 + n % 2];
      if constexpr (C.modified && !C.pair) {
        const uint4 packed = my_place(j);
        const uint32_t slopes[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
        for (int n = 0; n < 8; ++n) dp[8 * j + n] *= half_of(slopes[n / 2], n);
      }
    }
  }
  static __device__ __forceinline__ void pack(const float (&x)[kScores], uint32_t (&to)[kScores / 2]) {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) to[i] = ptx::pack<C.element>(x[2 * i], x[2 * i + 1]);
  }

  // Of the slot for ds each warp has its 16 keys, two of the eight units of 16 bytes in every query's row.
  __device__ __forceinline__ void wait_for_slot() { shared.ds_empty[slot.stage()][own].wait(slot.parity() ^ 1); }
  // This lane's, for each 16 queries, is where it stores ds. Before, the softcap's derivatives wait there for dp, for want of registers.
  __device__ __forceinline__ uint4& my_place(int j) {
    auto& tile = shared.ds[slot.stage()][own];
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32 % 4;
    return *reinterpret_cast<uint4*>(tile.bytes + tile.offset(lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2) + j * 16 * 128);
  }

  // ds = p (dp - delta), packed, in the place of p; dp holds the difference. In bfloat16 the difference is rounded before it is multiplied,
  // as standard attention rounds dp, and pairs are multiplied at once: a third of the instructions. A float16 could overflow; modified rows
  // lack the registers.
  static constexpr bool kPairs = C.element == ptx::Element::kBFloat16 && !C.modified;
  __device__ __forceinline__ void score_gradients(const float (&dp)[kScores], const uint32_t (&rounded)[kScores / 2]) {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) {
      if constexpr (kPairs)
        p[i] = ptx::multiply_bf16(p[i], rounded[i]);
      else
        p[i] = ptx::pack<C.element>(half_of(p[i], 0) * dp[2 * i], half_of(p[i], 1) * dp[2 * i + 1]);
    }
  }

  // Writes ds into the slot, with queries as rows, and lets the dq warpgroup have it.
  __device__ __forceinline__ void store_ds() {
    if constexpr (C.modified)
      __syncwarp();  // all have read their slopes
    else
      wait_for_slot();  // else it was before the slopes
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(&my_place(0)));
#pragma unroll
    for (int step = 0; step < C.block_m / 16; ++step) ptx::store_matrices_transposed(at + step * 16 * 128, p + 4 * step);
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
    if constexpr (C.pair) {
      shared.ds_full[slot.stage()][own].arrive();  // every lane, for the p that it has read
    } else {
      __syncwarp();
      shared.ds_full[slot.stage()][own].arrive_if(leader);
    }
    slot.advance();
  }

  // Hands back steps that these keys do not see.
  __device__ __forceinline__ void skip(int count) {
#pragma unroll 1
    for (; count > 0; --count, rows.advance()) {
      shared.q_full[rows.stage].wait(rows.parity);
      shared.do_full[rows.stage].wait(rows.parity);
      wait_for_slot();
      shared.ds_full[slot.stage()][own].arrive_if(leader);  // the dq warpgroup knows that there is nothing in it
      slot.advance();
      hand_back(rows.stage);
    }
  }
  // A step's q, do and rows. Of addends no thread has read anything itself, of rows all have.
  __device__ __forceinline__ void hand_back(int stage) { shared.q_empty[stage].arrive_if(leader || !C.addends); }

  // sum += x^T times a step's queries.
  template <class T>
  __device__ __forceinline__ void add_product(float (&sum)[C.head_dim / 2], const uint32_t (&x)[kScores / 2], const T& queries) {
    ptx::wgmma_fence();
    const uint32_t b = tile::operand(queries.bytes, T::kPanelBytes);
#pragma unroll
    for (int step = 0; step < C.block_m / 16; ++step) ptx::Wgmma<C.element, C.head_dim>::rs(sum, x + 4 * step, b + ((step * 2048) >> 4), 1);
    ptx::wgmma_commit();
  }

  // s of a step has been issued: it becomes p, issued with do to dv, and dp - delta. Registers are few: dp takes the place of s.
  __device__ __forceinline__ void differences(int head, int m, bool first, bool edge) {
    read_rows(0);
    ptx::wgmma_wait<1>();  // S
    tile::hold(s);
    probabilities(head, m, edge);
    ptx::wgmma_wait<0>();  // dK of the step before
    tile::hold(p);
    if (!first) hand_back(rows.stage == 0 ? C.stages - 1 : rows.stage - 1);
    pack(s, p);
    issue_dp();
    add_product(dv, p, shared.do_[rows.stage]);
    read_rows(1);
    ptx::wgmma_wait<1>();  // dP
    tile::hold(s);
    if constexpr (!C.addends) subtract_delta(s);
    if (edge) mask(s, m);  // 0 times what is not finite
    pack(s, rounded);
    if constexpr (kPairs) tile::hold(rounded);  // before the wait
    ptx::wgmma_wait<0>();                       // dV
    tile::hold(p);
  }

  // Whether ds is stored before the next scores are issued. With addends the other order loses 8 % at d128 and 5 % at d64.
  static constexpr bool kStoreFirst = C.addends;
  // The steps of one head that these keys see. The loop turns where no product is in flight, or ptxas serialises all of them.
  __device__ __forceinline__ void run_head(int head, const Walk& walk) {
    shared.q_full[rows.stage].wait(rows.parity);
    issue_scores();
    ptx::wgmma_wait<0>();  // from here on a product of dk is behind the scores
    differences(head, walk.step(walk.begin), true, walk.at_edge(walk.begin));
#pragma unroll 1
    for (int i = walk.begin + 1; i < walk.end; ++i) {
      score_gradients(s, rounded);
      tile::hold(p);
      const int stage = rows.stage;
      rows.advance();
      if constexpr (kStoreFirst) store_ds();
      shared.q_full[rows.stage].wait(rows.parity);
      issue_scores();
      if constexpr (!kStoreFirst) store_ds();
      add_product(dk, p, shared.q[stage]);
      differences(head, walk.step(i), false, walk.at_edge(i));
    }
    score_gradients(s, rounded);
    tile::hold(p);
    store_ds();
    add_product(dk, p, shared.q[rows.stage]);
    ptx::wgmma_wait<0>();
    tile::hold(p);
    tile::hold(dk);
    tile::hold(dv);
    hand_back(rows.stage);
    rows.advance();
  }

  // Where these keys' rows of dk and dv are: what a work says of it, read at once.
  struct KeyRows {
    long long first;
    int batch, head, valid;
  };
  __device__ __forceinline__ KeyRows key_rows() const {
    const BackwardWork& work = this->work();
    const int begin = work.n_begin + 64 * keys;
    return {work.part.sequence.k_row + begin, work.batch, work.head, work.part.band.seqlen_k - begin};
  }
  // A gradient of these keys, dk (which 0) or dv (1), in kParts runs of columns. Rows that are not finite are told to the postprocess
  // kernel (gradient_rows.cuh), and left to it where they would be added.
  template <int kParts, int kCount>
  __device__ __forceinline__ void write(const KeyRows& at, const float (*sum)[kCount], int which, const Elements& to, float factor,
                                        int columns) {
    const int thread = ptx::thread_anew(), row = tile::lane_of(thread).row;
    float zero[2] = {0, 0};
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int i = 0; i < kCount; ++i) zero[i % 2] += 0 * sum[part][i];
    const bool finite = __all_sync(0xffffffff, zero[0] + zero[1] == 0);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      unsigned rows = 0;
      if (!finite)
#pragma unroll
        for (int part = 0; part < kParts; ++part) rows |= tile::infinite_rows(sum[part], r);
      bool inside = row + 8 * r < at.valid;
      if (rows && inside && thread % 32 == 0) {
        const long long tile = at.head * params.key_tiles + work().first_key_tile + work().n_begin / 64 + keys;
        params.spoilt_keys[tile].rows[which].of[thread / 32 % 4][r] = rows;
        params.counters->spoilt = 1;
      }
      if (params.accumulate && (rows >> thread % 32 & 1)) inside = false;
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        write_gradient<C.element>(params, sum[part], r, factor, inside, to, at.batch, at.first + row + 8 * r, at.head, part * kCount * 2,
                                  columns, thread);
    }
  }

  // What the products work on begins anew, so that between works no register is kept for it.
  __device__ __forceinline__ void clear_operands() {
#pragma unroll
    for (int i = 0; i < kScores; ++i) s[i] = 0;
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) p[i] = rounded[i] = 0;
  }

  __device__ __forceinline__ void run_work() {
    clear_operands();
#pragma unroll
    for (int i = 0; i < C.head_dim / 2; ++i) dk[i] = dv[i] = 0;
    const BlockRange &all = work().all, &range = work().mine[keys];
    const int all_steps = ptx::uniform(all.end - all.begin);
    const int before = ptx::uniform(this->falling() ? all.end - range.end : range.begin - all.begin);
    const Walk walk = this->walk(range, work().n_begin + 64 * keys + 64 <= work().part.band.seqlen_k);
    if (all_steps > 0) {
      shared.k_full.wait(work().parity);
      shared.v_full.wait(work().parity);
      shared.keys_empty.arrive();  // every lane, for what it has seen come: two phases must not pass unseen
    }
    for (int head = 0; head < params.group; ++head) {
      if (walk.begin == walk.end) {
        skip(all_steps);
        continue;
      }
      skip(before);
      run_head(work().head * params.group + head, walk);
      skip(all_steps - before - (walk.end - walk.begin));
    }
  }
  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (; this->enter(); this->leave()) {
      const bool any = ptx::uniform(work().claim) < params.works;
      KeyRows at{};
      if (any) {
        run_work();
        at = key_rows();
        write<1>(at, &dv, 1, params.dv, 1, params.head_dim_v);
      }
      write_share([&] {
        if (any) write<1>(at, &dk, 0, params.dk, params.scale, params.head_dim);
      });
    }
  }
  // This warpgroup's part of the share of dq; `meanwhile`, which its loads take.
  template <class Work>
  __device__ __forceinline__ void write_share(const Work& meanwhile) {
    shared.share_ready.wait(this->place.stage());
    Share<C> share{params, work().share, ptx::thread_anew() % 128, part + 2 * this->rank()};
    share.load();
    meanwhile();
    share.finish();
    __syncwarp();
    shared.share_written.arrive_if(leader);
  }
};

// Row::kConfig is the configuration: nvcc 13.0 cannot name a kernel whose template argument is itself a struct.
template <class Row>
__global__ void __launch_bounds__(Row::kConfig.threads(), 1) backward_sm90(const __grid_constant__ BackwardParams params) {
  constexpr BackwardConfig C = Row::kConfig;
  static_assert(kSharedBytes<C> <= 227 << 10 && C.head_dim == C.head_dim_v && !C.pair);
  extern __shared__ __align__(1024) unsigned char memory[];
  BackwardShared<C>& shared = *reinterpret_cast<BackwardShared<C>*>(memory);
  if (threadIdx.x == 0) shared.init_barriers(params.deterministic);
  if (params.head_dim < C.head_dim || params.head_dim_v < C.head_dim_v) shared.clear_columns(params.head_dim, params.head_dim_v);
  if constexpr (C.addends) shared.init_ones();
  __syncthreads();
  ptx::launch_dependents();
  if (threadIdx.x >= 128 * (C.mains + 1)) {
    ptx::give_registers<kLoaderRegisters>();
    if (threadIdx.x % 128 < 32) Loader<C>{{params, shared}}.template run<true, true>();
    if (threadIdx.x % 128 == 32 && params.deterministic) Turns<C>{{params, shared}}.template run<true>();
    if (threadIdx.x % 128 == 64 && params.deterministic) Turns<C>{{params, shared}}.template run<false>();
    if (threadIdx.x % 128 >= 96) Claimer<C>{params, shared}.run();
  } else if (threadIdx.x < 128) {
    ptx::give_registers<C.dq_registers>();
    QueryGradients<C>{{params, shared}}.run();
  } else {
    ptx::take_registers<C.main_registers>();
    KeyGradients<C> gradients{{params, shared}, ptx::uniform(static_cast<int>(threadIdx.x) / 128 - 1)};
    gradients.run();
  }
}

}  // namespace tilewise
