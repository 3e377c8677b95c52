// A tile of results from registers to shared memory, and from there to global memory by the copy engine.
#pragma once

#include <cuda/ptx>

#include "cuda/ptx/scalar.cuh"
#include "cuda/tile/fragment.cuh"
#include "cuda/tile/shared.cuh"

namespace tilewise::tile {

// Writes a warpgroup's 64-row fragment, whose kPairs packed pairs `pair` gives in order. The copy engine may read it after a fence of each
// thread.
template <int kPairs, class T, class Pair>
__device__ __forceinline__ void write_fragment(T& tile, const Pair& pair) {
  static_assert(T::kRows == 64 && kPairs % 4 == 0 && kPairs * 4 <= T::kColumns);
  const int lane = static_cast<int>(threadIdx.x) % 32, row = static_cast<int>(threadIdx.x) % 128 / 32 * 16 + lane % 16;
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(tile.bytes));
#pragma unroll
  for (int block = 0; block < kPairs / 4; ++block) {
    // Of 16 columns: lanes 0 to 15 name the rows of the first 8, the others of the next. Braces keep the order, which arguments have not.
    const uint32_t x[4] = {pair(4 * block), pair(4 * block + 1), pair(4 * block + 2), pair(4 * block + 3)};
    ptx::store_matrices(base + T::offset(row, 2 * block + lane / 16), x[0], x[1], x[2], x[3]);
  }
}

// The rows of one sequence and head that are its own, from a tile that begins at `first_column` to global memory, by a map as load.cuh
// describes it. One thread; the tile may be written again when wait_stored<n>() returns, which waits for all but the last n.
template <class T>
__device__ __forceinline__ void store_rows(const T& tile, const void* map, long long row, int valid_rows, int head, int batch, int columns,
                                           int first_column = 0) {
  const int valid = valid_rows < T::kRows ? valid_rows : T::kRows;
#pragma unroll
  for (int panel = 0; panel < T::kPanels; ++panel) {
    if (first_column + panel * 64 >= columns) break;
    const int32_t at[5] = {first_column + panel * 64, T::kRows - valid, static_cast<int>(row) + valid, head, batch};
    ::cuda::ptx::cp_async_bulk_tensor(::cuda::ptx::space_global, ::cuda::ptx::space_shared, map, at, tile.bytes + panel * T::kPanelBytes);
  }
  ::cuda::ptx::cp_async_bulk_commit_group();
}
template <int kStores = 0>
__device__ __forceinline__ void wait_stored() {
  ::cuda::ptx::cp_async_bulk_wait_group_read(::cuda::ptx::n32_t<kStores>{});
}

}  // namespace tilewise::tile
