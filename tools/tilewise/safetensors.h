// Safetensors files: 8 bytes of header length, a JSON header, then the tensors' bytes without holes.
// Reading trusts nothing: every number is checked against the file before it is used.
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
constexpr size_t kMaxRank = 8;                     // ours: no tensor of attention comes near it

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
// Whole or not at all, as files::write().
Status write(const std::string& path, const std::vector<Output>& tensors, const Metadata& metadata);

// A name as it may be shown on a terminal: quoted, escaped, at most 80 characters.
std::string printable(const std::string& name);

}  // namespace tilewise::safetensors
