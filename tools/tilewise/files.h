// Output files are written whole or not at all: an existing file stays as it is until the new one is complete on the disk,
// and a process that is killed while it writes leaves nothing (on file systems that know files without a name).
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "tilewise/status.hpp"

namespace tilewise::files {

// The pieces one after the other become the file `path`, or what a symbolic link of that name leads to.
Status write(const std::string& path, const std::vector<std::string_view>& pieces);
// The reason why write() would fail now, as far as that can be told without writing.
Status check_writable(const std::string& path);

}  // namespace tilewise::files
