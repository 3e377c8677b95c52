// The header is read event by event, so a hostile one costs memory in proportion to its size and no recursion.
#include "safetensors.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <tuple>

#include "files.h"

namespace tilewise::safetensors {
namespace {

static_assert(std::endian::native == std::endian::little, "the format is little-endian");

using Json = nlohmann::json;

std::optional<uint64_t> element_bytes(std::string_view dtype) {
  constexpr std::array<std::pair<std::string_view, int>, 15> kSizes = {{{"BOOL", 1},
                                                                        {"U8", 1},
                                                                        {"I8", 1},
                                                                        {"F8_E4M3", 1},
                                                                        {"F8_E5M2", 1},
                                                                        {"U16", 2},
                                                                        {"I16", 2},
                                                                        {"F16", 2},
                                                                        {"BF16", 2},
                                                                        {"U32", 4},
                                                                        {"I32", 4},
                                                                        {"F32", 4},
                                                                        {"U64", 8},
                                                                        {"I64", 8},
                                                                        {"F64", 8}}};
  for (const auto& [name, bytes] : kSizes)
    if (name == dtype) return bytes;
  return std::nullopt;
}

std::string os_error() { return std::strerror(errno); }

// The grammar of the header: {"name": {"dtype": string, "shape": [unsigned...], "data_offsets": [unsigned, unsigned]}, ...
// "__metadata__": {string: string, ...}}. Every method returns false, with a sentence in `problem`, where it is broken.
class HeaderReader : public Json::json_sax_t {
 public:
  Header header;
  std::string problem;

  bool start_object(size_t) override {
    if (depth_ == 0) return ++depth_;
    if (depth_ != 1) return fail("nests deeper than the format");
    in_metadata_ = name_ == "__metadata__";
    seen_.clear();
    return ++depth_;
  }
  bool end_object() override {
    if (depth_-- == 2 && !in_metadata_)
      for (const std::string_view field : {"dtype", "shape", "data_offsets"})
        if (std::find(seen_.begin(), seen_.end(), field) == seen_.end()) return fail(fmt::format("has no {}", field));
    return true;
  }
  bool key(std::string& text) override {
    if (depth_ == 1) {
      name_ = text;
      if (name_ == "__metadata__") return std::exchange(has_metadata_, true) ? fail("is given twice") : true;
      return header.tensors.try_emplace(name_).second ? true : fail("is given twice");
    }
    field_ = text;
    if (in_metadata_) return header.metadata.try_emplace(text).second ? true : fail(fmt::format("has {} twice", printable(text)));
    if (text != "dtype" && text != "shape" && text != "data_offsets") return fail(fmt::format("has the unknown field {}", printable(text)));
    if (std::find(seen_.begin(), seen_.end(), text) != seen_.end()) return fail(fmt::format("has {} twice", text));
    seen_.push_back(text);
    return true;
  }
  bool string(std::string& text) override {
    if (depth_ == 2 && in_metadata_) return header.metadata[field_] = text, true;
    if (depth_ == 2 && field_ == "dtype") return entry().dtype = text, true;
    return unexpected();
  }
  bool start_array(size_t) override {
    if (depth_ != 2 || in_metadata_ || field_ == "dtype") return unexpected();
    offsets_ = 0;
    return ++depth_;
  }
  bool end_array() override {
    --depth_;
    return field_ == "data_offsets" && offsets_ != 2 ? fail("needs two data_offsets") : true;
  }
  bool number_unsigned(uint64_t value) override {
    if (depth_ != 3) return unexpected();
    if (value > INT64_MAX) return fail(fmt::format("has {} {}, more than 2^63 - 1", field_, value));
    if (field_ == "shape") {
      if (entry().shape.size() == kMaxRank) return fail(fmt::format("has more than {} dimensions", kMaxRank));
      return entry().shape.push_back(static_cast<int64_t>(value)), true;
    }
    if (offsets_ == 2) return fail("needs two data_offsets");
    (offsets_++ == 0 ? entry().begin : entry().end) = value;
    return true;
  }
  bool number_integer(int64_t value) override {
    return depth_ == 3 ? fail(fmt::format("has {} {}, less than 0", field_, value)) : unexpected();
  }
  bool number_float(double, const std::string&) override {
    return depth_ == 3 ? fail(fmt::format("has a {} that is no 64-bit integer", field_)) : unexpected();
  }
  bool null() override { return unexpected(); }
  bool boolean(bool) override { return unexpected(); }
  bool binary(Json::binary_t&) override { return unexpected(); }
  bool parse_error(size_t position, const std::string&, const Json::exception&) override {
    problem = fmt::format("the header is not JSON at its byte {}", position);
    return false;
  }

 private:
  Entry& entry() { return header.tensors[name_]; }
  bool fail(const std::string& what) {
    problem = fmt::format("tensor {} {}", printable(name_), what);
    return false;
  }
  bool unexpected() {
    if (depth_ == 0) return problem = "the header is not a JSON object", false;
    if (depth_ == 1) return fail("is not described by a JSON object");
    return fail(fmt::format("has a {} of the wrong kind", in_metadata_ ? printable(field_) : field_));
  }

