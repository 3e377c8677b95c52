// The judge itself: it passes good results and finds every kind of damage; random problems are legal and cover the features.
#include "reference/trial.h"

#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <set>

#include "reference/attention.h"

namespace tilewise::reference {
namespace {

Problem parse(std::string_view line) { return Problem::parse(line).value(); }

TEST(Trial, PassesTheLibrary) {
  for (const char* line : {"fwd b2 q40 k50 h4/2 d24 fp32 causal", "bwd b3 q20 k30 h2 d16 bf16 packed tq40 tk50 sink",
                           "bwd b3 q20 k30 h2 d16 bf16 packed tq40 tk50 sink accumulate"})
    for (Layout layout : {Layout::kBshd, Layout::kBhsd, Layout::kGaps, Layout::kPermuted}) {
      const Result<Report> report = verify(parse(line), Device::cpu(), 1, layout);
      ASSERT_TRUE(report.ok()) << report.status().message();
      EXPECT_TRUE(report->pass) << report->first_failure;
      EXPECT_EQ(report->tensors.size(), parse(line).pass == Pass::kForward ? 2u : 4u);
      for (const TensorReport& tensor : report->tensors) EXPECT_GT(tensor.standard_mean, 0) << tensor.name;
    }
}

// damage() is done to the device's memory after a good run; the report must blame `name` and say `reason`.
void expect_found(const char* line, Layout layout, const std::function<void(const Arguments&)>& damage, const std::string& name,
                  const std::string& reason) {
  Trial trial = Trial::make(parse(line), Device::cpu(), 2, layout).value();
  ASSERT_TRUE(trial.run().ok());
  damage(trial.arguments());
  const Report report = trial.compare().value();
  EXPECT_FALSE(report.pass) << line << ": " << name << " " << reason;
  EXPECT_EQ(report.first_failure.rfind(name + ": ", 0), 0u) << report.first_failure;
  EXPECT_NE(report.first_failure.find(reason), std::string::npos) << report.first_failure;
}

TEST(Trial, FindsDamage) {
  const char* fp32 = "fwd b2 q40 k50 h2 d24 fp32";
  const char* bf16 = "bwd b2 q40 k50 h2 d24 bf16 sink";
  const auto floats = [](const TensorView& view) { return static_cast<float*>(view.data); };
  const auto halves = [](const TensorView& view) { return static_cast<uint16_t*>(view.data); };
  for (Layout layout : {Layout::kBshd, Layout::kBhsd, Layout::kGaps, Layout::kPermuted}) {
    expect_found(
        fp32, layout, [&](const Arguments& a) { floats(a.o)[3] += 1e-3f; }, "o", "max error");
    expect_found(
        fp32, layout, [&](const Arguments& a) { floats(a.lse)[3] += 1e-4f; }, "lse", "max error");
    expect_found(
        fp32, layout, [&](const Arguments& a) { floats(a.o)[3] = NAN; }, "o", "not finite");
    expect_found(
        fp32, layout, [&](const Arguments& a) { floats(a.o)[-1] = 0; }, "o", "memory around");
    expect_found(
        fp32, layout, [&](const Arguments& a) { floats(a.q)[5] = 1; }, "q", "an input is written");
    expect_found(
        fp32, layout, [&](const Arguments& a) { static_cast<char*>(a.workspace)[-1] = 0; }, "workspace", "memory around");
    expect_found(
        bf16, layout, [&](const Arguments& a) { halves(a.dk)[7] = to_bfloat16(from_bfloat16(halves(a.dk)[7]) + 0.1f); }, "dk", "max error");
    expect_found(
        bf16, layout, [&](const Arguments& a) { halves(a.dv)[-1] = 0; }, "dv", "memory around");
    expect_found(
        bf16, layout, [&](const Arguments& a) { floats(a.dsink)[1] = 100; }, "dsink", "max error");
  }
  for (const char* line : {"bwd b2 q40 k50 h2 d24 fp32 accumulate", "bwd b2 q40 k50 h2 d24 bf16 accumulate"}) {
    const auto stored = [&](const Arguments& a) { floats(a.dv)[3] -= 0.5f; };  // as one that does not add would have it
    expect_found(line, Layout::kGaps, stored, "dv", "max error");
    expect_found(
        line, Layout::kBshd, [&](const Arguments& a) { floats(a.dk)[-1] = 0; }, "dk", "memory around");
  }
  // Between the rows.
  expect_found(
      fp32, Layout::kGaps, [&](const Arguments& a) { floats(a.o)[24] = 0; }, "o", "memory around");
  expect_found(
      bf16, Layout::kPermuted, [&](const Arguments& a) { halves(a.dq)[24] = 0; }, "dq", "memory around");
  // One key and scores near 10, where the bounds by luck are wide.
  expect_found(
      "fwd q3 k1 d64 fp32 scale=0.6", Layout::kBshd,
      [&](const Arguments& a) {
        for (int n = 0; n < 3 * 64; ++n) floats(a.o)[n] *= 1 + 2.2e-6f;
      },
      "o", "relative Frobenius error");
  // A small error everywhere: invisible in max, seen in mean.
  expect_found(
      "fwd q200 k300 h2 d32 fp32", Layout::kBshd,
      [&](const Arguments& a) {
        for (int n = 0; n < 200 * 2 * 32; ++n) floats(a.o)[n] += 2e-7f;
      },
      "o", "error");
}

TEST(Trial, FindsWritesToRowsOfNoSequence) {
  for (const char* line : {"fwd b3 q20 k30 h2 d8 fp32 packed tq40 tk50", "bwd b3 q20 k30 h2 d8 fp32 packed tq40 tk50"})
    for (uint64_t seed = 1; seed < 40; seed += 5)
      for (bool at_the_end : {false, true}) {
        Trial trial = Trial::make(parse(line), Device::cpu(), seed).value();
        ASSERT_TRUE(trial.run().ok());
        const Arguments& a = trial.arguments();
        const bool forward = trial.plan().problem().pass == Pass::kForward;
        const int32_t* starts = static_cast<const int32_t*>(a.cu_seqlens_q.data);
        const int64_t row = at_the_end ? 39 : 0;
        const bool gap = at_the_end ? starts[3] < 40 : starts[0] > 0;
        static_cast<float*>((forward ? a.o : a.dq).data)[row * 16 + 5] = 0;
        if (forward) static_cast<float*>(a.lse.data)[40 + row] = 0;
        const Report report = trial.compare().value();
        const std::string written = "elements of rows that belong to no sequence are written";
        for (size_t n = 0; n < (forward ? 2 : 1); ++n)
          EXPECT_EQ(report.tensors[n].reason.find(written) != std::string::npos, gap) << line << " seed " << seed << " tensor " << n;
      }
}

TEST(Trial, FindsWhatIsNotWritten) {
  Trial trial = Trial::make(parse("fwd b2 q40 k50 h2 d24 fp32"), Device::cpu(), 2, Layout::kGaps).value();
  const Report report = trial.compare().value();
  EXPECT_FALSE(report.pass);
  EXPECT_EQ(report.first_failure, "o: 3840 of 3840 elements are not written");
}

TEST(Trial, FollowsFromItsSeed) {
  const Problem p = parse("bwd b3 q20 k30 h2 d16 bf16 packed tq40 tk50 sink alibi seqused");
  const auto bytes = [&](uint64_t seed) {
    const Trial trial = Trial::make(p, Device::cpu(), seed).value();
    std::vector<uint16_t> values;
    for (const TensorView& view : {trial.arguments().q, trial.arguments().do_}) {
      const uint16_t* data = static_cast<const uint16_t*>(view.data);
      values.insert(values.end(), data, data + view.shape[0] * view.stride[0]);
    }
    for (int32_t length : trial.lengths().k) values.push_back(static_cast<uint16_t>(length));
    return values;
  };
  EXPECT_EQ(bytes(1), bytes(1));
  EXPECT_NE(bytes(1), bytes(2));
}

TEST(Trial, DrawsNormalNumbers) {
  const Trial trial = Trial::make(parse("fwd q1000 h4 d64 fp32"), Device::cpu(), 3).value();
  const float* q = static_cast<const float*>(trial.arguments().q.data);
  double sum = 0, squares = 0, fourth = 0;
  constexpr int kCount = 1000 * 4 * 64;
  for (int n = 0; n < kCount; ++n) sum += q[n], squares += q[n] * q[n], fourth += std::pow(q[n], 4);
  EXPECT_NEAR(sum / kCount, 0, 0.01);
  EXPECT_NEAR(squares / kCount, 1, 0.01);
  EXPECT_NEAR(fourth / kCount, 3, 0.1);
}

TEST(Trial, SequencesAreEmptyFullAndBetween) {
  const Problem p = parse("fwd b6 q20 k30 h1 d4 fp32 packed tq60 tk80 seqused");
  bool empty = false, full = false, unused = false, capped = false, before = false, after = false;
  for (uint64_t seed = 0; seed < 50; ++seed) {
    const Trial trial = Trial::make(p, Device::cpu(), seed).value();
    const Lengths lengths = trial.lengths();
    const int32_t* starts = static_cast<const int32_t*>(trial.arguments().cu_seqlens_k.data);
    int64_t total = 0;
    for (size_t b = 0; b < 6; ++b) {
      total += lengths.q[b];
      empty = empty || lengths.q[b] == 0, full = full || lengths.q[b] == 20;
      const int32_t length = starts[b + 1] - starts[b];
      ASSERT_LE(length, 30);
      ASSERT_LE(lengths.k[b], length);
      unused = unused || (length > 0 && lengths.k[b] == 0), capped = capped || (lengths.k[b] > 0 && lengths.k[b] < length);
    }
    const bool gaps = seed % 5 == 1;
    ASSERT_TRUE(gaps ? total <= 60 : total == 60) << total;
    ASSERT_TRUE(gaps ? starts[0] >= 0 && starts[6] <= 80 : starts[0] == 0 && starts[6] == 80) << seed;
    before = before || starts[0] > 0, after = after || starts[6] < 80;
  }
  EXPECT_TRUE(empty && full && unused && capped && before && after);
}

TEST(Trial, LineThatRepeats) {
  EXPECT_EQ(verify_line(parse("q64 d64 causal"), 7, Layout::kGaps),
            "tilewise verify \"fwd b1 q64 k64 h1 d64 fp32 causal\" --seed 7 --layout gaps");
  setenv("TILEWISE_KERNEL", "forward_sse4,backward_sse4", 1);
  EXPECT_EQ(verify_line(parse("q64 d64"), 0),
            "TILEWISE_KERNEL=forward_sse4,backward_sse4 tilewise verify \"fwd b1 q64 k64 h1 d64 fp32\" --seed 0 --layout bshd");
  unsetenv("TILEWISE_KERNEL");
  for (Layout layout : {Layout::kBshd, Layout::kBhsd, Layout::kGaps, Layout::kPermuted})
    EXPECT_EQ(*parse_layout(layout_name(layout)), layout);
  EXPECT_FALSE(parse_layout("sbhd").ok());
}

TEST(RandomProblem, IsLegalBoundedAndCoversEverything) {
  FuzzLimits limits;
  std::set<std::string> seen;
  for (uint64_t seed = 0; seed < 3000; ++seed) {
    const Problem p = random_problem(seed, limits);
    ASSERT_TRUE(p.validate().ok()) << p.to_string() << ": " << p.validate().message();
    ASSERT_EQ(Problem::parse(p.to_string()).value().to_string(), p.to_string());
    EXPECT_EQ(random_problem(seed, limits).to_string(), p.to_string());
    const double rows_q = static_cast<double>(p.packed ? p.total_q : p.batch * p.seqlen_q);
    ASSERT_LE(rows_q * static_cast<double>(p.num_heads_q * p.seqlen_k * p.head_dim), 2 * limits.max_products) << p.to_string();
    const auto note = [&](bool present, const char* feature) {
      if (present) seen.insert(feature);
    };
    note(p.pass == Pass::kBackward, "backward"), note(p.dtype == DataType::kBFloat16, "bf16"), note(p.dtype == DataType::kFloat16, "fp16");
    note(p.num_heads_q > p.num_heads_kv && p.num_heads_kv > 1, "grouped"), note(p.head_dim != p.head_dim_v, "two dims");
    note(p.head_dim % 2 == 1, "odd dim"), note(p.head_dim > 300, "wide"), note(p.head_dim == 1, "dim 1");
    note(p.seqlen_q > 2 * p.seqlen_k, "more queries"), note(p.seqlen_k > 2 * p.seqlen_q, "more keys"), note(p.seqlen_k == 0, "no keys");
    note(p.window_right == 0 && p.window_left < 0, "causal"), note(p.window_left > 0 && p.window_right > 0, "window");
    note(p.alignment == Alignment::kTopLeft, "top left"), note(p.packed && p.seqused_k && p.alibi, "packed with seqused and alibi");
    note(p.sink && p.softcap > 0, "sink with softcap"), note(p.scale() < 0, "negative scale");
  }
  EXPECT_EQ(seen.size(), 17u);
}

}  // namespace
}  // namespace tilewise::reference
