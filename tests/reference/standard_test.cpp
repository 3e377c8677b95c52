// Standard attention against float64: the same function, with the errors of its precision.
#include "reference/standard.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "host_tensors.h"
#include "reference/trial.h"

namespace tilewise::reference {
namespace {

// Error relative to the terms that make each output, over a whole tensor.
double relative_error(const TensorView& got, const std::vector<double>& expected, const std::vector<double>& noise) {
  double squares = 0, total = 1e-30;
  for (size_t n = 0; n < expected.size(); ++n) {
    const double value = HostTensors::get(got, n);
    if (!std::isfinite(expected[n])) {
      if (value != expected[n]) return INFINITY;
      continue;
    }
    squares += (value - expected[n]) * (value - expected[n]), total += noise[n] * noise[n];
  }
  return std::sqrt(squares / total);
}

TEST(Standard, IsAttentionOfItsPrecision) {
  for (uint64_t seed = 0; seed < 400; ++seed) {
    FuzzLimits limits;
    limits.max_products = 2e5;
    const Problem p = random_problem(seed, limits);
    SCOPED_TRACE(p.to_string() + " seed " + std::to_string(seed));
    HostTensors t(p, seed);
    Outputs sizes;
    const Outputs exact = attention(p, t.arguments, &sizes);
    Result<Standard> standard = Standard::make(p, static_cast<int>(seed % 3));
    ASSERT_TRUE(standard.ok()) << standard.status().message();
    ASSERT_TRUE(standard->forward(t.arguments).ok());
    // A rounded score is a factor of 1 + its error in p.
    const double largest_score = sizes.lse.empty() ? 0 : *std::max_element(sizes.lse.begin(), sizes.lse.end());
    const double roundoff = p.dtype == DataType::kFloat32 ? 0x1p-24 : p.dtype == DataType::kBFloat16 ? 0x1p-8 : 0x1p-11;
    const double bound = roundoff * (16 + 2 * largest_score);
    EXPECT_LT(relative_error(t.arguments.o, exact.o, sizes.o), bound);
    EXPECT_LT(relative_error(t.arguments.lse, exact.lse, sizes.lse), bound);
    if (p.pass == Pass::kForward) continue;
    ASSERT_TRUE(standard->backward(t.arguments).ok());
    EXPECT_LT(relative_error(t.arguments.dq, exact.dq, sizes.dq), bound);
    EXPECT_LT(relative_error(t.arguments.dk, exact.dk, sizes.dk), bound);
    EXPECT_LT(relative_error(t.arguments.dv, exact.dv, sizes.dv), bound);
    if (!p.sink) continue;
    EXPECT_LT(relative_error(t.arguments.dsink, exact.dsink, sizes.dsink), bound);
  }
}

TEST(Standard, LargeScoresAndLongRows) {
  Problem p;
  p.seqlen_q = 130, p.seqlen_k = 3000, p.head_dim = p.head_dim_v = 33, p.softmax_scale = 30.0f;
  HostTensors t(p, 1);
  Outputs sizes;
  const Outputs exact = attention(p, t.arguments, &sizes);
  ASSERT_TRUE(Standard::make(p).value().forward(t.arguments).ok());
  EXPECT_LT(relative_error(t.arguments.o, exact.o, sizes.o), 1e-3);  // scores near 1000 carry errors near 1e-4
  EXPECT_LT(relative_error(t.arguments.lse, exact.lse, sizes.lse), 1e-6);
}

TEST(Standard, StatesItsMemoryAndRefusesWhatIsNotThere) {
  Problem p = Problem::parse("fwd b2 q1000 k500 h4 d64 fp32").value();
  EXPECT_EQ(standard_bytes(p), 2 * 4 * 1000 * 500 * 4LL);
  p.dtype = DataType::kBFloat16, p.pass = Pass::kBackward;
  EXPECT_EQ(standard_bytes(p), 2 * 2 * 4 * 1000 * 500 * 2LL);
  p = Problem::parse("fwd q10000000 k10000000 h1 d64 fp32").value();
  const Result<Standard> standard = Standard::make(p);
  ASSERT_FALSE(standard.ok());
  EXPECT_EQ(standard.status().code(), StatusCode::kUnavailable);
  EXPECT_NE(standard.status().message().find("400000.0 GB"), std::string::npos) << standard.status().message();
}

}  // namespace
}  // namespace tilewise::reference
