// Tensors of the caller as the kernels take them, what sm_90 kernels cannot take, in sentences, and what both tables ask of CUDA.
#pragma once

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/backend.h"
#include "cuda/kernels/params.h"
#include "cuda/tensor_map.h"
#include "tilewise/tilewise.hpp"

namespace tilewise::cuda {

// What no row takes. All say it in the same words, so that the planner says it once.
inline std::string refuse_everywhere(const Problem& p, const Device& device) {
  if (device.arch != "sm_90") return "device.arch " + device.arch + " is not sm_90, which all GPU kernels are for";
  if (p.dtype != DataType::kBFloat16 && p.dtype != DataType::kFloat16) return "dtype fp32 is neither bf16 nor fp16, which GPU kernels take";
  for (const auto& [name, dim, advice] :
       {std::tuple("head_dim ", p.head_dim, " and give softmax_scale"), std::tuple("head_dim_v ", p.head_dim_v, "")}) {
    const std::string text = name + std::to_string(dim);
    if (dim > 256) return text + " is above 256, the largest of all GPU kernels";
    if (dim % 8 != 0) return text + " is not a multiple of 8, which GPU kernels need: pad it with zeros" + advice;
  }
  return {};
}

// Whether there is a row, so that the copy engine may ask for one. A tensor without any need not be given, and its rank is 0 then.
inline bool has_rows(const TensorView& t) { return t.rank >= 3 && t.shape[t.rank - 3] > 0; }

// What a row for these dimensions, with this much shared memory, cannot take.
inline std::string refuse_shape(int head_dim, int head_dim_v, size_t shared_bytes, ptx::Element element, const Problem& p,
                                const Device& device) {
  if (std::string reason = refuse_everywhere(p, device); !reason.empty()) return reason;
  if (static_cast<int64_t>(shared_bytes) > device.desk_bytes)
    return "needs " + std::to_string(shared_bytes) + " bytes of shared memory, the device has " + std::to_string(device.desk_bytes);
  const bool bfloat16 = element == ptx::Element::kBFloat16;
  if (p.dtype != (bfloat16 ? DataType::kBFloat16 : DataType::kFloat16))
    return std::string("takes ") + (bfloat16 ? "bf16" : "fp16") + " only";
  if (p.head_dim > head_dim) return "head_dim " + std::to_string(p.head_dim) + " is above " + std::to_string(head_dim);
  if (p.head_dim_v > head_dim_v) return "head_dim_v " + std::to_string(p.head_dim_v) + " is above " + std::to_string(head_dim_v);
  return {};
}

// CUDA loads a kernel at its first use, which takes memory and may wait for others: a plan loads a row's kernels, once per device (`loaded`
// has a bit for each of the first 64), and allows the first of them its shared memory. A device that is only described, and not there, has
// none to load.
inline Status prepare(std::atomic<uint64_t>& loaded, const Device& device, size_t shared_bytes,
                      std::initializer_list<const void*> kernels) {
  const uint64_t bit = static_cast<unsigned>(device.index) < 64 ? uint64_t{1} << device.index : 0;
  if (loaded.load(std::memory_order_relaxed) & bit) return {};
  const std::vector<Device> there = devices();
  const auto same = [&](const Device& other) { return other.index == device.index && other.arch == device.arch; };
  if (std::none_of(there.begin(), there.end(), same)) return {};
  const Current current(device);
  if (Status status = status_of(current.error(), "cudaSetDevice"); !status.ok()) return status;
  for (const void* kernel : kernels) {
    cudaFuncAttributes attributes;
    if (Status status = status_of(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes"); !status.ok()) return status;
  }
  const cudaError_t error =
      cudaFuncSetAttribute(*kernels.begin(), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (Status status = status_of(error, "cudaFuncSetAttribute"); !status.ok()) return status;
  loaded.fetch_or(bit, std::memory_order_relaxed);
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
  const auto refused = [&](const std::string& what, const std::string& rule, const std::string& target) {
    return unsupported(std::string(name) + what + ", but " + rule + " for sm_90 kernels: copy " + name + " to a " + target);
  };
  const std::string aligned = "every row must begin at a multiple of 16 bytes";
  const std::string padded = "tensor whose rows are padded to a multiple of " + std::to_string(16 / bytes) + " elements";
  if (const uintptr_t past = reinterpret_cast<uintptr_t>(t.data) % 16; past != 0)
    return refused(" begins " + std::to_string(past) + " bytes past a multiple of 16", aligned, padded);
  for (size_t i = 0; i + 1 < static_cast<size_t>(t.rank); ++i) {
    if (t.shape[i] <= 1) continue;
    const auto stride = [&] { return " has stride " + std::to_string(t.stride[i]) + " in its dimension " + std::to_string(i); };
    if (t.stride[i] < 0 || t.stride[i] >= int64_t{1} << 39)
      return refused(stride(), "strides must lie between 0 and 2^39 elements", "contiguous tensor");
    if (t.stride[i] * bytes % 16 != 0)
      return refused(stride() + ", which is " + std::to_string(t.stride[i] * bytes) + " bytes", aligned, padded);
  }
  return {};
}
inline Status check_rows(std::initializer_list<std::pair<const char*, const TensorView*>> tensors) {
  for (const auto& [name, view] : tensors)
    if (Status status = check_rows(name, *view); !status.ok()) return status;
  return {};
}

}  // namespace tilewise::cuda
