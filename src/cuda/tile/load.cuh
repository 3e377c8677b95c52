// Rows of one sequence and head, from global memory into a tile, by the copy engine.
#pragma once

#include <cuda/ptx>

#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/shared.cuh"

namespace tilewise::tile {

// Panels with columns that are there.
template <class T>
__device__ __forceinline__ int panels_of(int columns) {
  return columns < T::kColumns ? (columns + 63) / 64 : T::kPanels;
}

// Zeros in all panels past `columns`, by `threads` threads.
template <class T>
__device__ __forceinline__ void clear_panels(T& tile, int columns, int thread, int threads) {
  for (int at = panels_of<T>(columns) * T::kPanelBytes + thread * 16; at < T::kBytes; at += threads * 16)
    *reinterpret_cast<uint4*>(tile.bytes + at) = make_uint4(0, 0, 0, 0);
  ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
}

// The map has five dimensions: column, row within the tile, first row, head, batch. Both row dimensions have the stride of a row and the
// map begins one tile before the tensor, so that a tile whose last rows are not this sequence's can begin late in the second dimension
// and run over its end: those rows, like columns past the head dimension, are filled with zeros and never read. tensor_map.cpp makes it.
// The tile begins at `first_column`. Panels past `columns` are not loaded, nor is a tile without valid rows: of a box that is outside
// altogether the copy engine touches the map's begin, where there may be no memory. Such panels are what clear_panels() has made of them,
// such a tile holds what it held.
template <class T>
__device__ __forceinline__ void load_rows(T& tile, const void* map, Barrier& full, long long row, int valid_rows, int head, int batch,
                                          int columns, int first_column = 0) {
  const int valid = valid_rows < T::kRows ? valid_rows : T::kRows;
  if (valid <= 0 || columns <= first_column) return full.arrive();
  full.arrive_and_expect(panels_of<T>(columns - first_column) * T::kPanelBytes);
#pragma unroll
  for (int panel = 0; panel < T::kPanels; ++panel) {
    if (first_column + panel * 64 >= columns) break;
    const int32_t at[5] = {first_column + panel * 64, T::kRows - valid, static_cast<int>(row) + valid, head, batch};
    ::cuda::ptx::cp_async_bulk_tensor(::cuda::ptx::space_cluster, ::cuda::ptx::space_global, tile.bytes + panel * T::kPanelBytes, map, at,
                                      &full.state);
  }
}

}  // namespace tilewise::tile
