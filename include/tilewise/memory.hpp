// Memory of a device, for tools and tests that serve every backend without its headers.
#pragma once

#include "tilewise/tilewise.hpp"

namespace tilewise {

// Owns memory of a device, aligned to 256 bytes. Contents are undefined at first.
class TW_API Buffer {
 public:
  Buffer() = default;
  static Result<Buffer> make(const Device& device, size_t bytes);
  void* data() const { return data_.get(); }
  size_t size() const { return bytes_; }
  // Both are done when they return. What other streams of a device still do is not waited for.
  Status copy_from_host(const void* source, size_t bytes, size_t offset = 0);
  Status copy_to_host(void* target, size_t bytes, size_t offset = 0) const;

 private:
  Device device_;
  std::shared_ptr<void> data_;
  size_t bytes_ = 0;
};

// What of the device's memory nobody has taken now, as its system tells.
TW_API Result<int64_t> free_bytes(const Device& device);

// Waits until all work given to the device is done. A CPU's is done when run() returns.
TW_API Status synchronize(const Device& device);

}  // namespace tilewise
