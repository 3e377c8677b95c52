// Parts of a problem against the whole: every output of every part is the same bits, and all of them are written.
#include "parts.h"

#include <gtest/gtest.h>

#include <cstring>

#include "reference/trial.h"
#include "tilewise/memory.hpp"

namespace tilewise::tool {
namespace {

std::vector<std::vector<std::byte>> outputs_of(const Arguments& a) {
  std::vector<std::vector<std::byte>> all;
  for (const TensorView* view : {&a.o, &a.lse, &a.dq, &a.dk, &a.dv, &a.dsink}) {
    int64_t bytes = view->dtype == DataType::kFloat32 ? 4 : 2;
    for (int d = 0; d < view->rank; ++d) bytes *= view->shape[d];
    const auto* data = static_cast<const std::byte*>(view->data);
    if (data) all.emplace_back(data, data + bytes);
  }
  return all;
}

void expect_same(const std::string& line, int64_t count, size_t parts) {
  const Device device = Device::cpu(2);
  const Problem problem = *Problem::parse(line);
  reference::Trial trial = *reference::Trial::make(problem, device, 3);
  ASSERT_TRUE(trial.run().ok()) << line;
  const auto whole = outputs_of(trial.arguments());
  ASSERT_TRUE(trial.upload().ok());  // outputs hold NaN again
  EXPECT_NE(outputs_of(trial.arguments()), whole) << line;
  const std::vector<Part> all = cut(problem, trial.arguments(), count);
  EXPECT_EQ(all.size(), parts) << line;
  for (const Part& part : all) {
    const auto plan = Plan::make(part.problem, device);
    ASSERT_TRUE(plan.ok()) << part.problem.to_string() << ": " << plan.status().message();
    const Buffer workspace = *Buffer::make(device, plan->workspace_bytes());
    Arguments arguments = part.arguments;
    arguments.workspace = workspace.data();
    ASSERT_EQ(plan->run(arguments).message(), "") << part.problem.to_string();
  }
  EXPECT_TRUE(outputs_of(trial.arguments()) == whole) << line;
}

TEST(Parts, OfDenseProblemsAreTheSameBits) {
  expect_same("b3 q70 k90 h4/2 d40", 1, 1);
  expect_same("b3 q70 k90 h4/2 d40", 6, 6);
  expect_same("b3 q700 k900 h4/2 d40", 50, 48);
  expect_same("q700 k900 h1 d64", 13, 13);
  expect_same("q701 k900 h3/1 d64/24 causal", 13, 13);
  expect_same("q900 k700 h3/1 d64 causal bf16", 13, 13);  // 200 queries see no key
  expect_same("q900 k900 h3/1 d64 causal topleft alibi sink softcap=5", 13, 13);
  expect_same("q900 k950 h1 d64 causal topleft", 13, 13);
  expect_same("q900 k1000 h1 d64 causal alibi", 13, 13);
  expect_same("b2 q900 k1000 h1 d64 window=100,0", 13, 12);
  expect_same("b2 q300 k300 h1 d64 seqused", 13, 12);
}

TEST(Parts, OfPackedProblemsAreTheSameBits) {
  expect_same("packed b9 q300 k400 tq900 tk1200 h3/1 d64 causal", 13, 9);
  expect_same("packed b9 q300 k400 tq900 tk1200 h4/2 d64 fp16 window=50,20 seqused alibi sink", 5, 5);
  expect_same("bwd packed b9 q300 k400 tq900 tk1200 h4/2 d64 causal", 18, 18);
}

TEST(Parts, OfBackwardAreTheSameBits) {
  expect_same("bwd b3 q300 k400 h4/2 d64 causal", 100, 6);
  expect_same("bwd b3 q300 k400 h6/3 d64 causal sink", 100, 3);  // dsink sums over the batch
}

TEST(Parts, LeaveWholeWhereAMaskCannotBeCut) {
  expect_same("q300 k400 h1 d64 window=20,30", 10, 1);
  expect_same("q300 k400 h1 d64 alibi", 10, 1);
  expect_same("q300 k400 h1 d64 causal seqused", 10, 1);
  expect_same("q400 k300 h1 d64 causal topleft", 10, 1);
}

}  // namespace
}  // namespace tilewise::tool
