// The problem grammar: what parses is legal, and prints as a line that parses to the same.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "tilewise/tilewise.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto parsed = tilewise::Problem::parse({reinterpret_cast<const char*>(data), size});
  if (!parsed) {
    if (parsed.status().message().empty()) std::abort();
    return 0;
  }
  const std::string line = parsed->to_string();
  const auto again = tilewise::Problem::parse(line);
  if (!parsed->validate().ok() || !again || again->to_string() != line) {
    std::fprintf(stderr, "not repeatable: %s\n", line.c_str());
    std::abort();
  }
  return 0;
}
