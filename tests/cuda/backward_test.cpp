// What a comparison of gradients with float64 on drawn problems does not show.
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "common.h"
#include "reference/attention.h"

namespace tilewise {
namespace {

using reference::Layout;
using reference::Trial;

struct Backward : Cuda {
  std::vector<char> gradients(Trial& t, std::initializer_list<TensorView Arguments::*> members) {
    t.run().check();
    return written(t, members);
  }
  void repeat(const std::string& line, int times, std::initializer_list<TensorView Arguments::*> members) {
    Trial t = trial(line);
    const std::vector<char> first = gradients(t, members);
    for (int i = 0; i < times; ++i) ASSERT_EQ(gradients(t, members), first) << line << " run " << i;
  }
};

constexpr const char* kRepeated[] = {
    "bwd b2 q600 k900 h6/2 d128 bf16 causal", "bwd b3 q400 h4 d64 fp16", "bwd b1 q300 k700 h3 d256 bf16 window=90,20",
    "bwd b2 q700 h4/1 d96 bf16 causal sink", "bwd b5 q500 k500 h4/2 d128 bf16 packed tq1300 tk1400 causal",
    // on few SMs rows of later units are preprocessed meanwhile; blocks of keys fall in runs
    "bwd b9 q200 h12/6 d128 bf16 causal sink", "bwd q200 k4200 h8 d64 bf16 causal",
    // pairs of CTAs
    "bwd b2 q600 k700 h4/2 d256 bf16 causal", "bwd b2 q500 k640 h3 d192 fp16", "bwd q150 k8300 h2 d256 bf16 causal",
    "bwd b5 q500 k500 h4/2 d192/128 bf16 packed tq1300 tk1400 softcap=30"};

TEST_F(Backward, DeterministicGradientsRepeatBitByBit) {
  for (const std::string line : kRepeated)
    repeat(line + " deterministic", 20, {&Arguments::dq, &Arguments::dk, &Arguments::dv, &Arguments::dsink});
}
TEST_F(Backward, SlowDeterministicGradientsRepeatOverAThousandRuns) {
  for (const char* line : {"bwd b2 q1500 h8/2 d128 bf16 causal deterministic", "bwd b2 q900 h6/2 d256 bf16 causal deterministic"})
    repeat(line, 1000, {&Arguments::dq, &Arguments::dk, &Arguments::dv});
}
// Who computes what depends on the number of SMs, the order of additions does not.
TEST_F(Backward, DeterministicGradientsAreTheSameOnAnyNumberOfSms) {
  for (const std::string line : kRepeated) {
    std::vector<char> first;
    for (const int units : {device_.units, 2, 3, 4, 31}) {
      Device few = device_;
      few.units = units;
      Result<Trial> made = Trial::make(parse(line + " deterministic"), few, 3, Layout::kBshd);
      made.status().check();
      const std::vector<char> now = gradients(*made, {&Arguments::dq, &Arguments::dk, &Arguments::dv, &Arguments::dsink});
      if (first.empty()) first = now;
      EXPECT_EQ(now == first, true) << line << " on " << units << " SMs";
    }
  }
}
// Nor on what else is in the batch. Two of these do as soon as the order of additions does.
TEST_F(Backward, DeterministicGradientsOfASequenceDoNotDependOnTheBatch) {
  for (const std::string line : {"q300 k4200 h4 d64 bf16 causal", "q260 k4200 h16/8 d128 fp16 causal", "q150 k8300 h2 d256 bf16 causal",
                                 "q600 k900 h6/2 d128 bf16 causal sink", "q500 k700 h2 d192/128 bf16"}) {
    Trial one = trial("bwd b1 " + line + " deterministic"), five = trial("bwd b5 " + line + " deterministic");
    const auto sequence = [&](TensorView Arguments::*member, int b) {
      const TensorView& view = five.host_arguments().*member;
      return static_cast<char*>(view.data) + b * view.stride[0] * (view.dtype == DataType::kFloat32 ? 4 : 2);
    };
    for (auto member : {&Arguments::q, &Arguments::k, &Arguments::v, &Arguments::o, &Arguments::lse, &Arguments::do_, &Arguments::dlse}) {
      const TensorView& from = one.host_arguments().*member;
      if (!from.data) continue;
      for (int b = 0; b < 5; ++b) std::memcpy(sequence(member, b), from.data, bytes_of(from));
    }
    if (const TensorView& sink = one.host_arguments().sink; sink.data)
      std::memcpy(five.host_arguments().sink.data, sink.data, bytes_of(sink));
    for (Trial* t : {&one, &five}) {
      t->upload().check();
      output(*t);
    }
    for (auto member : {&Arguments::dq, &Arguments::dk, &Arguments::dv}) {
      const TensorView& alone = one.host_arguments().*member;
      for (int b = 0; b < 5; ++b) EXPECT_EQ(std::memcmp(sequence(member, b), alone.data, bytes_of(alone)), 0) << line << " sequence " << b;
    }
  }
}
TEST_F(Backward, GradientsOfKeysAlwaysRepeatBitByBit) {
  for (const std::string line : kRepeated) repeat(line, 20, {&Arguments::dk, &Arguments::dv, &Arguments::dsink});
}

// One or two keys and a large scale: every score of a row may be far below or far above 0.
TEST_F(Backward, ExtremeLse) {
  for (const char* line :
       {"bwd q300 k2 h2 d64 bf16 scale=200", "bwd q300 k3 h2 d128 fp16 scale=300 causal topleft", "bwd q200 k300 h2 d64 bf16 scale=300",
        "bwd q130 k1 h2 d256 bf16 scale=-400", "bwd q64 k64 h1 d128 bf16 scale=0"})
    EXPECT_TRUE(verify(parse(line), 5, Layout::kBshd));
}

// One row of k (row of_key) or of do is `bad`, or a column of do (row -1), in the first sequence: gradients that use it, and no others, are
// not finite.
struct Spoilt : Backward {
  static std::string place(bool of_key, int row) { return row < 0 ? "column" : (of_key ? "key " : "query ") + std::to_string(row); }
  static void spoil(const Arguments& a, bool of_key, int row, int64_t head, float bad) {
    if (of_key)
      set_row(a.k, 0, row, 0, bad);
    else if (a.do_.data && row >= 0)
      set_row(a.do_, 0, row, head, bad);
    else if (a.do_.data)
      for (int64_t i = 0; i < a.do_.shape[1]; ++i)
        reference::write_element(a.do_.data, a.do_.dtype, i * a.do_.stride[1] + head * a.do_.stride[2] + 5, bad);
  }
  void verify_spoilt(const std::string& line, const char* order, bool of_key, int row, float bad) {
    Trial forward = trial(line), backward = trial("bwd " + line + order);
    for (const Arguments* a : {&forward.host_arguments(), &backward.host_arguments()}) spoil(*a, of_key, row, 1, bad);
    forward.upload().check();
    output(forward);
    for (auto member : {&Arguments::o, &Arguments::lse}) {
      const TensorView& view = forward.host_arguments().*member;
      std::memcpy((backward.host_arguments().*member).data, view.data, bytes_of(view));
    }
    backward.upload().check();
    backward.run().check();
    const Result<reference::Report> report = backward.compare();
    ASSERT_TRUE(report.ok()) << report.status().message();
    EXPECT_TRUE(report->pass) << line << order << " " << bad << " " << place(of_key, row) << ": " << report->first_failure;
  }
};

// Although the tensor cores multiply whole tiles: a key's value reaches dq of the queries that see it, a query's dk and dv of the keys that
// it sees.
TEST_F(Spoilt, ValuesThatAreNotFiniteReachTheGradientsThatUseThem) {
  for (const std::string line :
       {"b1 q400 h2/1 d128 bf16 causal", "b1 q400 h2 d64 fp16 causal", "b1 q400 k464 h2 d64 bf16 causal",
        "b1 q300 h2 d256 bf16 window=50,0", "b1 q200 k330 h2 d192/128 bf16 causal", "b1 q400 h2 d96 bf16 causal softcap=30"})
    for (const char* order : {"", " accumulate", " deterministic"})
      for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()})
        for (const auto& [of_key, row] : {std::pair{true, 170}, {true, 236}, {false, 170}, {false, -1}}) {  // in both halves of a block
          // The sums of p and dp and of o and do, which delta may be, differ where both signs are infinite.
          if (row < 0 && std::isinf(bad)) continue;
          verify_spoilt(line, order, of_key, row, bad);
        }
}
// And not of other heads, whose sums of dq come to lie where those were.
TEST_F(Spoilt, ValuesThatAreNotFiniteStayInTheirHeads) {
  for (const bool of_key : {true, false}) verify_spoilt("b34 q40 h20 d128 bf16", "", of_key, 7, std::numeric_limits<float>::quiet_NaN());
}

