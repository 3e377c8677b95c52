// Safetensors files: 8 bytes of header length, a JSON header, then the tensors' bytes without holes.
// Reading trusts nothing: every number is checked against the file before it is used. Writing is whole or not at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "tilewise/status.hpp"

namespace tilewise::safetensors {

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit

struct Entry {
  std::string dtype;  // "F32", "BF16", "F16", "I32", ...
  std::vector<int64_t> shape;
  uint64_t begin = 0, end = 0;  // bytes after the header
};
using Metadata = std::map<std::string, std::string>;
struct Header {
  std::map<std::string, Entry> tensors;
  Metadata metadata;
};

// Checks that the entries tile data_bytes exactly: in range, as large as their shapes, no overlap, no hole.
Result<Header> parse_header(std::string_view json, uint64_t data_bytes);

class File {
 public:
  static Result<File> open(const std::string& path);
  const Header& header() const { return header_; }
  // The bytes of one of header().tensors, to memory of any alignment.
  Status read(const Entry& entry, void* target) const;

  File(File&& other) noexcept;
  File& operator=(File&&) = delete;
  ~File();

 private:
  File() = default;
  std::string path_;
  int descriptor_ = -1;
  uint64_t data_begin_ = 0;
  Header header_;
};

struct Output {
  std::string name, dtype;
  std::vector<int64_t> shape;
  const void* data;
  size_t bytes;
};
// Writes beside `path` and renames: an existing file stays as it is until the new one is complete on the disk.
Status write(const std::string& path, const std::vector<Output>& tensors, const Metadata& metadata);
// The reason why write() would fail now, as far as that can be told without writing.
Status check_writable(const std::string& path);

// A name as it may be shown on a terminal: quoted, escaped, at most 80 characters.
std::string printable(const std::string& name);

}  // namespace tilewise::safetensors
