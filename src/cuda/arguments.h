// Tensors of the caller as the kernels take them, and what sm_90 kernels cannot take, in sentences.
#pragma once

#include <string>

#include "cuda/kernels/params.h"
#include "cuda/tensor_map.h"
#include "tilewise/tilewise.hpp"

namespace tilewise::cuda {

// "head_dim 80 is above 64", "head_dim 20 is not a multiple of 8: ...".
inline std::string refuse_dim(const char* name, int64_t dim, int largest) {
  const std::string text = std::string(name) + " " + std::to_string(dim);
  if (dim % 8 != 0) return text + " is not a multiple of 8: pad it with zeros and give softmax_scale";
  return dim > largest ? text + " is above " + std::to_string(largest) : std::string();
}

// [batch, rows, heads, columns], or packed [rows, heads, columns], for plain loads and for the copy engine.
inline Elements elements(const TensorView& t) {
  if (t.rank == 3) return {t.data, 0, t.stride[0], t.stride[1]};
  return {t.data, t.stride[0], t.stride[1], t.stride[2]};
}
inline MapSource map_source(const TensorView& t, bool bfloat16) {
  if (t.rank == 3) return {t.data, bfloat16, 1, t.shape[0], t.shape[1], t.shape[2], 0, t.stride[0], t.stride[1]};
  return {t.data, bfloat16, t.shape[0], t.shape[1], t.shape[2], t.shape[3], t.stride[0], t.stride[1], t.stride[2]};
}

// The copy engine and 16-byte stores need rows that begin at multiples of 16 bytes. Tensors whose rows do not are refused and not packed
// into workspace first: strides are known in run() only, so that every plan would have to reserve a copy of q, k, v and o.
inline Status check_rows(const char* name, const TensorView& t) {
  const auto refused = [&](const std::string& what, const std::string& rule) {
    return unsupported(std::string(name) + what + ", but " + rule + " for sm_90 kernels: copy " + name +
                       " to a tensor whose rows are padded to a multiple of 8 elements");
  };
  const std::string aligned = "every row must begin at a multiple of 16 bytes";
  if (const uintptr_t past = reinterpret_cast<uintptr_t>(t.data) % 16; past != 0)
    return refused(" begins " + std::to_string(past) + " bytes past a multiple of 16", aligned);
  for (size_t i = 0; i + 1 < static_cast<size_t>(t.rank); ++i) {
    if (t.shape[i] <= 1) continue;
    const auto stride = [&] { return " has stride " + std::to_string(t.stride[i]) + " in its dimension " + std::to_string(i); };
    if (t.stride[i] < 0 || t.stride[i] >= int64_t{1} << 39) return refused(stride(), "strides must lie between 0 and 2^39 elements");
    if (t.stride[i] % 8 != 0) return refused(stride() + ", which is " + std::to_string(2 * t.stride[i]) + " bytes", aligned);
  }
  return {};
}

}  // namespace tilewise::cuda
