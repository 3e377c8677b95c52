// Devices and their memory, served by whichever backend owns the device.
#include <algorithm>
#include <cstdint>

#include "registry/kernel.h"
#include "tilewise/memory.hpp"

namespace tilewise {

TensorView TensorView::contiguous(const void* data, DataType dtype, std::initializer_list<int64_t> shape) {
  TensorView view;
  view.data = const_cast<void*>(data);
  view.dtype = dtype;
  view.rank = static_cast<int>(shape.size());  // more than four dimensions are refused wherever the view is used
  std::copy_n(shape.begin(), std::min(shape.size(), view.shape.size()), view.shape.begin());
  int64_t stride = 1;
  for (size_t i = std::min(shape.size(), view.shape.size()); i-- > 0; stride *= std::max<int64_t>(view.shape[i], 1))
    view.stride[i] = stride;
  return view;
}

Result<Device> Device::cuda(int index) {
  if (index < 0) return invalid_argument("Device::cuda(" + std::to_string(index) + "): index " + std::to_string(index) + " is negative");
  const Backend& backend = cuda_backend();
  const std::vector<Device> devices = backend.devices();
  for (const Device& device : devices) {
    if (device.index == index) return device;
  }
  return unavailable("CUDA device " + std::to_string(index) + " is not there: " +
                     (backend.kernels().empty() ? kNoCuda
                      : devices.empty()         ? "this machine has no GPU, or no driver that serves it (580 or newer)"
                                                : "this machine has " + std::to_string(devices.size()) + ", numbered from 0"));
}

std::vector<Device> Device::all() {
  std::vector<Device> devices = cpu_backend().devices();
  for (Device& device : cuda_backend().devices()) devices.push_back(std::move(device));
  return devices;
}

Result<Buffer> Buffer::make(const Device& device, size_t bytes) {
  Buffer buffer;
  buffer.device_ = device;
  buffer.bytes_ = bytes;
  if (bytes == 0) return buffer;
  void* data = backend_of(device.type).allocate(device, bytes);
  if (!data) return unavailable(std::to_string(bytes) + " bytes of memory are not available on device " + device.name);
  buffer.data_ = std::shared_ptr<void>(data, [device](void* p) { backend_of(device.type).release(device, p); });
  return buffer;
}

namespace {
Status check_range(size_t bytes, size_t offset, size_t size) {
  if (offset <= size && bytes <= size - offset) return {};
  return invalid_argument(std::to_string(bytes) + " bytes at offset " + std::to_string(offset) + " do not lie in a buffer of " +
                          std::to_string(size) + " bytes");
}
}  // namespace

Status Buffer::copy_from_host(const void* source, size_t bytes, size_t offset) {
  if (Status status = check_range(bytes, offset, bytes_); !status.ok()) return status;
  if (bytes == 0) return {};
  return backend_of(device_.type).copy(device_, static_cast<char*>(data_.get()) + offset, source, bytes, false);
}

Status Buffer::copy_to_host(void* target, size_t bytes, size_t offset) const {
  if (Status status = check_range(bytes, offset, bytes_); !status.ok()) return status;
  if (bytes == 0) return {};
  return backend_of(device_.type).copy(device_, target, static_cast<const char*>(data_.get()) + offset, bytes, true);
}

Result<int64_t> free_bytes(const Device& device) { return backend_of(device.type).free_bytes(device); }

Status synchronize(const Device& device) { return backend_of(device.type).synchronize(device); }

}  // namespace tilewise
