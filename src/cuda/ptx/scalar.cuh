// Instructions that libcu++ lacks: exp2, packing of pairs, additions to memory, registers of a warpgroup, numbered barriers.
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

__device__ __forceinline__ float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
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

// Two products at once, rounded to nearest.
__device__ __forceinline__ uint32_t multiply_bf16(uint32_t a, uint32_t b) {
  uint32_t pair;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
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

// Four 8 x 8 matrices of 16-bit elements to shared memory, transposed: thread t has row t / 4, columns 2 (t % 4) and the next of each, and
// gives the address of 16 bytes where column t % 8 of matrix t / 8 goes.
__device__ __forceinline__ void store_matrices_transposed(uint32_t address, const uint32_t* x) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]),
               "r"(x[3])
               : "memory");
}

// Adds four floats to global memory, in no order with other threads' additions.
__device__ __forceinline__ void add_global(float* to, const float* x) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
}

// Handing data in global memory from one CTA to another: who reads the value sees what was written before it was added to.
__device__ __forceinline__ int load_acquire(const int* from) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ void add_release(int* to, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

// Kernels of a stream that overlap: the next may start its CTAs; what the one before has written is there.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets at least this many clocks pass, 1 or more. To read the clock and compare takes some tens by itself.
template <int kClocks>
__device__ __forceinline__ void pause() {
  const auto begin = static_cast<unsigned>(clock());
  while (static_cast<unsigned>(clock()) - begin < kClocks) {
  }
}

// The thread's number, read anew: what follows from it is computed where it is needed, and not kept in registers around a loop.
__device__ __forceinline__ int thread_anew() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// The same value, known to the compiler to be the same in all lanes: places of operands then live in uniform registers.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffff, x, 0); }

// True in one lane of a warp, all of which are here: what the copy engine is told by it needs no loop over lanes.
__device__ __forceinline__ bool elect() {
  uint32_t yes;
  asm volatile("{\n.reg .pred chosen;\nelect.sync _|chosen, 0xffffffff;\nselp.u32 %0, 1, 0, chosen;\n}" : "=r"(yes));
  return yes;
}

// Of each half the larger, or NaN where either is.
template <Element kElement>
__device__ __forceinline__ uint32_t max_or_nan(uint32_t a, uint32_t b) {
  uint32_t c;
  if constexpr (kElement == Element::kBFloat16)
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  else
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
// Whether a half is NaN; with kInfinite whether one is NaN or infinite.
template <Element kElement, bool kInfinite = false>
__device__ __forceinline__ bool has_nan(uint32_t pair) {
  constexpr uint32_t kLargest = (kElement == Element::kBFloat16 ? 0x7f80 : 0x7c00) - kInfinite;
  return (pair & 0x7fff) > kLargest || (pair >> 16 & 0x7fff) > kLargest;
}

// Four 8 x 8 matrices of 16-bit elements in fragments (tile/fragment.cuh) to shared memory; lane 8 i + j names the row j of matrix i.
__device__ __forceinline__ void store_matrices(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
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
