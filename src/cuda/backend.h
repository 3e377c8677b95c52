// What the files of this room share: a device made current for a while, and errors as values.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <string>

#include "registry/kernel.h"

namespace tilewise::cuda {

std::vector<Device> devices();
const std::vector<Kernel>& kernels();
const std::vector<Kernel>& backward_kernels();
Result<Rates> measure_rates(const Device& device, DataType dtype);

inline Status status_of(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // leaves nothing behind for the caller's own checks
  return unavailable(std::string(what) + ": " + cudaGetErrorString(error));
}

// This thread's context, null where it has none, and another in its place.
CUcontext current_context();
void set_context(CUcontext context);

// Makes a device current for this thread and puts the caller's context back. A thread that has none yet is left without: cudaSetDevice()
// of the device that it would use next makes one there, which takes hundreds of megabytes that nobody has asked for.
class Current {
 public:
  explicit Current(const Device& device) {
    int before = 0;
    error_ = cudaGetDevice(&before);
    if (error_ != cudaSuccess || before == device.index) return;
    context_ = current_context();
    error_ = cudaSetDevice(device.index);
    changed_ = error_ == cudaSuccess;
  }
  ~Current() {
    if (changed_) set_context(context_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  cudaError_t error() const { return error_; }

 private:
  CUcontext context_ = nullptr;
  bool changed_ = false;
  cudaError_t error_;
};

// A function of the driver, looked up at run time, so that the library loads where there is no driver; null where it has none.
template <class Function>
Function driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found) != cudaSuccess) return nullptr;
  return found == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(function) : nullptr;
}

}  // namespace tilewise::cuda
