// The vocabulary of the CPU kernels, compiled once per instruction set: rows of the user's memory become float32 tiles,
// tiles are multiplied in registers, exp2. Rows (query, head) lie in the lanes of a vector; a tile is [depth][kTileRows].
#pragma once

#define HWY_COMPILE_ONLY_STATIC
#include <hwy/highway.h>
// Highway's math functions come after its operations.
#include <hwy/contrib/math/math-inl.h>

#include <cstring>

#include "cpu/params.h"

#if HWY_ARCH_X86
#include <xmmintrin.h>
#endif

#if !defined(TW_ISA) || !defined(TW_LANES)
#error "TW_ISA names the instruction set this unit is compiled for, TW_LANES says how many floats its vectors hold"
#endif

// Register arrays must be unrolled by the compiler or they live in memory.
#if defined(__clang__)
#define TW_UNROLL _Pragma("clang loop unroll(full)")
#else
#define TW_UNROLL _Pragma("GCC unroll 32")
#endif

HWY_BEFORE_NAMESPACE();
namespace tilewise::cpu::TW_ISA {

namespace hn = hwy::HWY_NAMESPACE;
using F = hn::ScalableTag<float>;
using I = hn::ScalableTag<int32_t>;
using V = hn::Vec<F>;  // in arrays: register tiles
using F4 = hn::CappedTag<float, 4>;

constexpr int kLanes = static_cast<int>(HWY_LANES(float));
static_assert(kLanes == TW_LANES, "the compiler's flags do not give this unit the vectors of its instruction set");
constexpr int kTileVectors = 3;                   // vectors of a register tile
constexpr int kTileRows = kTileVectors * kLanes;  // rows of a full tile
constexpr bool kManyRegisters = HWY_ARCH_ARM_A64 || kLanes == 16;
constexpr int kRegisterRows = kManyRegisters ? 8 : 4;  // 8 x 3 accumulators of 32 registers, or 4 x 3 of 16

constexpr float kInfinity = __builtin_inff();

// The kernels of this set; params.h says what they do.
size_t forward_scratch(const Params& p);
void forward_item(const Params& p, int batch_index, int kv_head, int64_t m_block, void* scratch);
size_t backward_scratch(const Params& p);
void backward_delta(const Params& p, int batch_index, int kv_head, int64_t tile);
void backward_item(const Params& p, int batch_index, int kv_head, int block_begin, int block_end, void* scratch);
void backward_add(const Params& p, int batch_index, int kv_head, int64_t tile, int block_begin);
void backward_dq(const Params& p, int batch_index, int kv_head, int64_t tile, void* scratch);

// Results below 2^-126 are flushed to zero while a kernel runs: a subnormal exp costs twenty times a normal one.
class FlushSubnormals {
 public:
#if HWY_ARCH_X86
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }
#elif HWY_ARCH_ARM_A64
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(saved_ | (uint64_t{1} << 24)));
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
#if HWY_ARCH_X86
  unsigned saved_;
#else
  uint64_t saved_;
#endif
};

// ---- exp2 -----------------------------------------------------------------------------------------------------------
// 2^r on [0, 1): minimax polynomial with the constant pinned to 1, so that exp2(0) is exactly 1; relative error 2e-9
// before rounding. Degree 5 has 8e-8 and would save 1 % at head_dim 64.
HWY_INLINE V exp2_fraction(F d, V r) {
  V p = hn::Set(d, 2.161291594e-4f);
  p = hn::MulAdd(p, r, hn::Set(d, 1.246784617e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 9.675451594e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 5.548528061e-2f));
  p = hn::MulAdd(p, r, hn::Set(d, 2.402293056e-1f));
  p = hn::MulAdd(p, r, hn::Set(d, 6.931470444e-1f));
  return hn::MulAdd(p, r, hn::Set(d, 1.0f));
}

// 2^t for t <= 127. exp2(-inf) = 0, NaN stays NaN.
HWY_INLINE V exp2(F d, V t) {
#if HWY_TARGET <= HWY_AVX3 && HWY_ARCH_X86
  // Raw intrinsics: Highway has neither the remainder nor the scaling by 2^floor(t). 0x9: floor, no exception.
  const V r{_mm512_reduce_ps(t.raw, 0x9)};
  return V{_mm512_scalef_ps(exp2_fraction(d, r).raw, t.raw)};
#else
  const I di;
  const auto tiny = hn::Lt(t, hn::Set(d, -126.0f));
  const V whole = hn::Floor(t);
  const auto exponent = hn::ShiftLeft<23>(hn::Add(hn::ConvertTo(di, whole), hn::Set(di, 127)));
  const V p = hn::Mul(exp2_fraction(d, hn::Sub(t, whole)), hn::BitCast(d, exponent));
  return hn::IfThenElse(tiny, hn::Zero(d), p);
#endif
}

// Lanes whose row sees `key`: lo <= key < hi.
HWY_INLINE hn::Mask<F> is_visible(hn::Vec<I> key, hn::Vec<I> lo, hn::Vec<I> hi) {
  return hn::RebindMask(F(), hn::AndNot(hn::Lt(key, lo), hn::Lt(key, hi)));
}

