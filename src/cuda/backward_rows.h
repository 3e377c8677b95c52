// The rows of the Hopper backward kernels: one shape for each head dimension, each made for two element types, with and without
// modified scores. A shape is tuned by measurement: figures and what lost are in docs/kernels/backward_sm90.md.
#pragma once

#include <array>
#include <cstddef>

#include "cuda/kernels/gradient_params.h"

namespace tilewise::cuda {

// element and modified are filled in per row.
#define TW_BACKWARD_SHAPE(name, ...)                     \
  struct name {                                          \
    static constexpr BackwardConfig kShape{__VA_ARGS__}; \
  };
TW_BACKWARD_SHAPE(Backward64, .head_dim = 64, .head_dim_v = 64, .block_m = 128, .mains = 2, .stages = 3, .dq_columns = 64,
                  .main_registers = 208, .dq_registers = 64, .addends = true, .pace = 1)
TW_BACKWARD_SHAPE(Backward96, .head_dim = 96, .head_dim_v = 96, .block_m = 64, .mains = 2, .stages = 3, .dq_columns = 96,
                  .main_registers = 192, .dq_registers = 96, .addends = true)
TW_BACKWARD_SHAPE(Backward128, .head_dim = 128, .head_dim_v = 128, .block_m = 64, .mains = 2, .stages = 3, .dq_columns = 64,
                  .main_registers = 208, .dq_registers = 64, .addends = true)
TW_BACKWARD_SHAPE(Backward192x128, .head_dim = 192, .head_dim_v = 128, .block_m = 64, .mains = 2, .stages = 3, .dq_columns = 64,
                  .main_registers = 208, .dq_registers = 64, .pair = true)
TW_BACKWARD_SHAPE(Backward192, .head_dim = 192, .head_dim_v = 192, .block_m = 64, .mains = 2, .stages = 3, .dq_columns = 64,
                  .main_registers = 208, .dq_registers = 64, .pair = true)
TW_BACKWARD_SHAPE(Backward256, .head_dim = 256, .head_dim_v = 256, .block_m = 64, .mains = 2, .stages = 2, .dq_columns = 64,
                  .main_registers = 208, .dq_registers = 64, .pair = true)
#undef TW_BACKWARD_SHAPE

struct BackwardRow {
  BackwardConfig config;
  size_t shared_bytes;
  const void *function, *preprocess, *rest, *postprocess;
};

// bf16, bf16 modified, fp16, fp16 modified. Defined in backward_rows.cu, which is compiled once for each shape.
template <class Shape>
std::array<BackwardRow, 4> backward_rows();

}  // namespace tilewise::cuda