// Rows in a block with one that is not finite, but out of its sight, are few and are computed anew in a moment. So are all rows of dv with
// a column that is not: one that nobody sees may have spoilt it.
TEST_F(Spoilt, ValuesThatAreNotFiniteCostLittle) {
  for (const auto& [of_key, row] :
       {std::pair{true, 0}, {true, 4000}, {true, 7999}, {false, 0}, {false, 4000}, {false, 7999}, {false, -1}}) {
    Trial t = trial(row < 0 ? "bwd q8000 h32 d128 bf16 causal" : "bwd q8000 h1 d128 bf16 causal");
    for (int64_t head = 0; head < t.host_arguments().k.shape[2]; ++head)
      spoil(t.host_arguments(), of_key, row, head, std::numeric_limits<float>::quiet_NaN());
    t.upload().check();
    t.run().check();
    const auto begin = std::chrono::steady_clock::now();
    t.run().check();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    EXPECT_LT(seconds, 0.2) << place(of_key, row) << " took " << seconds << " s";
  }
}

// No queries or no keys at all, of packed sequences: the tensors need not be given.
TEST_F(Backward, EmptyTensorsNeedNotBeGiven) {
  for (const std::string pass : {"fwd ", "bwd "})
    for (const bool no_keys : {false, true}) {
      Trial t = trial(pass + "b3 q9 k9 h2 d64 bf16 packed " + (no_keys ? "tq20 tk0" : "tq0 tk20"));
      Arguments some = t.arguments();
      if (no_keys)
        some.k = some.v = some.dk = some.dv = {};
      else
        some.q = some.o = some.do_ = some.dq = some.lse = {};
      const Status status = t.plan().run(some);
      ASSERT_TRUE(status.ok()) << status.message();
      for (const char byte : written(t, {no_keys ? pass == "fwd " ? &Arguments::o : &Arguments::dq : &Arguments::dk}))
        if (no_keys || pass == "bwd ") {
          ASSERT_EQ(byte, 0) << pass << no_keys;
        }
    }
}