// ---- rows of the user's memory ------------------------------------------------------------------------------------------
HWY_INLINE V load_vector(F d, const float* p) { return hn::LoadU(d, p); }
HWY_INLINE V load_vector(F d, const hwy::bfloat16_t* p) {
  const hn::Rebind<uint16_t, F> d16;
  const hn::RebindToUnsigned<F> d32;
  const auto bits = hn::LoadU(d16, reinterpret_cast<const uint16_t*>(p));
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, bits)));
}
#if HWY_ARCH_X86 && HWY_TARGET >= HWY_SSE4
// Without F16C Highway's own conversions give up infinities and rounding. Subnormals go through integers, since the kernels
// run with subnormal floats as zero.
HWY_INLINE V load_vector(F d, const hwy::float16_t* p) {
  const hn::Rebind<uint16_t, F> d16;
  const hn::RebindToUnsigned<F> d32;
  const I di;
  const auto bits = hn::PromoteTo(d32, hn::LoadU(d16, reinterpret_cast<const uint16_t*>(p)));
  const auto magnitude = hn::And(bits, hn::Set(d32, 0x7fff)), exponent = hn::And(bits, hn::Set(d32, 0x7c00));
  const auto sign = hn::ShiftLeft<16>(hn::And(bits, hn::Set(d32, 0x8000))), wide = hn::ShiftLeft<13>(magnitude);
  const V tiny = hn::Mul(hn::ConvertTo(d, hn::BitCast(di, magnitude)), hn::Set(d, 0x1p-24f));
  auto result = hn::Add(wide, hn::Set(d32, 112u << 23));
  result = hn::IfThenElse(hn::Eq(exponent, hn::Set(d32, 0x7c00)), hn::Or(wide, hn::Set(d32, 0x7f800000)), result);
  result = hn::IfThenElse(hn::Eq(exponent, hn::Zero(d32)), hn::BitCast(d32, tiny), result);
  return hn::BitCast(d, hn::Or(result, sign));
}
HWY_INLINE void store_vector(F d, V x, hwy::float16_t* p) {
  const hn::Rebind<uint16_t, F> d16;
  const hn::RebindToUnsigned<F> d32;
  const auto bits = hn::BitCast(d32, x), magnitude = hn::And(bits, hn::Set(d32, 0x7fffffff));
  const V absolute = hn::Abs(x);
  const auto odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(d32, 1));
  auto result = hn::ShiftRight<13>(hn::Sub(hn::Add(magnitude, hn::Add(odd, hn::Set(d32, 0xfff))), hn::Set(d32, 112u << 23)));
  // 0.5 has steps of 2^-24, those of float16's subnormals: adding it rounds to them.
  const auto tiny = hn::Sub(hn::BitCast(d32, hn::Add(absolute, hn::Set(d, 0.5f))), hn::Set(d32, 0x3f000000));
  result = hn::IfThenElse(hn::RebindMask(d32, hn::Lt(absolute, hn::Set(d, 0x1p-14f))), tiny, result);
  result = hn::IfThenElse(hn::RebindMask(d32, hn::Ge(absolute, hn::Set(d, 65520.0f))), hn::Set(d32, 0x7c00), result);
  result = hn::IfThenElse(hn::RebindMask(d32, hn::IsNaN(x)), hn::Set(d32, 0x7e00), result);
  result = hn::Or(result, hn::ShiftLeft<15>(hn::ShiftRight<31>(bits)));
  hn::StoreU(hn::TruncateTo(d16, result), d16, reinterpret_cast<uint16_t*>(p));
}
#else
HWY_INLINE V load_vector(F d, const hwy::float16_t* p) {
  const hn::Rebind<hwy::float16_t, F> d16;
  return hn::PromoteTo(d, hn::LoadU(d16, p));
}
HWY_INLINE void store_vector(F, V x, hwy::float16_t* p) {
  const hn::Rebind<hwy::float16_t, F> d16;
  hn::StoreU(hn::DemoteTo(d16, x), d16, p);
}
#endif

HWY_INLINE void store_vector(F d, V x, float* p) { hn::StoreU(x, d, p); }
// Round to nearest, ties to even; NaN stays NaN.
HWY_INLINE void store_vector(F, V x, hwy::bfloat16_t* p) {
  const hn::Rebind<uint16_t, F> d16;
  const hn::RebindToUnsigned<F> d32;
  const auto bits = hn::BitCast(d32, x);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(d32, 1));
  const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(d32, 0x7fff)));
  const auto quiet = hn::Or(bits, hn::Set(d32, 0x400000));
  const auto high = hn::ShiftRight<16>(hn::IfThenElse(hn::RebindMask(d32, hn::IsNaN(x)), quiet, rounded));
  hn::StoreU(hn::TruncateTo(d16, high), d16, reinterpret_cast<uint16_t*>(p));
}
// One row of n elements times `factor` to float32, zeros up to round_up(n, kLanes). Gives back x * 0 summed over the
// row: not zero exactly where the row holds a NaN or an infinity.
template <class T>
HWY_INLINE V load_row(const T* from, int n, float factor, float* HWY_RESTRICT to) {
  const F d;
  const V scale = hn::Set(d, factor), zero = hn::Zero(d);
  V taint = zero;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const V x = load_vector(d, from + i);
    taint = hn::MulAdd(x, zero, taint);
    hn::StoreU(hn::Mul(x, scale), d, to + i);
  }
  if (i < n) {
    T tail[kLanes] = {};
    memcpy(tail, from + i, static_cast<size_t>(n - i) * sizeof(T));
    const V x = load_vector(d, tail);
    taint = hn::MulAdd(x, zero, taint);
    hn::StoreU(hn::Mul(x, scale), d, to + i);
  }
  return taint;
}

