// Hand-over of shared memory between warps. A Barrier counts arrivals and bytes of one phase; a Ring is a place in a row of stages.
// Full barriers: the copy engine arrives with the bytes, users wait. Empty barriers: users arrive, the loader waits, and its first
// round passes because the phase before the first counts as complete.
#pragma once

#include <cstdint>

namespace tilewise::tile {

// In volatile assembly of our own: nvcc 13.0 merges two equal arrivals of cuda::ptx into one.
struct Barrier {
  uint64_t state;
  __device__ __forceinline__ uint32_t address() const { return static_cast<uint32_t>(__cvta_generic_to_shared(&state)); }
  __device__ __forceinline__ void init(uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(arrivals) : "memory");
  }
  __device__ __forceinline__ void arrive(uint32_t count = 1) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(count) : "memory");
  }
  // Without a branch, which would part the loop over keys.
  __device__ __forceinline__ void arrive_if(bool condition) {
    asm volatile("{\n.reg .pred yes;\nsetp.ne.b32 yes, %1, 0;\n@yes mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(address()),
                 "r"(static_cast<int>(condition))
                 : "memory");
  }
  __device__ __forceinline__ void arrive_and_expect(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
  }
  // Whether the phase of this parity is complete.
  __device__ __forceinline__ bool passed(uint32_t parity) {
    uint32_t yes;
    asm volatile("{\n.reg .pred done;\nmbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
                 : "=r"(yes)
                 : "r"(address()), "r"(parity)
                 : "memory");
    return yes;
  }
  // Returns when the phase of this parity (0, 1, 0, ...) is complete.
  __device__ __forceinline__ void wait(uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain%=:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again%=;\n}" ::"r"(address()),
        "r"(parity)
        : "memory");
  }
};

// One register, which counts two rounds of the ring.
template <int kStages>
struct Ring {
  int position = 0;
  __device__ __forceinline__ int stage() const { return position < kStages ? position : position - kStages; }
  __device__ __forceinline__ uint32_t parity() const { return position >= kStages; }
  __device__ __forceinline__ void advance() { position = position + 1 == 2 * kStages ? 0 : position + 1; }
  __device__ __forceinline__ Ring next() const {
    Ring ring = *this;
    ring.advance();
    return ring;
  }
};

}  // namespace tilewise::tile
