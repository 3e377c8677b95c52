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

// Makes a device current for this thread and puts the caller's back.
class Current {
 public:
  explicit Current(const Device& device) : error_(cudaGetDevice(&before_)) {
    if (error_ == cudaSuccess && before_ != device.index) error_ = cudaSetDevice(device.index);
    changed_ = error_ == cudaSuccess && before_ != device.index;
  }
  ~Current() {
    if (changed_) cudaSetDevice(before_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

}  // namespace tilewise::cuda
