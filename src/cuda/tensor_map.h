// The tensor maps that tile/load.cuh reads: rows of one sequence and head, with a tile's last rows cut off where the sequence ends.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "tilewise/status.hpp"

namespace tilewise {

// A tensor of 16-bit elements [batch, rows, heads, columns]; strides in elements, columns contiguous.
struct MapSource {
  const void* data;
  bool bfloat16;
  int64_t batch, rows, heads, columns;
  int64_t batch_stride, row_stride, head_stride;
};

// Tiles of tile_rows rows and 64 columns. The tensor must begin and every stride must step at a multiple of 16 bytes.
Status make_tensor_map(const MapSource& source, int tile_rows, CUtensorMap& map);

}  // namespace tilewise
