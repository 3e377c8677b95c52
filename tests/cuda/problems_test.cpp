// Every row of the GPU against float64: the problem files in both 16-bit types, then problems at random.
#include <set>

#include "common.h"

namespace tilewise {
namespace {

using reference::Layout;
constexpr Layout kLayouts[] = {Layout::kBshd, Layout::kBhsd, Layout::kGaps};

std::vector<Problem> problems_of(const std::string& file, Pass pass) {
  std::ifstream input(std::string(TW_PROBLEMS) + "/" + file);
  EXPECT_TRUE(input.is_open()) << TW_PROBLEMS << "/" << file << " is not there";
  std::vector<Problem> problems;
  for (std::string line; std::getline(input, line);) {
    if (line.empty() || line[0] == '#') continue;
    const Problem problem = parse(line);
    if (problem.pass == pass) problems.push_back(problem);
  }
  return problems;
}

// Head dimensions that the rows take, and a 16-bit type.
Problem fitted(Problem problem, DataType dtype) {
  problem.dtype = dtype;
  problem.head_dim = std::min<int64_t>((problem.head_dim + 7) / 8 * 8, 256);
  problem.head_dim_v = std::min<int64_t>((problem.head_dim_v + 7) / 8 * 8, 256);
  return problem;
}

struct Problems : Cuda {
  void verify_file(const std::string& file, Pass pass) {
    uint64_t seed = 0, run = 0;
    for (const Problem& problem : problems_of(file, pass))
      for (DataType dtype : {DataType::kBFloat16, DataType::kFloat16}) {
        run += verify(fitted(problem, dtype), seed, kLayouts[seed % 3]);
        ++seed;
      }
    EXPECT_EQ(run, seed);
  }
  void fuzz(uint64_t first, uint64_t last, double max_products, Pass pass) {
    reference::FuzzLimits limits;
    limits.max_products = max_products;
    limits.max_head_dim = 256;
    limits.backward = false;
    const int units = device_.units;
    for (uint64_t seed = first; seed < last; ++seed) {
      // Two of seven on few SMs, with more to do, so that an SM goes from tile to tile as in large problems.
      const bool few = seed % 7 < 2;
      device_.units = few ? 2 + static_cast<int>(seed / 7 % 3) : units;
      limits.max_products = few ? 4 * max_products : max_products;
      Problem problem = reference::random_problem(seed, limits);
      const int64_t wide = 136 + 8 * static_cast<int64_t>(seed % 16);
      const double products = static_cast<double>(problem.batch * problem.num_heads_q * problem.seqlen_q) * problem.seqlen_k * wide;
      if (few && products < 2 * limits.max_products) problem.head_dim = problem.head_dim_v = wide;
      problem.pass = pass;
      problem.deterministic = pass == Pass::kBackward && seed % 5 == 0;
      problem.accumulate = pass == Pass::kBackward && seed % 6 == 0;
      EXPECT_TRUE(verify(fitted(problem, seed % 2 ? DataType::kBFloat16 : DataType::kFloat16), seed, kLayouts[seed % 3]));
    }
  }
};

TEST_F(Problems, SmokeProblems) { verify_file("smoke.txt", Pass::kForward); }
TEST_F(Problems, CiProblems) { verify_file("ci.txt", Pass::kForward); }
TEST_F(Problems, FullProblems) { verify_file("full.txt", Pass::kForward); }
TEST_F(Problems, Fuzz) { fuzz(0, 300, 2e5, Pass::kForward); }
TEST_F(Problems, LongFuzz) { fuzz(10'000, 12'000, 1e6, Pass::kForward); }
TEST_F(Problems, BackwardSmokeProblems) { verify_file("smoke.txt", Pass::kBackward); }
TEST_F(Problems, BackwardCiProblems) { verify_file("ci.txt", Pass::kBackward); }
TEST_F(Problems, BackwardFullProblems) { verify_file("full.txt", Pass::kBackward); }
TEST_F(Problems, BackwardFuzz) { fuzz(0, 300, 2e5, Pass::kBackward); }
TEST_F(Problems, BackwardLongFuzz) { fuzz(10'000, 12'000, 1e6, Pass::kBackward); }

// Random problems have few blocks of keys: here rings go round many times within a tile, on all SMs and on two.
TEST_F(Problems, LongSequences) {
  const int units = device_.units;
  for (const char* line :
       {"q2000 k1900 h4/2 d128 bf16 causal", "q1500 k2100 h2 d64 bf16", "q700 k3300 h2 d64 fp16 causal", "q1100 k1300 h2 d256 bf16 causal",
        "q2500 h1 d96 fp16 window=300,0", "q900 k1700 h2 d192/128 bf16 causal", "q800 k1500 h2 d192 bf16 window=700,90",
        "q1000 k2600 h2 d64 bf16 causal softcap=20", "b9 q900 k800 h2 d128 bf16 packed tq3000 tk2800 seqused causal"})
    for (const int sms : {units, 2}) {
      device_.units = sms;
      EXPECT_TRUE(verify(parse(line), 7, Layout::kGaps)) << line;
    }
}

TEST_F(Problems, OnTwoSms) {
  device_.units = 2;
  for (const char* file : {"smoke.txt", "ci.txt"})
    for (Pass pass : {Pass::kForward, Pass::kBackward}) verify_file(file, pass);
  // From one tile to the next warpgroups differ in what they see, or see nothing.
  for (const char* dims : {"64", "96", "128", "192/128", "192", "256"})
    for (const char* rest : {"q256 k192 h4/2 d%s bf16 causal", "b3 q500 k300 h2 d%s fp16 causal", "b2 q300 k700 h2 d%s bf16 window=40,0",
                             "b2 q700 k300 h2 d%s bf16 window=0,150", "b3 q400 k520 h2 d%s bf16 seqused", "q330 h3 d%s bf16 window=70,-1",
                             "b6 q400 k500 h2 d%s bf16 packed tq1500 tk1800 causal", "b2 q300 k500 h2 d%s bf16 causal softcap=20 sink",
                             "bwd b5 q350 k270 h8/4 d%s bf16 causal sink", "bwd b7 q300 h10/5 d%s fp16 packed tq1100 tk1000 seqused",
                             "bwd b40 q200 k3 h12/4 d%s bf16 seqused"}) {
      std::string line = rest;
      line.replace(line.find("%s"), 2, dims);
      EXPECT_TRUE(verify(parse(line), 1, Layout::kBshd)) << line;
    }
}

TEST_F(Problems, EveryRowRuns) {
  std::set<std::string> names;
  for (const char* dims : {"64", "96", "128", "192/128", "192", "256", "80", "8", "104/40", "248", "long"})
    for (const char* type : {"bf16", "fp16"})
      for (const char* score : {"", " softcap=20", " alibi", " causal", " causal softcap=20"}) {
        const Problem problem =
            parse((std::string(dims) == "long" ? "q1600 k100 h1 d64" : "b2 q300 k520 h4/2 d" + std::string(dims)) + " " + type + score);
        const Result<Plan> plan = Plan::make(problem, device_);
        ASSERT_TRUE(plan.ok()) << plan.status().message();
        names.insert(std::string(plan->kernel()));
        EXPECT_TRUE(verify(problem, 1, Layout::kBshd));
      }
  EXPECT_EQ(names.size(), 32u);  // head dimension 64 has three shapes
}

TEST_F(Problems, EveryBackwardRowRuns) {
  std::set<std::string> names;
  for (const char* dims : {"64", "96", "128", "256", "80", "8", "104/40", "192", "192/128", "248"})
    for (const char* type : {"bf16", "fp16"})
      for (const char* score : {"", " softcap=20", " alibi", " deterministic", " deterministic softcap=20", " accumulate"}) {
        const Problem problem = parse("bwd b2 q200 k330 h2/1 d" + std::string(dims) + " " + type + " causal" + score);
        const Result<Plan> plan = Plan::make(problem, device_);
        ASSERT_TRUE(plan.ok()) << plan.status().message();
        names.insert(std::string(plan->kernel()));
        EXPECT_TRUE(verify(problem, 1, Layout::kBshd));
      }
  EXPECT_EQ(names.size(), 24u);
}

}  // namespace
}  // namespace tilewise
