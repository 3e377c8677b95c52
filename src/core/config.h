// What every file of core/ relies on: functions that host compilers, nvcc and NVRTC all take.
#pragma once

#if defined(__CUDACC__)
#define TW_HD __host__ __device__ __forceinline__
#else
#define TW_HD inline
#endif

namespace tilewise {

// Positions inside one sequence are int. This bound on lengths and windows keeps every sum of mask.h inside int.
constexpr int kMaxSeqlen = (1 << 30) - 2;
constexpr int kUnbounded = 1 << 30;

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

TW_HD constexpr int min_of(int a, int b) { return a < b ? a : b; }
TW_HD constexpr int max_of(int a, int b) { return a > b ? a : b; }
// Of non-negative a.
template <class T>
TW_HD constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
template <class T>
TW_HD constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

}  // namespace tilewise
