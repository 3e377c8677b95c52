// Clauses of the contract that a comparison with float64 does not show.
#include <chrono>
#include <cmath>
#include <iterator>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "common.h"

namespace tilewise {
namespace {

using reference::Layout;

struct Contract : Cuda {};

TEST_F(Contract, RepeatsBitByBit) {
  for (const char* line : {"b2 q600 k900 h6/2 d128 bf16 causal", "b3 q400 h4 d64 fp16", "b1 q300 k700 h3 d256 bf16 window=90,20"}) {
    Trial t = trial(line);
    const std::vector<char> first = output(t);
    for (int i = 0; i < 20; ++i) ASSERT_EQ(output(t), first) << line;
  }
}

TEST_F(Contract, SlowRepeatsOverAThousandRuns) {
  Trial t = trial("b2 q1500 h8/2 d128 bf16 causal");
  const std::vector<char> first = output(t);
  for (int i = 0; i < 1000; ++i) ASSERT_EQ(output(t), first) << i;
}

TEST_F(Contract, LseIsOptional) {
  for (const char* line : {"b2 q300 k200 h2 d128 bf16 causal", "b2 q300 k200 h2 d256 bf16 causal"}) {
    Trial with = trial(line), without = trial(line);
    output(with);
    Arguments arguments = without.arguments();
    arguments.lse = {};
    without.plan().run(arguments).check();
    synchronize(device_).check();
    without.download().check();
    const TensorView &o = with.host_arguments().o, &other = without.host_arguments().o;
    EXPECT_EQ(std::memcmp(o.data, other.data, bytes_of(o)), 0) << line;
  }
}

// On two SMs, so that a row's tile may be an SM's first or a later one.
class RowAlone : public Cuda, public testing::WithParamInterface<const char*> {};
TEST_P(RowAlone, DoesNotDependOnTheBatch) {
  device_.units = 2;
  const std::string rest = std::string(" q200 k300 h2 d") + GetParam() + " bf16 causal";
  Trial small = trial("b1" + rest), large = trial("b5" + rest);
  for (auto member : {&Arguments::q, &Arguments::k, &Arguments::v})
    for (int b = 0; b < 5; ++b) {
      const TensorView &from = small.host_arguments().*member, &to = large.host_arguments().*member;
      std::memcpy(static_cast<char*>(to.data) + b * to.stride[0] * 2, from.data, bytes_of(from));
    }
  small.upload().check();
  large.upload().check();
  output(small);
  output(large);
  const TensorView &one = small.host_arguments().o, &five = large.host_arguments().o;
  for (int b = 0; b < 5; ++b) EXPECT_EQ(std::memcmp(static_cast<char*>(five.data) + b * five.stride[0] * 2, one.data, bytes_of(one)), 0);
}
INSTANTIATE_TEST_SUITE_P(Contract, RowAlone, testing::Values("64", "128", "192/128", "256"));

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
constexpr const char* kMasked[] = {"q400 h2 d128 bf16 causal", "q400 h2 d64 fp16 causal", "q300 h2 d256 bf16 window=50,0",
                                   "q400 h2 d128 bf16 causal softcap=30", "q400 h2 d192/128 bf16 causal"};

// Values that are not finite reach the rows that see them and no others, although the tensor cores multiply whole blocks.
TEST_F(Contract, ValuesThatAreNotFiniteReachTheRowsThatSeeThem) {
  for (const char* line : kMasked)
    for (float bad : {kNan, kInfinity}) {
      constexpr int kKey = 170;
      Trial clean = trial(line), spoilt = trial(line);
      for (Trial* t : {&clean, &spoilt}) set_row(t->host_arguments().v, 0, kKey, 1, t == &clean ? 0 : bad);
      clean.upload().check();
      spoilt.upload().check();
      output(clean);
      output(spoilt);
      const Problem problem = parse(line);
      for (int64_t query = 0; query < problem.seqlen_q; ++query) {
        const bool sees = query >= kKey && (problem.window_left < 0 || query - kKey <= problem.window_left);
        for (int64_t d = 0; d < problem.head_dim_v; d += 9) {
          const float with = get(spoilt.host_arguments().o, 0, query, 1, d), without = get(clean.host_arguments().o, 0, query, 1, d);
          if (sees)
            ASSERT_FALSE(std::isfinite(with)) << line << " query " << query;
          else
            ASSERT_NEAR(with, without, 0.02f * std::fabs(without) + 0.004f) << line << " query " << query;
        }
      }
    }
}

// One element of a query, key or value that is NaN or infinite: o and lse are what float64 says, in the rows that see it and in all others.
TEST_F(Contract, OneElementThatIsNotFinite) {
  std::vector<std::string> lines(std::begin(kMasked), std::end(kMasked));
  for (const char* line :
       {"q300 k200 h4/2 d128 bf16 causal sink", "q300 k420 h4/1 d256 fp16 window=40,25 alibi",
        "q300 k150 h2 d192 bf16 window=20,10 topleft sink", "b3 q200 k220 h4/2 d64 bf16 packed tq400 tk450 seqused causal"})
    lines.emplace_back(line);
  for (const std::string& line : lines)
    for (const TensorView Arguments::*of : {&Arguments::q, &Arguments::k, &Arguments::v})
      for (const int64_t row : {0, 140})
        for (float bad : {kNan, kInfinity, -kInfinity}) {
          Trial t = trial(line);
          const TensorView& view = t.host_arguments().*of;
          const int rows = view.rank - 3;  // the dimension of rows; heads follow
          const int64_t head = view.shape[rows + 1] - 1;
          reference::write_element(view.data, view.dtype, row * view.stride[rows] + head * view.stride[rows + 1] + 5, bad);
          t.upload().check();
          t.run().check();
          const Result<reference::Report> report = t.compare();
          ASSERT_TRUE(report.ok()) << report.status().message();
          EXPECT_TRUE(report->pass) << line << ", row " << row << " " << bad << ": " << report->first_failure;
        }
}

// Sums of exponentials times values are larger than the values they come to, but finite as long as these are below 1e30.
TEST_F(Contract, ValuesMayBeLarge) {
  for (const std::string dims : {"64", "96", "128", "192/128", "256"})
    for (const char* rest : {" bf16", " bf16 causal sink"}) {
      Trial t = trial("q200 k300 h2 d" + dims + rest);
      const TensorView& v = t.host_arguments().v;
      for (int64_t key = 0; key < 300; ++key) set_row(v, 0, key, 1, key % 2 ? 1e30f : 0.9e30f);
      t.upload().check();
      t.run().check();
      const Result<reference::Report> report = t.compare();
      ASSERT_TRUE(report.ok()) << report.status().message();
      EXPECT_TRUE(report->pass) << dims << rest << ": " << report->first_failure;
    }
}

// NaN that rows see costs them little: they are not computed anew. What does not see it, but stands in a block with who does, is.
TEST_F(Contract, NanCostsLittle) {
  for (const char* where : {"first value", "a column of values", "last value", "queries", "a key"}) {
    Trial t = trial("q8000 h1 d128 bf16 causal");
    const Arguments& a = t.host_arguments();
    const std::string what = where;
    if (what == "first value") set_row(a.v, 0, 0, 0, kNan);
    if (what == "last value") set_row(a.v, 0, 7999, 0, kNan);
    if (what == "a key") set_row(a.k, 0, 4000, 0, kNan);
    for (int64_t row = 0; row < 8000; ++row) {
      if (what == "a column of values") reference::write_element(a.v.data, a.v.dtype, row * a.v.stride[1] + 77, kNan);
      if (what == "queries") set_row(a.q, 0, row, 0, kNan);
    }
    t.upload().check();
    t.run().check();
    const auto begin = std::chrono::steady_clock::now();
    t.run().check();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    EXPECT_LT(seconds, what == "last value" ? 1 : 0.1) << where << " took " << seconds << " s";
    t.download().check();
    EXPECT_TRUE(std::isnan(get(a.o, 0, 7999, 0, 77))) << where;
    EXPECT_EQ(std::isnan(get(a.o, 0, 100, 0, 77)), what != "last value" && what != "a key") << where;
    EXPECT_EQ(std::isnan(get(a.o, 0, 100, 0, 78)), what == "first value" || what == "queries") << where;
  }
}

TEST_F(Contract, ScoresMayRiseAtTheEnd) {
  // The first block of a row, the last keys, has the smallest scores: the maximum that it leaves must be given up.
  Trial t = trial("q256 k1024 h1 d64 bf16");
  const TensorView& k = t.host_arguments().k;
  for (int64_t key = 0; key < 1024; ++key)
    for (int64_t d = 0; d < 64; ++d)
      reference::write_element(k.data, k.dtype, key * k.stride[1] + d, get(k, 0, key, 0, d) * static_cast<float>(1024 - key) / 16);
  t.upload().check();
  t.run().check();
  const Result<reference::Report> report = t.compare();
  ASSERT_TRUE(report.ok()) << report.status().message();
  EXPECT_TRUE(report->pass) << report->first_failure;
}

TEST_F(Contract, ScoresMayOutgrowFloatWithinABlock) {
  // Equal keys all along, but one block, or one key of it, with scores 2^125 times the others': each exponential is finite under the old
  // maximum, their sum is not. Further: the factor that would bring them back is not a normal number. And further: no exponential is
  // finite.
  for (const auto& [growth, last] : std::vector<std::pair<float, int>>{{125.f, 256},
                                                                       {126.5f, 256},
                                                                       {127.f, 256},
                                                                       {127.5f, 256},
                                                                       {200.f, 256},
                                                                       {125.f, 129},
                                                                       {126.5f, 129},
                                                                       {127.f, 129},
                                                                       {127.5f, 129}}) {
    Trial t = trial("q64 k512 h1 d64 bf16 scale=1");
    const TensorView &q = t.host_arguments().q, &k = t.host_arguments().k;
    for (int64_t row = 0; row < 64; ++row)
      for (int64_t d = 0; d < 64; ++d) reference::write_element(q.data, q.dtype, row * q.stride[1] + d, d == 0 ? 1 : 0);
    for (int64_t key = 0; key < 512; ++key)
      for (int64_t d = 0; d < 64; ++d)
        reference::write_element(k.data, k.dtype, key * k.stride[1] + d, d == 0 && key >= 128 && key < last ? growth * 0.6931472f : 0);
    for (const bool nan : {false, true}) {  // and a key of NaN, which is met first
      if (nan) set_row(k, 0, 511, 0, kNan);
      t.upload().check();
      t.run().check();
      const Result<reference::Report> report = t.compare();
      ASSERT_TRUE(report.ok()) << report.status().message();
      EXPECT_TRUE(report->pass) << growth << " to " << last << (nan ? " with NaN: " : ": ") << report->first_failure;
    }
  }
}

TEST_F(Contract, RowsThatSeeNothingStayZeroBesideValuesThatAreNotFinite) {
  for (const std::string dims : {"64", "128", "256"})
    for (const char* rest : {"", " sink"}) {
      Trial t = trial("q100 k90 h1 d" + dims + " bf16 causal" + rest);  // queries 0 to 9 see nothing
      set_row(t.host_arguments().v, 0, 0, 0, kNan);
      t.upload().check();
      t.run().check();
      t.download().check();
      for (int64_t query = 0; query < 100; ++query) {
        const float value = get(t.host_arguments().o, 0, query, 0, 3);
        if (query < 10)
          ASSERT_EQ(value, 0) << dims << rest << " query " << query;
        else
          ASSERT_TRUE(std::isnan(value)) << dims << rest << " query " << query;
      }
    }
  // Past a window: values behind the last key are nobody's.
  Trial t = trial("q200 k100 h1 d64 bf16 window=20,0 topleft sink");
  set_row(t.host_arguments().v, 0, 99, 0, kNan);
  t.upload().check();
  t.run().check();
  const Result<reference::Report> report = t.compare();
  ASSERT_TRUE(report.ok()) << report.status().message();
  EXPECT_TRUE(report->pass) << report->first_failure;
}

TEST_F(Contract, SinksThatAreNotFinite) {
  for (const char* dims : {"64", "128", "256"})
    for (const float sink : {kInfinity, kNan, -kInfinity}) {
      Trial t = trial("q100 k90 h1 d" + std::string(dims) + " bf16 causal sink");  // queries 0 to 9 see nothing
      static_cast<float*>(t.host_arguments().sink.data)[0] = sink;
      t.upload().check();
      t.run().check();
      t.download().check();
      const auto* lse = static_cast<const float*>(t.host_arguments().lse.data);
      for (int64_t query = 0; query < 100; ++query) {
        const float value = get(t.host_arguments().o, 0, query, 0, 3);
        if (query < 10) {
          ASSERT_EQ(value, 0) << sink << " query " << query;
          ASSERT_TRUE(std::isnan(sink) ? std::isnan(lse[query]) : lse[query] == sink) << sink << " query " << query;
        } else {
          ASSERT_EQ(std::isnan(value), sink != -kInfinity) << sink << " query " << query;
          ASSERT_EQ(std::isnan(lse[query]), sink != -kInfinity) << sink << " query " << query;
        }
      }
    }
}

TEST_F(Contract, WhatTheCopyEngineCannotReadIsRefused) {
  Trial t = trial("b2 q64 h2 d64 bf16", Layout::kPermuted);
  const Status status = t.run();
  EXPECT_EQ(status.code(), StatusCode::kUnsupported);
  EXPECT_EQ(status.message().find("q begins 2 bytes past a multiple of 16, but every row must begin"), 0u) << status.message();
}

}  // namespace
}  // namespace tilewise
