// The backward kernel's main warpgroups for head dimensions above 128, where dk and dv of 64 keys fill the registers of two: one has S, p
// and dv, the other dP, ds and dk. p goes from one to the other by way of shared memory, thread by thread, to the place that ds takes
// afterwards. The first is up to a step ahead. The rest is as in backward_sm90.cuh.
#pragma once

#include "cuda/kernels/backward_pair.cuh"
#include "cuda/kernels/backward_sm90.cuh"

namespace tilewise {

// Sums of 64 keys, in halves where a product cannot be as wide.
template <int kColumns>
struct KeySums {
  static constexpr int kParts = kColumns > 192 ? 2 : 1, kWidth = kColumns / kParts;
  float of[kParts][kWidth / 2];
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& part : of)
#pragma unroll
      for (float& x : part) x = 0;
  }
  __device__ __forceinline__ void hold() {
#pragma unroll
    for (auto& part : of) tile::hold(part);
  }
};

// What both have in common.
template <BackwardConfig C>
struct KeyRole : KeyGradients<C> {
  using Base = KeyGradients<C>;
  using Base::leader, Base::p, Base::params, Base::rows, Base::s, Base::shared, Base::slot, Base::work;

  // sum += p^T times a step's q or do.
  template <int kColumns, class T>
  __device__ __forceinline__ void add_product(KeySums<kColumns>& sum, const T& queries) {
    ptx::wgmma_fence();
    const uint32_t b = tile::operand(queries.bytes, T::kPanelBytes);
#pragma unroll
    for (int part = 0; part < sum.kParts; ++part)
#pragma unroll
      for (int step = 0; step < kBlockM / 16; ++step)
        ptx::Wgmma<C.element, sum.kWidth>::rs(sum.of[part], p + 4 * step,
                                              b + ((part * sum.kWidth / 64 * T::kPanelBytes + step * 2048) >> 4), 1);
    ptx::wgmma_commit();
  }
  // Of the step before, by the lanes that shall.
  __device__ __forceinline__ void hand_back(tile::Barrier (&empty)[C.stages], bool mine) {
    empty[rows.stage == 0 ? C.stages - 1 : rows.stage - 1].arrive_if(mine);
  }
  // All works, and all query heads of a group, whose steps are the same.
  template <class Role>
  static __device__ __forceinline__ void run(Role& role, tile::Barrier& keys_full) {
#pragma unroll 1
    for (; role.enter(); role.leave()) {
      if (role.work().claim < role.params.works) run_work(role, keys_full);
      role.write_share([] {});  // registers are few until the gradient is written
    }
  }
  template <class Role>
  static __device__ __forceinline__ void run_work(Role& role, tile::Barrier& keys_full) {
    const BackwardWork& work = role.work();
    role.clear_operands();
    role.clear();
    const Walk walk = role.walk(role.own_steps(), work.n_begin + 64 * role.keys + 64 <= work.part.band.seqlen_k);
    if (ptx::uniform(work.all.end - work.all.begin) > 0) {
      keys_full.wait(work.parity);
      role.shared.keys_empty.arrive();
    }
    if (walk.begin < walk.end) {
      for (int head = 0; head < role.params.group; ++head) role.run_head(work.head * role.params.group + head, walk);
    }
    role.write();
  }
};

// S, p and dv. Nothing is waited for between having p and passing it on, and the scores of the next step come after dV: q may be late.
template <BackwardConfig C>
struct ScoreRole : KeyRole<C> {
  using Base = KeyRole<C>;
  using Base::leader, Base::p, Base::params, Base::rows, Base::s, Base::shared, Base::slot;
  KeySums<C.head_dim_v> dv;

  // p, times the softcap's derivative.
  __device__ __forceinline__ void pass_p() {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint4& place = Base::my_place(j);
      uint32_t x[4] = {p[4 * j], p[4 * j + 1], p[4 * j + 2], p[4 * j + 3]};
      if constexpr (C.modified) {
        const uint32_t slopes[4] = {place.x, place.y, place.z, place.w};
#pragma unroll
        for (int n = 0; n < 4; ++n)
          x[n] = ptx::pack<C.element>(s[8 * j + 2 * n] * Base::half_of(slopes[n], 0), s[8 * j + 2 * n + 1] * Base::half_of(slopes[n], 1));
      }
      place = make_uint4(x[0], x[1], x[2], x[3]);
    }
    shared.p_full[slot.stage()].arrive();  // every lane, for what it has written
    slot.advance();
  }
  __device__ __forceinline__ void issue_dv() {
    shared.do_full[rows.stage].wait(rows.parity);
    Base::add_product(dv, shared.do_[rows.stage]);
  }
  __device__ __forceinline__ void run_head(int head, const Walk& walk) {
    shared.q_full[rows.stage].wait(rows.parity);
    Base::issue_scores();
    for (int i = walk.begin;;) {
      Base::wait_for_slot();
      Base::read_rows(0);
      ptx::wgmma_wait<1>();  // dV of the step before
      tile::hold(p);
      Base::hand_back(shared.do_empty, leader && i > walk.begin);
      ptx::wgmma_wait<0>();  // S
      tile::hold(s);
      Base::probabilities(head, walk.step(i), walk.at_edge(i));
      Base::pack(s, p);
      pass_p();
      if (++i == walk.end) break;
      issue_dv();
      rows.advance();
      shared.q_full[rows.stage].wait(rows.parity);
      Base::issue_scores();
    }
    issue_dv();
    rows.advance();
    ptx::wgmma_wait<0>();
    tile::hold(p);
    dv.hold();
    Base::hand_back(shared.do_empty, leader);
  }
  __device__ __forceinline__ void clear() { dv.clear(); }
  __device__ __forceinline__ void write() { Base::template write<dv.kParts>(Base::key_rows(), dv.of, 1, params.dv, 1, params.head_dim_v); }
};

