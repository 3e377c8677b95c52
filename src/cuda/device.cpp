// NVIDIA GPUs as devices, and their memory. Where there is no driver the list is empty.
#include "cuda/backend.h"

namespace tilewise {
namespace cuda {
namespace {

int attribute(cudaDeviceAttr name, int index) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, name, index) == cudaSuccess ? value : 0;
}

std::vector<Device> find_devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return {};
  }
  std::vector<Device> found;
  for (int index = 0; index < count; ++index) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, index) != cudaSuccess) continue;
    Device device;
    device.type = DeviceType::kCuda;
    device.index = index;
    device.name = properties.name;
    device.arch = "sm_" + std::to_string(properties.major) + std::to_string(properties.minor);
    device.units = properties.multiProcessorCount;
    device.near_bytes = int64_t{4} * properties.regsPerMultiprocessor;
    device.desk_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    device.memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
    found.push_back(std::move(device));
  }
  return found;
}

void* allocate(const Device& device, size_t bytes) {
  const Current current(device);
  void* data = nullptr;
  if (current.error() == cudaSuccess && cudaMalloc(&data, bytes) == cudaSuccess) return data;
  cudaGetLastError();
  return nullptr;
}

void release(const Device& device, void* data) {
  const Current current(device);
  cudaFree(data);
}

Result<int64_t> free_bytes(const Device& device) {
  const Current current(device);
  if (Status status = status_of(current.error(), "cudaSetDevice"); !status.ok()) return status;
  size_t free = 0, total = 0;
  if (Status status = status_of(cudaMemGetInfo(&free, &total), "cudaMemGetInfo"); !status.ok()) return status;
  return static_cast<int64_t>(free);
}

Status copy(const Device& device, void* target, const void* source, size_t bytes, bool to_host) {
  const Current current(device);
  if (Status status = status_of(current.error(), "cudaSetDevice"); !status.ok()) return status;
  Status status = status_of(cudaMemcpy(target, source, bytes, to_host ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice), "cudaMemcpy");
  // To a device cudaMemcpy may return before all has arrived, which work on other streams would meet.
  if (status.ok() && !to_host) status = status_of(cudaStreamSynchronize(cudaStreamLegacy), "cudaStreamSynchronize");
  return status;
}

Status synchronize(const Device& device) {
  const Current current(device);
  if (Status status = status_of(current.error(), "cudaSetDevice"); !status.ok()) return status;
  return status_of(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

}  // namespace

CUcontext current_context() {
  static const auto get = driver_function<decltype(&cuCtxGetCurrent)>("cuCtxGetCurrent");
  CUcontext context = nullptr;
  return get && get(&context) == CUDA_SUCCESS ? context : nullptr;
}
void set_context(CUcontext context) {
  static const auto set = driver_function<decltype(&cuCtxSetCurrent)>("cuCtxSetCurrent");
  if (set) set(context);
}

std::vector<Device> devices() {
  static const std::vector<Device> kFound = find_devices();
  return kFound;
}

}  // namespace cuda

const Backend& cuda_backend() {
  static const Backend kBackend{
      .type = DeviceType::kCuda,
      .devices = cuda::devices,
      .kernels = cuda::kernels,
      .measure_rates = cuda::measure_rates,
      .allocate = cuda::allocate,
      .release = cuda::release,
      .free_bytes = cuda::free_bytes,
      .copy = cuda::copy,
      .synchronize = cuda::synchronize,
  };
  return kBackend;
}

}  // namespace tilewise
