// Tensors of the caller as the kernels take them, what sm_90 kernels cannot take, in sentences, and what both tables ask of CUDA.
#pragma once

#include <atomic>
#include <initializer_list>
#include <string>
#include <utility>

#include "cuda/backend.h"
#include "cuda/kernels/params.h"
#include "cuda/tensor_map.h"
#include "tilewise/tilewise.hpp"

namespace tilewise::cuda {

// "head_dim 80 is above 64", "head_dim 20 is not a multiple of 8: ...".
inline std::string refuse_dim(const char* name, int64_t dim, int largest) {
  const std::string text = std::string(name) + " " + std::to_string(dim);
  if (dim > 256) return text + " is above 256, the largest of all kernels";
  if (dim % 8 != 0)
    return text + " is not a multiple of 8: pad it with zeros" + (name == std::string("head_dim") ? " and give softmax_scale" : "");
  return dim > largest ? text + " is above " + std::to_string(largest) : std::string();
}

// What every row asks of the device and the element type.
inline std::string refuse_device(size_t shared_bytes, ptx::Element element, const Problem& p, const Device& device) {
  if (device.arch != "sm_90") return "needs sm_90, the device has " + device.arch;
  if (static_cast<int64_t>(shared_bytes) > device.desk_bytes)
    return "needs " + std::to_string(shared_bytes) + " bytes of shared memory, the device has " + std::to_string(device.desk_bytes);
  const bool bfloat16 = element == ptx::Element::kBFloat16;
  if (p.dtype != (bfloat16 ? DataType::kBFloat16 : DataType::kFloat16))
    return std::string("takes ") + (bfloat16 ? "bf16" : "fp16") + " only";
  return {};
}

// More than 48 KB of shared memory must be asked for once per device: `allowed` has a bit for each of the first 64.
inline Status allow_shared(std::atomic<uint64_t>& allowed, const void* function, size_t bytes, const Device& device) {
  const uint64_t bit = uint64_t{1} << (device.index % 64);
  if (device.index < 64 && allowed.load(std::memory_order_relaxed) & bit) return {};
  const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (Status status = status_of(error, "cudaFuncSetAttribute"); !status.ok()) return status;
  if (device.index < 64) allowed.fetch_or(bit, std::memory_order_relaxed);
  return {};
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
  const int64_t bytes = t.dtype == DataType::kFloat32 ? 4 : 2;
  const auto refused = [&](const std::string& what, const std::string& rule) {
    return unsupported(std::string(name) + what + ", but " + rule + " for sm_90 kernels: copy " + name +
                       " to a tensor whose rows are padded to a multiple of " + std::to_string(16 / bytes) + " elements");
  };
  const std::string aligned = "every row must begin at a multiple of 16 bytes";
  if (const uintptr_t past = reinterpret_cast<uintptr_t>(t.data) % 16; past != 0)
    return refused(" begins " + std::to_string(past) + " bytes past a multiple of 16", aligned);
  for (size_t i = 0; i + 1 < static_cast<size_t>(t.rank); ++i) {
    if (t.shape[i] <= 1) continue;
    const auto stride = [&] { return " has stride " + std::to_string(t.stride[i]) + " in its dimension " + std::to_string(i); };
    if (t.stride[i] < 0 || t.stride[i] >= int64_t{1} << 39) return refused(stride(), "strides must lie between 0 and 2^39 elements");
    if (t.stride[i] * bytes % 16 != 0) return refused(stride() + ", which is " + std::to_string(t.stride[i] * bytes) + " bytes", aligned);
  }
  return {};
}
inline Status check_rows(std::initializer_list<std::pair<const char*, const TensorView*>> tensors) {
  for (const auto& [name, view] : tensors)
    if (Status status = check_rows(name, *view); !status.ok()) return status;
  return {};
}

}  // namespace tilewise::cuda