  int depth_ = 0;  // 1: among the names, 2: in a tensor or the metadata, 3: in an array
  int offsets_ = 0;
  bool in_metadata_ = false, has_metadata_ = false;
  std::string name_, field_;
  std::vector<std::string> seen_;
};

Status check_entries(const Header& header, uint64_t data_bytes) {
  std::vector<std::tuple<uint64_t, uint64_t, const std::string*>> ranges;
  for (const auto& [name, entry] : header.tensors) {
    const auto element = element_bytes(entry.dtype);
    if (!element) return invalid_argument(fmt::format("tensor {} has the unknown dtype {}", printable(name), printable(entry.dtype)));
    uint64_t bytes = *element;
    for (const int64_t size : entry.shape)
      if (__builtin_mul_overflow(bytes, static_cast<uint64_t>(size), &bytes))
        return invalid_argument(fmt::format("tensor {} has a shape of more than 2^64 bytes", printable(name)));
    if (entry.begin > entry.end || entry.end > data_bytes)
      return invalid_argument(fmt::format("tensor {} lies at bytes {} to {}, outside the {} bytes that the file has after its header",
                                          printable(name), entry.begin, entry.end, data_bytes));
    if (entry.end - entry.begin != bytes)
      return invalid_argument(fmt::format("tensor {} has {} bytes, but its shape and dtype {} need {}", printable(name),
                                          entry.end - entry.begin, entry.dtype, bytes));
    ranges.emplace_back(entry.begin, entry.end, &name);
  }
  std::sort(ranges.begin(), ranges.end());
  uint64_t covered = 0;
  for (const auto& [begin, end, name] : ranges) {
    if (begin < covered) return invalid_argument(fmt::format("tensor {} overlaps another tensor", printable(*name)));
    if (begin > covered) return invalid_argument(fmt::format("no tensor owns the {} bytes before {}", begin - covered, printable(*name)));
    covered = end;
  }
  if (covered != data_bytes) return invalid_argument(fmt::format("no tensor owns the last {} bytes of the file", data_bytes - covered));
  return {};
}

// False with errno set where not all of it could be read.
bool read_all(int descriptor, void* target, uint64_t bytes, uint64_t offset) {
  auto* at = static_cast<char*>(target);
  while (bytes > 0) {
    const ssize_t got = ::pread(descriptor, at, std::min<uint64_t>(bytes, 1 << 30), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got == 0) errno = EIO;  // the file became shorter while it was read
    if (got <= 0) return false;
    at += got, offset += static_cast<uint64_t>(got), bytes -= static_cast<uint64_t>(got);
  }
  return true;
}

}  // namespace

std::string printable(const std::string& name) {
  std::string text = Json(name).dump(-1, ' ', /*ensure_ascii=*/true, Json::error_handler_t::replace);
  return text.size() <= 80 ? text : text.substr(0, 76) + "...\"";
}

Result<Header> parse_header(std::string_view json, uint64_t data_bytes) {
  if (json.empty() || json.front() != '{') return invalid_argument("the header does not begin with {");
  HeaderReader reader;
  if (!Json::sax_parse(json.begin(), json.end(), &reader)) return invalid_argument(reader.problem);
  if (Status status = check_entries(reader.header, data_bytes); !status.ok()) return status;
  return std::move(reader.header);
}

File::File(File&& other) noexcept
    : path_(std::move(other.path_)),
      descriptor_(std::exchange(other.descriptor_, -1)),
      data_begin_(other.data_begin_),
      header_(std::move(other.header_)) {}
File::~File() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

Result<File> File::open(const std::string& path) {
  const auto refuse = [&](const std::string& why) { return invalid_argument(fmt::format("{}: {}", path, why)); };
  File file;
  file.path_ = path;
  // Without O_NONBLOCK opening a named pipe would wait for its writer.
  file.descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  struct stat info {};
  if (file.descriptor_ < 0 || ::fstat(file.descriptor_, &info) != 0) return refuse(os_error());
  if (!S_ISREG(info.st_mode)) return refuse("not a regular file");
  const auto file_bytes = static_cast<uint64_t>(info.st_size);
  uint64_t header_bytes = 0;
  if (file_bytes < sizeof header_bytes) return refuse(fmt::format("truncated: {} bytes are too few for a safetensors file", file_bytes));
  if (!read_all(file.descriptor_, &header_bytes, sizeof header_bytes, 0)) return refuse(os_error());
  if (header_bytes > kMaxHeaderBytes)
    return refuse(fmt::format("no safetensors file: a header of {} bytes, the limit is {}", header_bytes, kMaxHeaderBytes));
  if (header_bytes > file_bytes - sizeof header_bytes)
    return refuse(fmt::format("truncated: a header of {} bytes in a file of {}", header_bytes, file_bytes));
  std::string json(header_bytes, '\0');
  if (!read_all(file.descriptor_, json.data(), header_bytes, sizeof header_bytes)) return refuse(os_error());
  file.data_begin_ = sizeof header_bytes + header_bytes;
  Result<Header> header = parse_header(json, file_bytes - file.data_begin_);
  if (!header) return refuse(header.status().message());
  file.header_ = std::move(*header);
  return file;
}

Status File::read(const Entry& entry, void* target) const {
  if (read_all(descriptor_, target, entry.end - entry.begin, data_begin_ + entry.begin)) return {};
  return invalid_argument(fmt::format("{}: {}", path_, os_error()));
}

Status write(const std::string& path, const std::vector<Output>& tensors, const Metadata& metadata) {
  Json header = Json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  uint64_t end = 0;
  for (const Output& tensor : tensors) {
    header[tensor.name] = {{"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {end, end + tensor.bytes}}};
    end += tensor.bytes;
  }
  std::string json = header.dump();
  json.resize((json.size() + 7) / 8 * 8, ' ');  // so that the tensors begin at a multiple of 8
  const uint64_t header_bytes = json.size();

  std::vector<std::string_view> pieces{{reinterpret_cast<const char*>(&header_bytes), sizeof header_bytes}, json};
  for (const Output& tensor : tensors) pieces.emplace_back(static_cast<const char*>(tensor.data), tensor.bytes);
  return files::write(path, pieces);
}

}  // namespace tilewise::safetensors
