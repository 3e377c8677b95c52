// The safetensors reader on arbitrary bytes as a file: what it accepts tiles the file's data without overlap or hole.
#include "safetensors.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <string>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const int file = ::memfd_create("fuzz", 0);
  static const std::string path = "/proc/self/fd/" + std::to_string(file);
  if (file < 0 || ::ftruncate(file, 0) != 0 || ::pwrite(file, data, size, 0) != static_cast<ssize_t>(size)) std::abort();
  const auto opened = tilewise::safetensors::File::open(path);
  if (!opened) {
    const std::string message = opened.status().message();
    if (message.empty() || message.find('\n') != message.npos) std::abort();
    return 0;
  }
  uint64_t header_bytes = 0, covered = 0;
  for (int byte = 7; byte >= 0; --byte) header_bytes = header_bytes << 8 | data[byte];
  std::string bytes;
  for (const auto& [name, entry] : opened->header().tensors) {
    bytes.resize(entry.end - entry.begin);
    if (!opened->read(entry, bytes.data()).ok()) std::abort();
    if (bytes.compare(0, bytes.size(), reinterpret_cast<const char*>(data) + 8 + header_bytes + entry.begin, bytes.size()) != 0)
      std::abort();
    covered += bytes.size();
  }
  if (covered + header_bytes + 8 != size) std::abort();
  return 0;
}
