// The warpgroup matrix instruction of sm_90a and what orders it; libcu++ has none of these.
// D is 64 x N float32 in registers, A 64 x 16, B 16 x N. ss: A and B from shared memory, both with the summed dimension contiguous.
// st: the same, but B with N contiguous. rs: A from registers, B from shared memory with N contiguous.
// Accumulators and A registers belong to the hardware from issue until a wait: see hold() in tile/gemm.cuh.
#pragma once

#include <cstdint>

#include "cuda/ptx/element.h"

namespace tilewise::ptx {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kPending committed groups of this thread are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// An operand in shared memory is named by 64 bits: the low half is its start and the step to the next 64 columns, in units of 16 bytes,
// the high half mostly the 128-byte swizzle and 1024 bytes from 8 rows to the next 8.
constexpr uint32_t kSwizzled = 1u << 30 | 1024 >> 4;
// Of rows of 8 elements, not swizzled: 128 bytes from 8 rows to the next 8, or the same 8 rows again and again. The step is then from 8
// columns to the next 8; with 0 they are the same ones twice.
constexpr uint32_t kNarrow = 128 >> 4, kNarrowRepeated = 0;

template <Element kElement, int kN>
struct Wgmma;

#define TW_D8(i)                                                                                                                          \
  "+f"(d[8 * i]), "+f"(d[8 * i + 1]), "+f"(d[8 * i + 2]), "+f"(d[8 * i + 3]), "+f"(d[8 * i + 4]), "+f"(d[8 * i + 5]), "+f"(d[8 * i + 6]), \
      "+f"(d[8 * i + 7])
#define TW_D32 TW_D8(0), TW_D8(1), TW_D8(2), TW_D8(3)
#define TW_D48 TW_D32, TW_D8(4), TW_D8(5)
#define TW_D64 TW_D48, TW_D8(6), TW_D8(7)
#define TW_D96 TW_D64, TW_D8(8), TW_D8(9), TW_D8(10), TW_D8(11)
#define TW_D128 TW_D96, TW_D8(12), TW_D8(13), TW_D8(14), TW_D8(15)

#define TW_L32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define TW_L48 TW_L32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define TW_L64 TW_L48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define TW_L96                                                                                                                     \
  TW_L64                                                                                                                           \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%" \
  "95"
#define TW_L128                                                                                                                      \
  TW_L96                                                                                                                             \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%" \
  "122,%123,%124,%125,%126,%127"

// r0 = N / 2 is the number of D's registers; r1.. follow it. The first operand behind D is %r0.
#define TW_SS(n, type, b_transposed, a_high, b_high, r, r0, r1, r2, r3, r4)                                                          \
  asm volatile("{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %" #r2 ", 0;\nmov.b64 a, {%" #r0 ", %" #r3 "};\nmov.b64 b, {%" #r1 \
               ", %" #r4 "};\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" TW_L##r                            \
               "}, a, b, p, 1, 1, 0, " #b_transposed ";\n}"                                                                          \
               : TW_D##r                                                                                                             \
               : "r"(a), "r"(b), "r"(accumulate), "n"(a_high), "n"(b_high))
#define TW_RS(n, type, r, r0, r1, r2, r3, r4, r5, r6)                                                                                  \
  asm volatile("{\n.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, %" #r5 ", 0;\nmov.b64 b, {%" #r4 ", %" #r6                              \
               "};\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" TW_L##r "}, {%" #r0 ",%" #r1 ",%" #r2 ",%" #r3 \
                                                                                                "}, b, p, 1, 1, 1;\n}"                 \
               : TW_D##r                                                                                                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(accumulate), "n"(kSwizzled))
#define TW_WGMMA(n, r, r0, r1, r2, r3, r4, r5, r6)                                                            \
  template <Element kElement>                                                                                 \
  struct Wgmma<kElement, n> {                                                                                 \
    template <uint32_t kA = kSwizzled, uint32_t kB = kSwizzled>                                               \
    static __device__ __forceinline__ void ss(float (&d)[r], uint32_t a, uint32_t b, int accumulate) {        \
      if constexpr (kElement == Element::kBFloat16)                                                           \
        TW_SS(n, "bf16", 0, kA, kB, r, r0, r1, r2, r3, r4);                                                   \
      else                                                                                                    \
        TW_SS(n, "f16", 0, kA, kB, r, r0, r1, r2, r3, r4);                                                    \
    }                                                                                                         \
    static __device__ __forceinline__ void st(float (&d)[r], uint32_t a, uint32_t b, int accumulate) {        \
      if constexpr (kElement == Element::kBFloat16)                                                           \
        TW_SS(n, "bf16", 1, kSwizzled, kSwizzled, r, r0, r1, r2, r3, r4);                                     \
      else                                                                                                    \
        TW_SS(n, "f16", 1, kSwizzled, kSwizzled, r, r0, r1, r2, r3, r4);                                      \
    }                                                                                                         \
    static __device__ __forceinline__ void rs(float (&d)[r], const uint32_t* a, uint32_t b, int accumulate) { \
      if constexpr (kElement == Element::kBFloat16)                                                           \
        TW_RS(n, "bf16", r, r0, r1, r2, r3, r4, r5, r6);                                                      \
      else                                                                                                    \
        TW_RS(n, "f16", r, r0, r1, r2, r3, r4, r5, r6);                                                       \
    }                                                                                                         \
  };
TW_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
TW_WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54)
TW_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
TW_WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102)
TW_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)

#undef TW_WGMMA
#undef TW_RS
#undef TW_SS
#undef TW_L32
#undef TW_L48
#undef TW_L64
#undef TW_L96
#undef TW_L128
#undef TW_D8
#undef TW_D32
#undef TW_D48
#undef TW_D64
#undef TW_D96
#undef TW_D128

}  // namespace tilewise::ptx
