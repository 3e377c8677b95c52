// Pairs of CTAs, for head dimensions above 128, where additions to dq are what everyone waits for. The two have 64 keys each, one beside
// the other, and send each other their ds. The first 64 columns of dq are added by the first CTA for both, the next 64 by the second; only
// columns past them are added by each. So there are three additions where there were four (head_dim 256), or two for three (192).
// Where the order of additions matters, each CTA keeps an order from pair to pair, and columns that both add have sums of each: so neither
// waits for the other's additions (by way of ds they stay within a step of each other), and who writes dq adds the two.
#pragma once

#include "cuda/kernels/backward_queries.cuh"
#include "cuda/kernels/backward_shared.cuh"
#include "cuda/ptx/cluster.cuh"

namespace tilewise {

// One thread: sends each ds to the other CTA, when both have used the one before. The copy has been read by then, so ds_empty, where both
// CTAs' dq warpgroups arrive, is also all that the place here waits for.
template <BackwardConfig C>
struct Exchange : Claims<C> {
  using Claims<C>::params, Claims<C>::shared, Claims<C>::work;

  __device__ __forceinline__ void run() {
    const int other = 1 - this->rank();
    const uint32_t to = ptx::address_in(other, shared.other.ds.bytes), full = ptx::address_in(other, &shared.other_ds_full);
    tile::Ring<kSlots> slot, before{2 * kSlots - 1};  // before the first there is nothing to wait for
#pragma unroll 1
    for (; this->enter(); this->leave()) {
      const BlockRange& own = this->own_steps();
#pragma unroll 1
      for (int left = params.group * (own.end - own.begin); left > 0; --left, slot.advance(), before.advance()) {
        shared.ds_full[slot.stage()][0].wait(slot.parity());
        shared.ds_empty[before.stage()][0].wait(before.parity());
        ptx::copy_in(to, shared.ds[slot.stage()][0].bytes, sizeof(shared.other.ds), full);
      }
    }
  }
};

template <BackwardConfig C>
struct PairQueryGradients : QueryGradients<C> {
  using Base = QueryGradients<C>;
  using Base::kPasses, Base::kThreads, Base::kWidth, Base::parity, Base::params, Base::shared, Base::slot, Base::thread, Base::work;
  static_assert(kWidth == 64 && C.tiles() == 1);  // a panel of K
  const int rank = ptx::uniform(Claims<C>::rank());
  const int own = params.deterministic ? rank * (kPasses - C.ctas()) : 0;  // from panels of dq to those of sums that this CTA adds alone
  tile::Ring<kSlots> other_slot;                                           // where the other CTA has its next ds
  tile::Ring<1> other_ds;                                                  // and its place here

  // begin, end: this CTA's steps, and the other's. Columns that each adds for itself come first, so that the other's ds has time to come.
  __device__ __forceinline__ void add_step(float* sum, int m, const int (&begin)[2], const int (&end)[2], bool last) {
    const bool leader = thread % 32 == 0;
    const bool mine = m >= begin[0] && m < end[0], others = m >= begin[1] && m < end[1];
    if (mine) shared.ds_full[slot.stage()][0].wait(slot.parity());
    const uint32_t ds[2] = {tile::operand(shared.ds[slot.stage()][0].bytes, 16), tile::operand(shared.other.ds.bytes, 16)};
#pragma unroll
    for (int pass = C.ctas(); pass <= kPasses; ++pass) {
      const bool for_both = pass == kPasses;
      if (!for_both && !mine) continue;
      const int panel = for_both ? rank : pass;
      const uint32_t k[2] = {tile::operand(shared.k[0].bytes, shared.k[0].kPanelBytes) + ((panel * shared.k[0].kPanelBytes) >> 4),
                             tile::operand(shared.other.k.bytes, shared.other.k.kPanelBytes)};
      float dq[kWidth / 2];
      if (for_both && others) shared.other_ds_full.wait(other_ds.parity());
      if (for_both && others && mine)
        Base::template multiply<2>(dq, ds, k, 0);
      else
        Base::template multiply<1>(dq, ds, k, mine ? 0 : 1);
      ptx::wgmma_wait<0>();
      tile::hold(dq);
      if (for_both) {
        shared.keys_empty.arrive_if(last && leader);
        shared.ds_empty[slot.stage()][0].arrive_if(mine && leader);
        if (mine) slot.advance();
        if (others) {
          ptx::arrive_in(ptx::address_in(1 - rank, &shared.ds_empty[other_slot.stage()][0]), leader);
          other_slot.advance();
          other_ds.advance();
        }
      }
      if (params.deterministic && (for_both ? !mine : pass == C.ctas())) {  // before the step's first additions
        shared.my_turn.wait(parity);
        parity ^= 1;
      }
      Base::add(sum + (for_both ? panel : panel + own) * (kWidth / 8) * kThreads * 4, dq);
    }
    __syncwarp();
    if (params.deterministic) shared.added.arrive_if(leader);
  }
  __device__ __forceinline__ void run() {
    Base::run_works([&] {
      if (work().all.begin < work().all.end) shared.other_k_full.wait(work().parity);
      Base::add_work(rank, [&](float* sum, int m, const auto& begin, const auto& end, bool last) { add_step(sum, m, begin, end, last); });
    });
  }
};

}  // namespace tilewise