template <class T>
HWY_INLINE void store_row(const float* HWY_RESTRICT from, int n, T* to) {
  const F d;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store_vector(d, hn::LoadU(d, from + i), to + i);
  if (i < n) {
    float padded[kLanes] = {};
    memcpy(padded, from + i, static_cast<size_t>(n - i) * sizeof(float));
    T tail[kLanes];
    store_vector(d, hn::LoadU(d, padded), tail);
    memcpy(to + i, tail, static_cast<size_t>(n - i) * sizeof(T));
  }
}

HWY_INLINE bool is_tainted(V taint) {
  const F d;
  return !hn::AllTrue(d, hn::Eq(taint, hn::Zero(d)));
}

// to[c * to_stride + r] = from[r * from_stride + c] for 4 rows and 4 columns.
HWY_INLINE void transpose4x4(const float* from, int from_stride, float* to, int to_stride) {
  const F4 d;
  const auto a = hn::LoadU(d, from), b = hn::LoadU(d, from + from_stride);
  const auto e = hn::LoadU(d, from + 2 * from_stride), f = hn::LoadU(d, from + 3 * from_stride);
  const auto ae0 = hn::InterleaveLower(d, a, e), ae1 = hn::InterleaveUpper(d, a, e);
  const auto bf0 = hn::InterleaveLower(d, b, f), bf1 = hn::InterleaveUpper(d, b, f);
  hn::StoreU(hn::InterleaveLower(d, ae0, bf0), d, to);
  hn::StoreU(hn::InterleaveUpper(d, ae0, bf0), d, to + to_stride);
  hn::StoreU(hn::InterleaveLower(d, ae1, bf1), d, to + 2 * to_stride);
  hn::StoreU(hn::InterleaveUpper(d, ae1, bf1), d, to + 3 * to_stride);
}

// Rows of a tensor, by element type. `body` is called with a typed null pointer to name the type.
template <class Body>
HWY_INLINE void with_element(Element element, Body body) {
  switch (element) {
    case Element::kFloat32:
      return body(static_cast<float*>(nullptr));
    case Element::kBFloat16:
      return body(static_cast<hwy::bfloat16_t*>(nullptr));
    case Element::kFloat16:
      return body(static_cast<hwy::float16_t*>(nullptr));
  }
}

// Address of row `row` of head `head`.
template <class T>
HWY_INLINE T* row_of(const Tensor& t, int64_t batch_index, int64_t row, int64_t head) {
  return static_cast<T*>(t.data) + batch_index * t.batch + row * t.row + head * t.head;
}

// ---- matrix multiply in registers ---------------------------------------------------------------------------------------
// acc[r][n] += sum over k < depth of A(r, k) * B[k][n-th vector], where A(r, k) is a[r * lda + k], or a[k * lda + r] if
// kTransposed. Each sum runs over k in order, so a lane's result does not depend on the shape of the tile around it.
template <int kRows, int kVectors, bool kTransposed>
HWY_INLINE void multiply(const float* HWY_RESTRICT a, int lda, const float* HWY_RESTRICT b, int ldb, int depth, V (&acc)[kRows][kVectors]) {
  const F d;
  for (int k = 0; k < depth; ++k) {
    V row[kVectors];
    TW_UNROLL
    for (int n = 0; n < kVectors; ++n) row[n] = hn::LoadU(d, b + n * kLanes);
    TW_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const V x = hn::Set(d, kTransposed ? a[r] : a[r * static_cast<ptrdiff_t>(lda)]);
      TW_UNROLL
      for (int n = 0; n < kVectors; ++n) acc[r][n] = hn::MulAdd(x, row[n], acc[r][n]);
    }
    a += kTransposed ? lda : 1;
    b += ldb;
  }
}

template <int kRows, int kVectors>
HWY_INLINE void clear(V (&acc)[kRows][kVectors]) {
  const F d;
  TW_UNROLL
  for (int r = 0; r < kRows; ++r) {
    TW_UNROLL
    for (int n = 0; n < kVectors; ++n) acc[r][n] = hn::Zero(d);
  }
}

}  // namespace tilewise::cpu::TW_ISA
HWY_AFTER_NAMESPACE();
