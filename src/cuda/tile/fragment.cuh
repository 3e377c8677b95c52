// Which row and column a register is. A warpgroup holds 64 x N float32 accumulators: warp w rows 16 w to 16 w + 15, and thread t of a
// warp rows t / 4 and t / 4 + 8, columns 8 j + 2 (t % 4) + {0, 1}. x[4 j + 2 r + c] is row r (of two), column 8 j + c.
// Packed in pairs, x[2 i], x[2 i + 1] -> p[i], the same registers are the A operand of a following wgmma, four for every 16 columns.
#pragma once

namespace tilewise::tile {

struct Lane {
  int row;     // of the warpgroup's 64: this thread holds `row` and `row + 8`
  int column;  // first column of each 8
};
__device__ __forceinline__ Lane lane_of(int thread) {
  const int t = thread % 128;
  return {t / 32 * 16 + t % 32 / 4, t % 4 * 2};
}
__device__ __forceinline__ Lane this_lane() { return lane_of(static_cast<int>(threadIdx.x)); }
// Row (0 or 1) and column of register i, relative to this_lane().
__device__ __forceinline__ constexpr int row_of(int i) { return i >> 1 & 1; }
__device__ __forceinline__ constexpr int column_of(int i) { return (i >> 2) * 8 + (i & 1); }

}  // namespace tilewise::tile
