// The rows of the Hopper forward kernel: one shape for each head dimension, each made for two element types, with and without
// modified scores. A shape is tuned by measurement: figures and what lost are in docs/kernels/forward_sm90.md.
#pragma once

#include <array>
#include <cstddef>

#include "cuda/kernels/params.h"

namespace tilewise::cuda {

// element and modified are filled in per row.
#define TW_FORWARD_SHAPE(name, ...)                     \
  struct name {                                         \
    static constexpr ForwardConfig kShape{__VA_ARGS__}; \
  };
TW_FORWARD_SHAPE(Forward64Short, .head_dim = 64, .head_dim_v = 64, .consumers = 4, .block_n = 64, .k_stages = 8, .v_stages = 8,
                 .q_slots = 8, .o_slots = 4)
TW_FORWARD_SHAPE(Forward64Pair, .head_dim = 64, .head_dim_v = 64, .consumers = 2, .block_n = 128, .k_stages = 4, .v_stages = 4,
                 .q_slots = 4, .o_slots = 2)
TW_FORWARD_SHAPE(Forward64, .head_dim = 64, .head_dim_v = 64, .consumers = 3, .block_n = 128, .k_stages = 4, .v_stages = 4, .q_slots = 6,
                 .o_slots = 3)
TW_FORWARD_SHAPE(Forward96, .head_dim = 96, .head_dim_v = 96, .consumers = 2, .block_n = 128, .k_stages = 2, .v_stages = 2, .q_slots = 4,
                 .o_slots = 2)
TW_FORWARD_SHAPE(Forward128, .head_dim = 128, .head_dim_v = 128, .consumers = 2, .block_n = 128, .k_stages = 2, .v_stages = 2, .q_slots = 4,
                 .o_slots = 2)
TW_FORWARD_SHAPE(Forward192x128, .head_dim = 192, .head_dim_v = 128, .consumers = 2, .block_n = 128, .k_stages = 2, .v_stages = 2,
                 .q_slots = 2, .o_slots = 1)
TW_FORWARD_SHAPE(Forward192, .head_dim = 192, .head_dim_v = 192, .consumers = 2, .block_n = 96, .k_stages = 2, .v_stages = 2, .q_slots = 2,
                 .o_slots = 1)
TW_FORWARD_SHAPE(Forward256, .head_dim = 256, .head_dim_v = 256, .consumers = 2, .block_n = 64, .k_stages = 2, .v_stages = 2, .q_slots = 2,
                 .o_slots = 1)
#undef TW_FORWARD_SHAPE

struct ForwardRow {
  ForwardConfig config;
  size_t shared_bytes;
  const void* function;
};

// bf16, bf16 modified, fp16, fp16 modified. Defined in forward_rows.cu, which is compiled once for each shape.
template <class Shape>
std::array<ForwardRow, 4> forward_rows();

}  // namespace tilewise::cuda
