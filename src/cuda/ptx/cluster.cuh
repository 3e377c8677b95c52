// Two CTAs of a cluster: their shared memories and barriers. Single instructions that libcu++ lacks, or takes by other types.
#pragma once

#include <cstdint>
#include <cuda/ptx>

namespace tilewise::ptx {

__device__ __forceinline__ int cluster_rank() { return static_cast<int>(::cuda::ptx::get_sreg_cluster_ctarank()); }
// All threads of all CTAs, by whole warps: what was written before is seen after. In the form that is not aligned ptxas no longer knows
// that warps are together in the loops before it, and keeps what is the same for all lanes in every lane.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Where the same thing is in the shared memory of CTA `rank`.
__device__ __forceinline__ uint32_t address_in(int rank, const void* here) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(here))), "r"(rank));
  return there;
}
// Arrives at a barrier there, if `yes`. What was written before need not be seen there: that would wait for all of this thread's additions.
__device__ __forceinline__ void arrive_in(uint32_t barrier, bool yes) {
  asm volatile(
      "{\n.reg .pred yes;\nsetp.ne.b32 yes, %1, 0;\n@yes mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];\n}" ::"r"(barrier),
      "r"(static_cast<int>(yes))
      : "memory");
}
// Stores a word there, and tells a barrier there that expects 4 bytes.
__device__ __forceinline__ void store_in(uint32_t address, int value, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.s32 [%0], %1, [%2];" ::"r"(address), "r"(value), "r"(barrier)
               : "memory");
}
// Copies to memory there; the barrier there is told to expect the bytes, and of their arrival.
__device__ __forceinline__ void copy_in(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("mbarrier.arrive.expect_tx.relaxed.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from))), "r"(bytes), "r"(barrier)
               : "memory");
}

}  // namespace tilewise::ptx
