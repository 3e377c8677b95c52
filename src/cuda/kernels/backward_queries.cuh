// The backward kernel's warpgroup for dq: adds each step's to float32 sums in global memory.
#pragma once

#include "cuda/kernels/backward_shared.cuh"
#include "cuda/ptx/scalar.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/gemm.cuh"

namespace tilewise {

template <BackwardConfig C>
struct QueryGradients : Claims<C> {
  using Claims<C>::params, Claims<C>::shared, Claims<C>::work;
  static constexpr int kWidth = C.dq_columns, kPasses = C.head_dim / kWidth, kThreads = 128;
  const int thread = static_cast<int>(threadIdx.x) % kThreads;
  uint32_t parity = 0;      // of turns
  tile::Ring<kSlots> slot;  // where the next ds is

  // The additions of one step, to this thread's sums from `sum` on.
  __device__ __forceinline__ void add_step(float* sum, int m, const int (&begin)[C.key_tiles()], const int (&end)[C.key_tiles()],
                                           bool last) {
    bool seen[C.key_tiles()];
    uint32_t a[C.key_tiles()];
#pragma unroll
    for (int i = 0; i < C.key_tiles(); ++i) {
      seen[i] = m >= begin[i] && m < end[i];
      shared.ds_full[slot.stage()][i].wait(slot.parity());
      a[i] = tile::operand(shared.ds[slot.stage()][i].bytes, 16);
    }
    const bool all_seen = C.key_tiles() == 1 || (seen[0] && seen[C.key_tiles() - 1]);  // else one of two
#pragma unroll
    for (int pass = 0; pass < C.tiles() * kPasses; ++pass) {
      const int tile = pass / kPasses, columns = pass % kPasses * kWidth;
      float dq[kWidth / 2];
      // dS K of 64 keys, or of all.
      const auto multiply = [&](int first, auto count) {
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4 * count; ++step) {
          const int i = first + step / 4;
          const uint32_t b =
              tile::operand(shared.k[i].bytes, shared.k[i].kPanelBytes) + ((columns / 64 * shared.k[i].kPanelBytes + step % 4 * 2048) >> 4);
          const uint32_t from = count > 1 || first == 0 ? a[step / 4] : a[C.key_tiles() - 1];
          ptx::Wgmma<C.element, kWidth>::st(dq, from + ((tile * kBlockM * 128 + step % 4 * 32) >> 4), b, step > 0);
        }
        ptx::wgmma_commit();
      };
      if (all_seen)
        multiply(0, ::cuda::std::integral_constant<int, C.key_tiles()>{});
      else
        multiply(seen[0] ? 0 : 1, ::cuda::std::integral_constant<int, 1>{});
      ptx::wgmma_wait<0>();
      tile::hold(dq);
      if (params.deterministic && pass == 0) {
        shared.my_turn.wait(parity);
        parity ^= 1;
      }
      if (pass + 1 == C.tiles() * kPasses) {
        shared.keys_empty.arrive_if(last && thread % 32 == 0);  // with the last ds, nobody needs k or v any more
#pragma unroll
        for (int i = 0; i < C.key_tiles(); ++i) shared.ds_empty[slot.stage()][i].arrive_if(thread % 32 == 0);
        slot.advance();
      }
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j) {
        ptx::add_global(sum + (tile * C.head_dim / 8 + columns / 8 + j) * kThreads * 4, dq + 4 * j);
        if constexpr (C.pace > 0)
          if (!params.deterministic) ptx::pause<C.pace>();
      }
    }
    __syncwarp();
    if (params.deterministic) shared.added.arrive_if(thread % 32 == 0);
  }

  __device__ __forceinline__ void add_work() {
    const Walk walk = this->walk(work().all, true);
    int mine_begin[C.key_tiles()], mine_end[C.key_tiles()];
#pragma unroll
    for (int i = 0; i < C.key_tiles(); ++i) {
      mine_begin[i] = ptx::uniform(work().mine[i].begin);
      mine_end[i] = ptx::uniform(work().mine[i].end);
    }
    const int next = (walk.falling ? -1 : 1) * C.tiles() * kBlockM * C.head_dim;  // from a step's sums to the next step's
#pragma unroll 1
    for (int head = 0; head < params.group; ++head) {
      float* sum = sum_of<C>(params, work(), head, walk.step(walk.begin)) + thread * 4;
#pragma unroll 1
      for (int i = walk.begin; i < walk.end; ++i, sum += next)
        add_step(sum, walk.step(i), mine_begin, mine_end, head + 1 == params.group && i + 1 == walk.end);
    }
    ptx::barrier_sync(1, kThreads);
    if (thread == 0) ptx::add_release(&params.progress[work().unit].added, 1);
  }

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (; this->enter(); this->leave()) {
      const int claim = ptx::uniform(work().claim);
      shared.sums_free.wait(this->place.stage());
      if (claim < params.works) add_work();
      __syncwarp();
      shared.sums_added.arrive_if(thread % 32 == 0);
    }
  }
};

}  // namespace tilewise
