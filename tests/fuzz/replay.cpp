// Runs a fuzz target without a fuzzer: `program folder count` feeds it every file of the folder, then `count` mutations
// that follow from a fixed seed. A target that finds a fault aborts.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

void feed(const std::string& bytes) { LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()); }

// One small change: flip, overwrite, cut, double, swap in a piece of another input or an interesting number.
void mutate(std::string& bytes, const std::string& other, std::mt19937_64& random) {
  const auto below = [&](size_t n) { return n ? random() % n : 0; };
  const size_t at = below(bytes.size()), length = below(std::min<size_t>(bytes.size() - at, 16)) + 1;
  const char* const numbers[] = {"0", "-1", "1", "18446744073709551615", "9223372036854775807", "2147483648", "1e9", "nan"};
  switch (random() % 6) {
    case 0:
      if (!bytes.empty()) bytes[at] = static_cast<char>(bytes[at] ^ 1 << below(8));
      break;
    case 1:
      if (!bytes.empty()) bytes[at] = static_cast<char>(random());
      break;
    case 2:
      bytes.erase(at, length);
      break;
    case 3:
      bytes.insert(at, bytes.substr(at, length));
      break;
    case 4:
      bytes.replace(at, length, other.substr(below(other.size()), length));
      break;
    case 5:
      bytes.replace(at, std::min<size_t>(length, 4), numbers[below(std::size(numbers))]);
      break;
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  std::vector<std::filesystem::path> paths;
  for (const auto& entry : std::filesystem::directory_iterator(argv[1])) paths.push_back(entry.path());
  std::sort(paths.begin(), paths.end());
  std::vector<std::string> seeds;
  for (const auto& path : paths) {
    std::ifstream file(path, std::ios::binary);
    seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    feed(seeds.back());
  }
  if (seeds.empty()) return 2;
  std::mt19937_64 random(1);
  const int count = std::atoi(argv[2]);
  for (int n = 0; n < count; ++n) {
    std::string bytes = seeds[random() % seeds.size()];
    for (uint64_t changes = 1 + random() % 4; changes > 0; --changes) mutate(bytes, seeds[random() % seeds.size()], random);
    feed(bytes);
  }
  std::printf("%zu seeds and %d mutations\n", seeds.size(), count);
}
