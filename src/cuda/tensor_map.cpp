// Encodes tensor maps.
#include "cuda/tensor_map.h"

#include <string>

#include "cuda/backend.h"

namespace tilewise {

Status make_tensor_map(const MapSource& source, int tile_rows, CUtensorMap& map) {
  static const auto encode = cuda::driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  if (!encode) return unavailable("the NVIDIA driver has no cuTensorMapEncodeTiled");
  // Column, row within a tile, first row plus one tile, head, batch. A dimension of one element may have any stride: it is never taken.
  //
  // cuda.h asks that strides rise and each be at least the extent before it. Two equal ones, heads before rows and a stride of 0 break
  // that; the drivers that this ran on take them, and the copy engine does what they say (tests/cuda/tile_test.cu).
  const auto bytes = [](int64_t extent, int64_t stride) { return static_cast<cuuint64_t>(extent > 1 ? 2 * stride : 16); };
  const cuuint64_t row = bytes(source.rows, source.row_stride);
  const cuuint64_t extent[5] = {static_cast<cuuint64_t>(source.columns), static_cast<cuuint64_t>(tile_rows),
                                static_cast<cuuint64_t>(source.rows + tile_rows), static_cast<cuuint64_t>(source.heads),
                                static_cast<cuuint64_t>(source.batch)};
  const cuuint64_t stride[4] = {row, row, bytes(source.heads, source.head_stride), bytes(source.batch, source.batch_stride)};
  const cuuint32_t box[5] = {64, static_cast<cuuint32_t>(tile_rows), 1, 1, 1}, step[5] = {1, 1, 1, 1, 1};
  char* begin = static_cast<char*>(const_cast<void*>(source.data)) - static_cast<int64_t>(row) * tile_rows;
  const CUresult result = encode(&map, source.bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 5, begin,
                                 extent, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return {};
  return unsupported("the driver refuses a tensor map (CUresult " + std::to_string(result) + ")");
}

}  // namespace tilewise