// dP, ds and dk. Between having ds and passing it on nothing is waited for either.
template <BackwardConfig C>
struct ScoreGradientRole : KeyRole<C> {
  using Base = KeyRole<C>;
  using Base::leader, Base::p, Base::params, Base::rounded, Base::rows, Base::s, Base::shared, Base::slot;
  KeySums<C.head_dim> dk;

  __device__ __forceinline__ void take_p() {
    shared.p_full[slot.stage()].wait(slot.parity());
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint4 four = Base::my_place(j);
      p[4 * j] = four.x, p[4 * j + 1] = four.y, p[4 * j + 2] = four.z, p[4 * j + 3] = four.w;
    }
    __syncwarp();  // ds takes the place
  }
  __device__ __forceinline__ void run_head(int, const Walk& walk) {
    Base::issue_dp();
    ptx::wgmma_wait<0>();  // from here on a product of dk is behind dP
    for (int i = walk.begin;;) {
      shared.q_full[rows.stage].wait(rows.parity);
      Base::read_rows(1);
      ptx::wgmma_wait<1>();  // dP
      tile::hold(s);
      shared.do_empty[rows.stage].arrive_if(leader);
      Base::subtract_delta(s);
      if (walk.at_edge(i)) Base::mask(s, walk.step(i));  // 0 times what is not finite
      Base::pack(s, rounded);
      if constexpr (Base::kPairs) tile::hold(rounded);  // before the wait
      ptx::wgmma_wait<0>();                             // dK of the step before
      tile::hold(p);
      Base::hand_back(shared.q_empty, i > walk.begin);  // every lane, for the rows that it has read
      take_p();
      Base::score_gradients(s, rounded);
      tile::hold(p);
      Base::store_ds();
      const int stage = rows.stage;
      rows.advance();
      if (++i == walk.end) break;
      Base::issue_dp();
      Base::add_product(dk, shared.q[stage]);
    }
    Base::add_product(dk, shared.q[rows.stage == 0 ? C.stages - 1 : rows.stage - 1]);
    ptx::wgmma_wait<0>();
    tile::hold(p);
    dk.hold();
    Base::hand_back(shared.q_empty, true);
  }
  __device__ __forceinline__ void clear() { dk.clear(); }
  __device__ __forceinline__ void write() {
    Base::template write<dk.kParts>(Base::key_rows(), dk.of, 0, params.dk, params.scale, params.head_dim);
  }
};

template <class Row>
__global__ void __launch_bounds__(Row::kConfig.threads(), 1) backward_roles(const __grid_constant__ BackwardParams params) {
  constexpr BackwardConfig C = Row::kConfig;
  static_assert(kSharedBytes<C> <= 227 << 10 && C.mains == 2 && C.block_m == kBlockM && !C.addends);
  extern __shared__ __align__(1024) unsigned char memory[];
  BackwardShared<C>& shared = *reinterpret_cast<BackwardShared<C>*>(memory);
  if (threadIdx.x == 0) shared.init_barriers(params.deterministic);
  shared.clear_columns(params.head_dim, params.head_dim_v);
  __syncthreads();
  ptx::cluster_sync();
  ptx::launch_dependents();
  const auto leave = [] { ptx::cluster_sync(); };  // the other CTA may still want something of this one's memory
  const int warpgroup = ptx::uniform(static_cast<int>(threadIdx.x) / 128);
  if (warpgroup == 3) {
    ptx::give_registers<kLoaderRegisters>();
    const int thread = static_cast<int>(threadIdx.x) % 128;
    // Where turns are taken, one warp loads, and who watches for them shares a warp with the exchange: not who hands them on, since his
    // fences hold up a warp for 3,000 clocks. The two wait for each other by way of dq; lanes of a warp that wait let others go on.
    if (params.deterministic) {
      if (thread < 32) Loader<C>{{params, shared}}.template run<true, true>();
      if (thread == 32)
        Turns<C>{{params, shared}}.template run<true>();
      else if (thread == 33)
        Exchange<C>{{params, shared}}.run();
      if (thread == 64) Turns<C>{{params, shared}}.template run<false>();
    } else {
      if (thread < 32) Loader<C>{{params, shared}}.template run<true, false>();
      if (thread >= 32 && thread < 64) Loader<C>{{params, shared}}.template run<false, true>();
      if (thread == 64) Exchange<C>{{params, shared}}.run();
    }
    if (thread >= 96) Claimer<C>{params, shared}.run();
    __syncwarp();
    leave();
  } else if (warpgroup == 0) {
    ptx::give_registers<C.dq_registers>();
    PairQueryGradients<C>{{{params, shared}}}.run();
    leave();
  } else {
    ptx::take_registers<C.main_registers>();
    if (warpgroup == 1) {
      ScoreRole<C> role{{{{params, shared}, 0}}};
      KeyRole<C>::run(role, shared.k_full);
      leave();
    } else {
      ScoreGradientRole<C> role{{{{params, shared}, 1}}};
      KeyRole<C>::run(role, shared.v_full);
      leave();
    }
  }
}

}  // namespace tilewise
