// Rows of one sequence and head, from global memory into a tile, by the copy engine.
#pragma once

#include <cuda/ptx>

#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/shared.cuh"

namespace tilewise::tile {

// The map has five dimensions: column, row within the tile, first row, head, batch. Both row dimensions have the stride of a row and the
// map begins one tile before the tensor, so that a tile whose last rows are not this sequence's can begin late in the second dimension
// and run over its end: those rows, like columns past the head dimension, are filled with zeros and never read. tensor_map.cpp makes it.
template <class T>
__device__ __forceinline__ void load_rows(T& tile, const void* map, Barrier& full, long long row, int valid_rows, int head, int batch) {
  const int valid = valid_rows < T::kRows ? valid_rows : T::kRows;
  const int late = T::kRows - valid, first = static_cast<int>(row) + valid;
  full.arrive_and_expect(T::kBytes);
#pragma unroll
  for (int panel = 0; panel < T::kPanels; ++panel) {
    const int32_t at[5] = {panel * 64, late, first, head, batch};
    ::cuda::ptx::cp_async_bulk_tensor(::cuda::ptx::space_cluster, ::cuda::ptx::space_global, tile.bytes + panel * T::kPanelBytes, map, at,
                                      &full.state);
  }
}

}  // namespace tilewise::tile
