// Every row of the CPU against float64: the problem files, then problems at random.
#include "common.h"

namespace tilewise {
namespace {

std::vector<std::string> lines_of(const std::string& file) {
  std::ifstream input(std::string(TW_PROBLEMS) + "/" + file);
  std::vector<std::string> lines;
  for (std::string line; std::getline(input, line);)
    if (!line.empty() && line[0] != '#') lines.push_back(line);
  return lines;
}

void verify_file(const std::string& file, size_t share, size_t shares) {
  const std::vector<std::string> lines = lines_of(file);
  ASSERT_GT(lines.size(), 10u);
  for (size_t n = share; n < lines.size(); n += shares)
    expect_pass(parse(lines[n]), n, n % 2 ? reference::random_layout(n) : reference::Layout::kBshd);
}

void fuzz(uint64_t first, uint64_t last, double max_products) {
  reference::FuzzLimits limits;
  limits.max_products = max_products;
  for (uint64_t seed = first; seed < last; ++seed)
    expect_pass(reference::random_problem(seed, limits), seed, reference::random_layout(seed));
}

struct Problems : Cpu {};

TEST_P(Problems, SmokeProblemsInEveryLayout) {
  uint64_t seed = 0;
  for (const std::string& line : lines_of("smoke.txt"))
    for (auto layout : {reference::Layout::kBshd, reference::Layout::kBhsd, reference::Layout::kGaps, reference::Layout::kPermuted})
      expect_pass(parse(line), seed++, layout);
}
TEST_P(Problems, CiProblems) { verify_file("ci.txt", 0, 1); }
TEST_P(Problems, FullProblems1) { verify_file("full.txt", 0, 2); }
TEST_P(Problems, FullProblems2) { verify_file("full.txt", 1, 2); }
TEST_P(Problems, Fuzz) { fuzz(0, 400, 5e4); }
TEST_P(Problems, LongFuzzOfSmallProblems) { fuzz(10'000, 11'500, 2e4); }
TEST_P(Problems, LongFuzzOfLargerProblems) { fuzz(20'000, 20'200, 1e6); }

INSTANTIATE_TEST_SUITE_P(Isa, Problems, testing::ValuesIn(isas()), isa_name);

}  // namespace
}  // namespace tilewise