// More sequences than a warp has lanes, and than it squared has; many of them empty. Without and with rows that belong to none.
TEST_F(Backward, ManyPackedSequences) {
  for (const char* line :
       {"bwd b40 q300 k300 h3 d128 bf16 packed tq2000 tk2100", "bwd b1500 q9 k9 h3/1 d64 bf16 packed tq3000 tk3300 sink causal",
        "bwd b1100 q40 k20 h2 d256 bf16 packed tq5000 tk3000 seqused"})
    for (const char* order : {"", " deterministic"})
      for (const uint64_t seed : {9, 11}) EXPECT_TRUE(verify(parse(std::string(line) + order), seed, Layout::kBshd));
}

// More units than are preprocessed before the first works, sums that are used again, and order: few, for the sanitizers.
TEST_F(Backward, SmokeOfManyUnits) {
  for (const char* line : {"bwd b70 q20 h14 d64 bf16 causal", "bwd b34 q20 k30 h20 d128 bf16 seqused deterministic",
                           "bwd b24 q70 h15 d256 fp16 deterministic"})
    EXPECT_TRUE(verify(parse(line), 8, Layout::kBshd));
}

// So many heads that the sums of dq, which lie in a ring, are used again, with few and with many blocks of keys to a head.
TEST_F(Backward, SumsAreUsedAgain) {
  for (const char* line : {"bwd b70 q20 h14 d64 bf16 causal", "bwd b34 q20 k30 h20 d128 bf16 seqused", "bwd b24 q70 h15 d256 fp16",
                           "bwd b30 q60 k60 h40 d96 bf16 packed tq400 tk500 causal", "bwd b34 q20 h40/20 d64 bf16",
                           "bwd b20 q20 k700 h8 d128 bf16", "bwd b30 q140 h20 d64 bf16 causal", "bwd b20 q140 h10 d192 bf16 causal",
                           "bwd b20 q140 h10 d192/128 bf16", "bwd b40 q150 h12 d256 bf16 causal",
                           "bwd b200 q140 k3 h12/4 d64 bf16 seqused",  // sequences without keys in between
                           "bwd b12 q70 k4200 h8 d64 bf16 causal",     // deterministic blocks of the last units fall in runs
                           "bwd q300 k3500 h6 d64 bf16 causal",        // works of several units alternate: of the last ones, of all
                           "bwd b40 q20 k400 h8 d128 bf16", "bwd b60 q20 k130 h8 d256 bf16",  // deterministic works take the longest ring
                           "bwd b11 q100 h12 d128 bf16", "bwd b7 q100 h19 d128 bf16"})  // as many works as an H100 has SMs, and one more
    for (const char* order : {"", " deterministic", " accumulate"}) EXPECT_TRUE(verify(parse(std::string(line) + order), 8, Layout::kBshd));
}

// Many tiles and blocks, so that rings wrap and every order of CTAs comes about.
TEST_F(Backward, LongSequences) {
  for (const char* line : {"bwd q2000 k1900 h4/2 d128 bf16 causal", "bwd q1500 k2100 h2 d64 bf16", "bwd q1100 k1300 h2 d256 bf16 causal",
                           "bwd q2500 h1 d96 fp16 window=300,0", "bwd q2500 k77 h4/2 d128 bf16",
                           "bwd b9 q900 k800 h2 d128 bf16 packed tq3000 tk2800 seqused causal", "bwd q300 k4200 h8 d64 bf16 causal",
                           "bwd q260 k4200 h16/8 d128 fp16 causal", "bwd q200 k8300 h2 d256 bf16 causal"})
    for (const char* order : {"", " deterministic"}) EXPECT_TRUE(verify(parse(std::string(line) + order), 7, Layout::kGaps));
}

}  // namespace
}  // namespace tilewise
