#include "files.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>

namespace tilewise::files {
namespace {

std::string os_error() { return std::strerror(errno); }

Status cannot_write(const std::string& path, const std::string& why) {
  return invalid_argument(fmt::format("{} cannot be written: {}", path, why));
}

// Where a rename would put the file: through a symbolic link, to what it names.
std::filesystem::path resolved(const std::string& path) {
  std::error_code ignored;
  return std::filesystem::is_symlink(path, ignored) ? std::filesystem::weakly_canonical(path, ignored) : std::filesystem::path(path);
}
std::filesystem::path folder_of(const std::filesystem::path& path) { return path.has_parent_path() ? path.parent_path() : "."; }

// False with errno set where not all of it could be written.
bool write_all(int descriptor, std::string_view piece) {
  while (!piece.empty()) {
    const ssize_t put = ::write(descriptor, piece.data(), std::min<size_t>(piece.size(), 1 << 30));
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) return false;
    piece.remove_prefix(static_cast<size_t>(put));
  }
  return true;
}

}  // namespace

Status check_writable(const std::string& path) {
  const auto target = resolved(path);
  if (!target.has_filename()) return cannot_write(path, "not a file name");
  std::error_code error;
  const auto state = std::filesystem::status(target, error);
  if (std::filesystem::exists(state) && !std::filesystem::is_regular_file(state)) return cannot_write(path, "not a regular file");
  if (::access(folder_of(target).c_str(), W_OK | X_OK) != 0) return cannot_write(path, os_error());
  return {};
}

Status write(const std::string& path, const std::vector<std::string_view>& pieces) {
  if (Status status = check_writable(path); !status.ok()) return status;
  const auto target = resolved(path);
  const std::string part = folder_of(target) / fmt::format(".{}.{}.part", target.filename().string(), ::getpid());
  int descriptor = ::open(folder_of(target).c_str(), O_WRONLY | O_TMPFILE | O_CLOEXEC, 0666);
  const bool nameless = descriptor >= 0;
  if (!nameless) descriptor = ::open(part.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0666);
  if (descriptor < 0) return cannot_write(path, os_error());
  bool ok = std::all_of(pieces.begin(), pieces.end(), [&](std::string_view piece) { return write_all(descriptor, piece); });
  ok = ok && ::fsync(descriptor) == 0;
  // A link replaces no file, so a nameless file goes through a name of its own as well, but complete.
  if (ok && nameless)
    ok = ::linkat(AT_FDCWD, fmt::format("/proc/self/fd/{}", descriptor).c_str(), AT_FDCWD, part.c_str(), AT_SYMLINK_FOLLOW) == 0;
  std::string why = ok ? "" : os_error();
  if (::close(descriptor) != 0 && ok) ok = false, why = os_error();
  if (ok && ::rename(part.c_str(), target.c_str()) != 0) ok = false, why = os_error();
  if (!ok) {
    ::unlink(part.c_str());
    return cannot_write(path, why);
  }
  // The rename itself reaches the disk with its folder; a file system that cannot do this has the file all the same.
  if (const int folder = ::open(folder_of(target).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); folder >= 0) {
    ::fsync(folder);
    ::close(folder);
  }
  return {};
}

}  // namespace tilewise::files
