// Single instructions that libcu++ lacks: exp2, packing of pairs, registers of a warpgroup, numbered barriers.
#pragma once

#include <cstdint>

#include "cuda/ptx/wgmma.cuh"

namespace tilewise::ptx {

// 2^x with a relative error of 2^-22; -inf gives 0. Denormal results are 0.
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to nearest, `low` in the low half.
template <Element kElement>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t pair;
  if constexpr (kElement == Element::kBFloat16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <Element kElement>
__device__ __forceinline__ float to_float(uint16_t x) {
  float y;
  if constexpr (kElement == Element::kBFloat16)
    asm("cvt.f32.bf16 %0, %1;" : "=f"(y) : "h"(x));
  else
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

// Registers per thread of this warpgroup from here on; all of its warps execute it once, at the top of their role.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Barrier `id` (1 to 15) completes when `threads` threads have come: those that sync wait for it, those that arrive go on.
__device__ __forceinline__ void barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace tilewise::ptx
