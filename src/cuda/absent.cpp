// The CUDA backend of a build without CUDA: no devices, no kernels.
#include "registry/kernel.h"

namespace tilewise {
namespace {
Status absent() { return unavailable(kNoCuda); }
}  // namespace

const Backend& cuda_backend() {
  static const Backend kBackend{
      .type = DeviceType::kCuda,
      .devices = [] { return std::vector<Device>(); },
      .kernels = []() -> const std::vector<Kernel>& {
        static const std::vector<Kernel> kNone;
        return kNone;
      },
      .measure_rates = [](const Device&, DataType) -> Result<Rates> { return absent(); },
      .allocate = [](const Device&, size_t) -> void* { return nullptr; },
      .release = [](const Device&, void*) {},
      .free_bytes = [](const Device&) -> Result<int64_t> { return absent(); },
      .copy = [](const Device&, void*, const void*, size_t, bool) { return absent(); },
      .synchronize = [](const Device&) { return absent(); },
  };
  return kBackend;
}

}  // namespace tilewise
