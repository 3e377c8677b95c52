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
  static_assert(C.head_dim % kWidth == 0);
  const int thread = static_cast<int>(threadIdx.x) % kThreads;
  uint32_t parity = 0;      // of turns
  tile::Ring<kSlots> slot;  // where the next ds is

  // dS K of `count` times 64 keys from the first, of 64 queries and kWidth columns. ds and k: of each 64 keys, where the operands begin.
  template <int kCount>
  __device__ __forceinline__ void multiply(float (&dq)[kWidth / 2], const uint32_t (&ds)[C.key_tiles()], const uint32_t (&k)[C.key_tiles()],
                                           int first) {
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4 * kCount; ++step) {
      const int i = kCount > 1 ? step / 4 : 0;
      const uint32_t a = kCount > 1 || first == 0 ? ds[i] : ds[C.key_tiles() - 1],
                     b = kCount > 1 || first == 0 ? k[i] : k[C.key_tiles() - 1];
      ptx::Wgmma<C.element, kWidth>::st(dq, a + ((step % 4 * 32) >> 4), b + ((step % 4 * 2048) >> 4), step > 0);
    }
    ptx::wgmma_commit();
  }
  // Adds them to this thread's sums from `sum` on.
  __device__ __forceinline__ void add(float* sum, const float (&dq)[kWidth / 2]) {
#pragma unroll
    for (int j = 0; j < kWidth / 8; ++j) {
      ptx::add_global(sum + j * kThreads * 4, dq + 4 * j);
      if constexpr (C.pace > 0)
        if (!params.deterministic) ptx::pause<C.pace>();
    }
  }

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
      uint32_t ds[C.key_tiles()], k[C.key_tiles()];
#pragma unroll
      for (int i = 0; i < C.key_tiles(); ++i) {
        ds[i] = a[i] + ((tile * kBlockM * 128) >> 4);
        k[i] = tile::operand(shared.k[i].bytes, shared.k[i].kPanelBytes) + ((columns / 64 * shared.k[i].kPanelBytes) >> 4);
      }
      if (all_seen)
        multiply<C.key_tiles()>(dq, ds, k, 0);
      else
        multiply<1>(dq, ds, k, seen[0] ? 0 : 1);
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
      add(sum + (tile * C.head_dim / 8 + columns / 8) * kThreads * 4, dq);
    }
    __syncwarp();
    if (params.deterministic) shared.added.arrive_if(thread % 32 == 0);
  }

  // step(sums, m, begin, end, last): the steps of each 64 keys, those of number `first` first; whether it is the last step of the work.
  template <class Step>
  __device__ __forceinline__ void add_work(int first, const Step& step) {
    const Walk walk = this->walk(work().all, true);
    int begin[C.key_tiles()], end[C.key_tiles()];
#pragma unroll
    for (int i = 0; i < C.key_tiles(); ++i) {
      const BlockRange& range = work().mine[i ^ first];
      begin[i] = ptx::uniform(range.begin);
      end[i] = ptx::uniform(range.end);
    }
    const int next =
        (walk.falling ? -1 : 1) * C.tiles() * kBlockM * C.sum_columns(params.deterministic);  // from a step's sums to the next step's
#pragma unroll 1
    for (int head = 0; head < params.group; ++head) {
      float* sum = sum_of<C>(params, work(), head, walk.step(walk.begin)) + thread * 4;
#pragma unroll 1
      for (int i = walk.begin; i < walk.end; ++i, sum += next)
        step(sum, walk.step(i), begin, end, head + 1 == params.group && i + 1 == walk.end);
    }
    ptx::barrier_sync(1, kThreads);
    if (thread == 0) ptx::add_release(&params.progress[work().unit].added, 1);
  }
  // All works.
  template <class Work>
  __device__ __forceinline__ void run_works(const Work& add) {
#pragma unroll 1
    for (; this->enter(); this->leave()) {
      const int claim = ptx::uniform(work().claim);
      shared.sums_free.wait(this->place.stage());
      if (claim < params.works) add();
      __syncwarp();
      shared.sums_added.arrive_if(thread % 32 == 0);
    }
  }
  __device__ __forceinline__ void run() {
    run_works([&] {
      add_work(0, [&](float* sum, int m, const auto& begin, const auto& end, bool last) { add_step(sum, m, begin, end, last); });
    });
  }
};

}  // namespace tilewise
