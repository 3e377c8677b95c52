// What the files of this room share: a device made current for a while, and errors as values.
#pragma once

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

// Of this thread: whether it has used a device, and letting go of the one it uses.
bool has_context();
void leave_context();

// Makes a device current for this thread and puts the caller's back. A thread that has used none yet is left so: to make the first device
// current for it would take hundreds of megabytes there, for a context that nobody has asked for.
class Current {
 public:
  explicit Current(const Device& device) : error_(cudaGetDevice(&before_)) {
    if (error_ != cudaSuccess || before_ == device.index) return;
    used_ = has_context();
    error_ = cudaSetDevice(device.index);
    changed_ = error_ == cudaSuccess;
  }
  ~Current() {
    if (!changed_) return;
    if (used_)
      cudaSetDevice(before_);
    else
      leave_context();
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool used_ = false, changed_ = false;
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
