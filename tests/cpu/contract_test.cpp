// One named test for each clause of the contract that the problem files cannot show by errors alone.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>

#include "common.h"

namespace tilewise {
namespace {

using reference::Layout;

struct Contract : Cpu {};
INSTANTIATE_TEST_SUITE_P(Isa, Contract, testing::ValuesIn(isas()), isa_name);

TEST_P(Contract, RowsThatSeeNothingAreZero) {
  for (const char* dtype : {"fp32", "bf16", "fp16"})
    for (const char* sink : {"", " sink"}) {
      SCOPED_TRACE(std::string(dtype) + sink);
      const std::string shape = " q9 k4 h4/2 d16 " + std::string(dtype) + " causal" + sink;  // bottom right: queries 0 to 4
      HostTrial forward(parse("fwd" + shape)), backward(parse("bwd" + shape));
      forward.run_bits(), backward.run_bits();
      for (int64_t h = 0; h < 4; ++h)
        for (int64_t i = 0; i < 9; ++i) {
          const float lse = get(forward.arguments().lse, {0, h, i});
          if (i >= 5) {
            EXPECT_TRUE(std::isfinite(lse));
            EXPECT_NE(get(forward.arguments().o, {0, i, h, 3}), 0);
            continue;
          }
          if (*sink)
            EXPECT_NEAR(lse, get(forward.arguments().sink, {h}), 1e-6);
          else
            EXPECT_EQ(lse, -INFINITY);
          for (int64_t x = 0; x < 16; ++x) {
            EXPECT_EQ(get(forward.arguments().o, {0, i, h, x}), 0);
            EXPECT_EQ(get(backward.arguments().dq, {0, i, h, x}), 0);
          }
        }
    }
}

TEST_P(Contract, EmptySequencesAnywhere) {
  for (const char* pass : {"fwd", "bwd"}) {
    const std::string p = pass;
    for (uint64_t seed = 0; seed < 8; ++seed) {
      expect_pass(parse(p + " b6 q9 k11 h2/1 d24 fp32 packed tq20 tk23 causal"), seed, Layout::kGaps);
      expect_pass(parse(p + " b6 q9 k11 h2 d24 bf16 packed tq9 tk11 sink"), seed, Layout::kBshd);
    }
    expect_pass(parse(p + " b3 q9 k11 h2 d24 fp32 packed tq0 tk0"), 0, Layout::kBshd);
    expect_pass(parse(p + " b3 q9 k11 h2 d24 fp32 packed tq12 tk0 sink"), 0, Layout::kBshd);
    expect_pass(parse(p + " b3 q9 k11 h2 d24 fp32 packed tq0 tk12"), 0, Layout::kBshd);
  }
}

TEST_P(Contract, KeysPastSequsedGetNoGradient) {
  const Problem p = parse("bwd b4 q20 k30 h2/1 d16 fp32 seqused");
  HostTrial t(p, 3);
  t.run_bits();
  const std::vector<int32_t> used = t.trial.lengths().k;
  for (int64_t b = 0; b < 4; ++b)
    for (int64_t j = used[b]; j < 30; ++j)
      for (int64_t x = 0; x < 16; ++x) {
        EXPECT_EQ(get(t.arguments().dk, {b, j, 0, x}), 0);
        EXPECT_EQ(get(t.arguments().dv, {b, j, 0, x}), 0);
      }
}

TEST_P(Contract, RowsOfNoSequenceAreNotTouched) {
  int gaps = 0;
  for (const char* pass : {"fwd", "bwd"})
    for (const char* line :
         {" b3 q40 k50 h4/2 d24 fp32 packed tq70 tk90 causal", " b5 q9 k700 h2/1 d33/20 bf16 packed tq30 tk1500 seqused sink"})
      for (uint64_t seed = 1; seed < 30; seed += 5) {
        const Problem p = parse(std::string(pass) + line);
        expect_pass(p, seed, seed % 2 ? Layout::kBshd : Layout::kPermuted);
        HostTrial t(p, seed);
        const int32_t* starts = static_cast<const int32_t*>(t.arguments().cu_seqlens_q.data);
        gaps += starts[0] > 0 && starts[p.batch] < p.total_q;
      }
  EXPECT_GT(gaps, 4);
}

TEST_P(Contract, SequsedIsCutToTheSequence) {
  for (const char* line : {" b3 q20 k30 h2/1 d16 fp32 seqused", " b3 q20 k30 h2/1 d16 fp32 seqused packed tq40 tk60 causal"})
    for (const char* pass : {"fwd", "bwd"}) {
      HostTrial t(parse(std::string(pass) + line), 3);
      const Arguments& a = t.arguments();
      const auto run_with = [&](auto used) {
        for (int64_t b = 0; b < 3; ++b) {
          const int32_t* starts = static_cast<const int32_t*>(a.cu_seqlens_k.data);
          static_cast<int32_t*>(a.seqused_k.data)[b] = used(b, starts ? starts[b + 1] - starts[b] : 30);
        }
        for (const TensorView& view : outputs_of(t.problem, a))
          std::memset(view.data, 0, bits_of(view).size() * reference::element_bytes(view.dtype));
        return t.run_bits();
      };
      for (const TensorView& view : {a.k, a.v})
        for (size_t n = 0; n < bits_of(view).size(); ++n)  // no element is NaN now, used or not
          reference::write_element(view.data, view.dtype, static_cast<int64_t>(n), static_cast<float>(n % 13) / 8 - 0.75f);
      const auto all = run_with([](int64_t, int length) { return length; });
      EXPECT_EQ(run_with([](int64_t, int length) { return length + 1; }), all) << pass << line;
      EXPECT_EQ(run_with([](int64_t, int) { return std::numeric_limits<int32_t>::max(); }), all) << pass << line;
      const auto none = run_with([](int64_t, int) { return 0; });
      EXPECT_NE(none, all);
      EXPECT_EQ(run_with([](int64_t, int) { return -1; }), none) << pass << line;
      EXPECT_EQ(run_with([](int64_t, int) { return std::numeric_limits<int32_t>::min(); }), none) << pass << line;
    }
}

TEST_P(Contract, WrongLengthsAreRefused) {
  for (const char* pass : {"fwd", "bwd"}) {
    HostTrial t(parse(std::string(pass) + " b3 q20 k30 h2/1 d16 fp32 packed tq40 tk60"), 3);
    const Plan plan = Plan::make(t.problem, Device::cpu()).value();
    const Buffer workspace = Buffer::make(plan.device(), plan.workspace_bytes() + 1).value();
    Arguments a = t.arguments();
    a.workspace = workspace.data();
    const auto before = bits_of(outputs_of(t.problem, a)[0]);
    const auto expect_refused = [&](bool keys, std::vector<int32_t> starts, const std::string& sentence) {
      Arguments wrong = a;
      (keys ? wrong.cu_seqlens_k : wrong.cu_seqlens_q).data = starts.data();
      const Status status = plan.run(wrong);
      EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << sentence;
      EXPECT_EQ(status.message(), sentence);
      EXPECT_EQ(bits_of(outputs_of(t.problem, a)[0]), before) << "written before it was refused: " << sentence;
    };
    expect_refused(false, {-1, 5, 10, 20}, "cu_seqlens_q[0] is -1, below the one before it: 0");
    expect_refused(false, {0, 10, 9, 20}, "cu_seqlens_q[2] is 9, below the one before it: 10");
    expect_refused(false, {0, 10, 25, 41}, "cu_seqlens_q[3] is 41, above the rows of the tensor: 40");
    expect_refused(false, {0, 10, 31, 40}, "cu_seqlens_q[2] is 31, a sequence longer than max_seqlen_q (the problem's q): 20");
    expect_refused(true, {-7, 5, 10, 20}, "cu_seqlens_k[0] is -7, below the one before it: 0");
    expect_refused(true, {0, 10, 20, 19}, "cu_seqlens_k[3] is 19, below the one before it: 20");
    expect_refused(true, {61, 61, 61, 61}, "cu_seqlens_k[0] is 61, above the rows of the tensor: 60");
    expect_refused(true, {0, 31, 40, 60}, "cu_seqlens_k[1] is 31, a sequence longer than max_seqlen_k (the problem's k): 30");
  }
}

// A value put into one element of one input. Rows that use it are not finite; of all others no bit changes.
struct Injection {
  const char* tensor;
  float value;
};

// The (query head, query)s of batch 1 that see key j of kv head g, and the keys that those rows see.
struct Affected {
  std::set<std::pair<int64_t, int64_t>> rows;  // (head, query)
  std::set<std::pair<int64_t, int64_t>> keys;  // (kv head, key)
};
Affected affected_by(const Problem& p, bool is_key, int64_t head, int64_t position) {
  const int64_t group = p.num_heads_q / p.num_heads_kv, offset = p.alignment == Alignment::kTopLeft ? 0 : p.seqlen_k - p.seqlen_q;
  const auto sees = [&](int64_t i, int64_t j) {
    return (p.window_left < 0 || j >= i + offset - p.window_left) && (p.window_right < 0 || j <= i + offset + p.window_right);
  };
  Affected a;
  for (int64_t h = 0; h < p.num_heads_q; ++h)
    for (int64_t i = 0; i < p.seqlen_q; ++i)
      if (is_key ? h / group == head && sees(i, position) : h == head && i == position) a.rows.insert({h, i});
  std::erase_if(a.rows, [&](const auto& row) {
    bool used = false;  // a query that sees no key is not used either
    for (int64_t j = 0; j < p.seqlen_k; ++j) {
      if (!sees(row.second, j)) continue;
      a.keys.insert({row.first / group, j});
      used = true;
    }
    return !used;
  });
  return a;
}

// changed(batch, row of the sequence, head): whether each row of a [batch, rows, heads, dim] output may change, and then
// must hold a value that is not finite.
template <class Changed>
void expect_only(const char* name, const TensorView& view, const std::vector<uint32_t>& before, const std::vector<uint32_t>& after,
                 const Changed& changed) {
  const int64_t rows = view.shape[1], heads = view.shape[2], dim = view.shape[3];
  for (int64_t b = 0; b < view.shape[0]; ++b)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t at = ((b * rows + r) * heads + h) * dim;
        bool same = true, finite = true;
        for (int64_t x = 0; x < dim; ++x) {
          same = same && before[at + x] == after[at + x];
          finite = finite && std::isfinite(get(view, {b, r, h, x}));
        }
        if (changed(b, r, h))
          ASSERT_FALSE(finite) << name << " batch " << b << " row " << r << " head " << h << " uses it, but is finite";
        else
          ASSERT_TRUE(same) << name << " batch " << b << " row " << r << " head " << h << " does not use it, but changed";
      }
}

void check_injections(const Problem& p, std::initializer_list<Injection> injections) {
  for (const Injection& injection : injections) {
    const std::string tensor = injection.tensor;
    const bool is_key = tensor == "k" || tensor == "v";
    const int64_t length = is_key ? p.seqlen_k : p.seqlen_q;
    for (int64_t position : {int64_t{0}, length / 3, length - 1}) {
      SCOPED_TRACE(p.to_string() + " with " + tensor + " " + std::to_string(position) + " set to " + std::to_string(injection.value));
      HostTrial t(p, 5);
      const Arguments& a = t.arguments();
      for (const TensorView& view : {a.q, a.k})  // an infinity of one times the other is +inf
        for (int64_t r = 0; r < view.shape[1]; ++r)
          for (int64_t h = 0; h < view.shape[2]; ++h) set(view, {1, r, h, 3}, std::abs(get(view, {1, r, h, 3})) + 0.25f);
      const auto before = t.run_bits();
      const int64_t head = is_key ? p.num_heads_kv - 1 : p.num_heads_q - 1;
      set(tensor == "q" ? a.q : tensor == "k" ? a.k : tensor == "v" ? a.v : a.do_, {1, position, head, 3}, injection.value);
      const auto after = t.run_bits();
      const Affected affected = affected_by(p, is_key, head, position);
      const auto row = [&](int64_t b, int64_t i, int64_t h) { return b == 1 && affected.rows.contains({h, i}); };
      const auto key = [&](int64_t b, int64_t j, int64_t h) { return b == 1 && affected.keys.contains({h, j}); };
      const auto none = [](int64_t, int64_t, int64_t) { return false; };
      if (p.pass == Pass::kForward) {
        expect_only("o", a.o, before[0], after[0], row);
        for (int64_t h = 0, n = 0; h < 2 * p.num_heads_q; ++h)
          for (int64_t i = 0; i < p.seqlen_q; ++i, ++n) {
            const bool used = tensor != "v" && row(h / p.num_heads_q, i, h % p.num_heads_q);
            if (used)
              ASSERT_FALSE(std::isfinite(get(a.lse, {h / p.num_heads_q, h % p.num_heads_q, i}))) << "lse " << h << " " << i;
            else
              ASSERT_EQ(before[1][n], after[1][n]) << "lse " << h << " " << i;
          }
      } else {
        expect_only("dq", a.dq, before[0], after[0], row);
        expect_only("dk", a.dk, before[1], after[1], key);
        if (tensor == "v")
          expect_only("dv", a.dv, before[2], after[2], none);  // P^T dO has no v
        else
          expect_only("dv", a.dv, before[2], after[2], key);
      }
    }
  }
}

constexpr const char* kInjected[] = {
    " b2 q70 k90 h4/2 d40 fp32 causal", " b2 q70 k90 h4/2 d40 bf16 window=20,5",
    " b2 q70 k50 h4/2 d40 fp16 causal", " b2 q150 k150 h2/1 d64 fp32 window=33,0",
    " b2 q70 k90 h4/2 d16 fp32",        " b2 q40 k300 h2/1 d24 fp32 window=3,3 topleft softcap=9",
};

TEST_P(Contract, NanAndInfinityReachTheirRowsOnlyForward) {
  for (const char* line : kInjected)
    check_injections(parse(std::string("fwd") + line), {{"q", NAN}, {"k", NAN}, {"v", NAN}, {"v", INFINITY}, {"v", -INFINITY}});
}
TEST_P(Contract, NanAndInfinityReachTheirRowsOnlyBackward) {
  for (const char* line : kInjected)
    check_injections(parse(std::string("bwd") + line),
                     {{"q", NAN}, {"k", NAN}, {"v", NAN}, {"v", INFINITY}, {"do", NAN}, {"do", INFINITY}});
}

TEST_P(Contract, KeysThatNobodyUsesChangeNoBit) {
  for (const char* line :
       {"fwd b3 q40 k70 h2/1 d24 fp32 seqused", "bwd b3 q40 k70 h2/1 d24 fp32 seqused", "bwd b3 q40 k70 h2 d40 bf16 seqused causal",
        "bwd q20 k200 h1 d16 fp32 window=3,3", "fwd q20 k200 h1 d16 fp16 topleft causal"}) {
    const Problem p = parse(line);
    HostTrial t(p, 2);  // unused keys are NaN
    const auto expected = t.run_bits();
    for (float value : {0.0f, 1e30f, -INFINITY}) {
      int64_t changed = 0;
      for (const TensorView& view : {t.arguments().k, t.arguments().v})
        for (int64_t b = 0; b < p.batch; ++b)
          for (int64_t j = 0; j < p.seqlen_k; ++j)
            for (int64_t h = 0; h < p.num_heads_kv; ++h)
              for (int64_t x = 0; x < p.head_dim; ++x) {
                const float now = get(view, {b, j, h, x});
                if (std::isnan(now) || std::abs(now) >= 1e29f || now == 0) set(view, {b, j, h, x}, value), ++changed;
              }
      ASSERT_GT(changed, 100);
      EXPECT_EQ(t.run_bits(), expected) << line << " with " << value;
    }
  }
}

TEST_P(Contract, ScoresOfMinusInfinityAreLegal) {
  for (const char* pass : {"fwd", "bwd"})
    for (const char* line : {" q30 k40 h2 d16 fp32", " q30 k40 h2 d16 bf16 causal", " q30 k300 h2 d64 fp32 sink"}) {
      SCOPED_TRACE(std::string(pass) + line);
      HostTrial t(parse(std::string(pass) + line), 1);
      const Arguments& a = t.arguments();
      const int64_t keys = t.problem.seqlen_k;
      for (int64_t i = 0; i < 30; ++i)
        for (int64_t h = 0; h < 2; ++h) set(a.q, {0, i, h, 0}, std::abs(get(a.q, {0, i, h, 0})) + 0.5f);
      for (int64_t j = 0; j < keys; j += j % 3 + 1) set(a.k, {0, j, 1, 0}, -INFINITY);
      for (int64_t j = 0; j < 12; ++j) set(a.k, {0, j, 1, 0}, -INFINITY);  // a whole tile at the start: causal rows see nothing else
      t.expect_pass();
      for (int64_t j = 0; j < keys; ++j) set(t.arguments().k, {0, j, 0, 0}, -INFINITY);
      t.expect_pass();
      const auto expect_nothing = [&] {
        EXPECT_EQ(get(t.arguments().lse, {0, 0, 29}), t.problem.sink ? get(t.arguments().sink, {0}) : -INFINITY);
        for (int64_t x = 0; x < 16; ++x) {
          EXPECT_EQ(get(t.arguments().o, {0, 29, 0, x}), 0);
          if (t.problem.pass == Pass::kForward) continue;
          EXPECT_EQ(get(t.arguments().dq, {0, 29, 0, x}), 0);
          EXPECT_EQ(get(t.arguments().dk, {0, 7, 0, x}), 0);
          EXPECT_EQ(get(t.arguments().dv, {0, 7, 0, x}), 0);
        }
      };
      if (!t.problem.sink || t.problem.pass == Pass::kForward) expect_nothing();
      // A row of lse -inf uses no value. Beside a sink, or keys that count, a weight of 0 does use its value.
      for (float value : {INFINITY, -INFINITY, NAN})
        for (int64_t position : {0, 3, 7, 33}) {
          for (int64_t h = 0; h < 2; ++h) set(t.arguments().v, {0, position, h, position % 3}, value);
          t.expect_pass();
          if (!t.problem.sink) expect_nothing();
        }
    }
}

// As in softmax, where inf - inf is NaN: all that such a row is used for is NaN, and nothing else changes.
TEST_P(Contract, ScoresOfPlusInfinityMakeTheirRowsNan) {
  for (const char* line : kInjected) {
    if (std::string_view(line).find("softcap") != std::string_view::npos) continue;  // it makes infinity finite
    for (const char* pass : {"fwd", "bwd"}) check_injections(parse(std::string(pass) + line), {{"q", INFINITY}, {"k", INFINITY}});
  }
}

TEST_P(Contract, SinksOfPlusInfinityAndNanMakeTheirRowsNan) {
  for (const char* line :
       {" b2 q40 k60 h4/2 d40 fp32 causal sink", " b2 q70 k90 h4/2 d16 bf16 window=20,5 sink", " q5 k2000 h4/2 d24 fp16 sink softcap=9"})
    for (const char* pass : {"fwd", "bwd"})
      for (float value : {INFINITY, NAN}) {
        SCOPED_TRACE(std::string(pass) + line + " with sink 2 set to " + std::to_string(value));
        HostTrial t(parse(std::string(pass) + line), 5);
        const Problem& p = t.problem;
        const auto before = t.run_bits();
        set(t.arguments().sink, {2}, value);
        const auto after = t.run_bits();
        const Arguments& a = t.arguments();
        const auto row = [&](int64_t, int64_t, int64_t h) { return h == 2; };
        const auto key = [&](int64_t, int64_t j, int64_t h) {  // the first ones nobody sees
          return h == 1 && (p.window_left < 0 || j >= p.seqlen_k - p.seqlen_q - p.window_left);
        };
        if (p.pass == Pass::kForward) {
          expect_only("o", a.o, before[0], after[0], row);
          for (int64_t b = 0, n = 0; b < p.batch; ++b)
            for (int64_t h = 0; h < p.num_heads_q; ++h)
              for (int64_t i = 0; i < p.seqlen_q; ++i, ++n)
                ASSERT_TRUE(h == 2 ? std::isnan(get(a.lse, {b, h, i})) : before[1][n] == after[1][n]) << "lse " << h << " " << i;
        } else {
          expect_only("dq", a.dq, before[0], after[0], row);
          expect_only("dk", a.dk, before[1], after[1], key);
          expect_only("dv", a.dv, before[2], after[2], key);
          for (int64_t h = 0; h < p.num_heads_q; ++h)
            EXPECT_TRUE(h == 2 ? std::isnan(get(a.dsink, {h})) : before[3][h] == after[3][h]) << "dsink " << h;
        }
        t.expect_pass();
      }
}

// Zero queries give equal scores, a power of two of them the exact weight 1/n; sums of small integers are exact.
TEST_P(Contract, SmallIntegersAreExact) {
  for (const char* dtype : {"fp32", "bf16", "fp16"})
    for (int64_t keys : {1, 2, 4, 32, 128, 1024}) {
      HostTrial t(parse("fwd q7 k" + std::to_string(keys) + " h2/1 d40 " + dtype));
      const Arguments& a = t.arguments();
      fill(a.q, 0);
      std::vector<double> sums(40);
      for (int64_t j = 0; j < keys; ++j)
        for (int64_t x = 0; x < 40; ++x) {
          const int value = static_cast<int>((j * 7 + x * 3) % 9) - 4;
          set(a.v, {0, j, 0, x}, static_cast<float>(value)), sums[x] += value;
        }
      t.run_bits();
      for (int64_t i = 0; i < 7; ++i)
        for (int64_t h = 0; h < 2; ++h) {
          EXPECT_NEAR(get(a.lse, {0, h, i}), std::log(static_cast<double>(keys)), 1e-6);
          for (int64_t x = 0; x < 40; ++x) {
            set(a.q, {0, 0, 0, 0}, static_cast<float>(sums[x] / static_cast<double>(keys)));  // rounded to the type
            ASSERT_EQ(get(a.o, {0, i, h, x}), get(a.q, {0, 0, 0, 0})) << dtype << " " << keys << " keys";
          }
        }
    }
}

TEST_P(Contract, OneKeyOrOneDominatingKeyIsItsValueBitwise) {
  for (const char* dtype : {"fp32", "bf16", "fp16"}) {
    HostTrial one(parse("fwd q19 k1 h4/2 d33 " + std::string(dtype)));
    one.run_bits();
    HostTrial dominated(parse("fwd q19 k300 h4/2 d33 " + std::string(dtype) + " scale=1"));
    fill(dominated.arguments().q, 4);
    fill(dominated.arguments().k, -4);
    for (int64_t h = 0; h < 2; ++h)
      for (int64_t x = 0; x < 33; ++x) set(dominated.arguments().k, {0, 211, h, x}, 4);
    dominated.run_bits();
    for (int64_t i = 0; i < 19; ++i)
      for (int64_t h = 0; h < 4; ++h)
        for (int64_t x = 0; x < 33; ++x) {
          ASSERT_EQ(get(one.arguments().o, {0, i, h, x}), get(one.arguments().v, {0, 0, h / 2, x}));
          ASSERT_EQ(get(dominated.arguments().o, {0, i, h, x}), get(dominated.arguments().v, {0, 211, h / 2, x}));
        }
    EXPECT_NEAR(get(dominated.arguments().lse, {0, 3, 7}), 4 * 4 * 33, 1e-4);
  }
}

TEST_P(Contract, SinkAndLseGradients) {
  // Both with and without dlse among the seeds, against float64, whose gradients are tested against differences.
  for (const char* line : {"bwd b2 q40 k50 h4/2 d16 fp32 sink", "bwd b2 q40 k50 h4/2 d16 bf16 sink causal",
                           "bwd q60 k20 h2 d64 fp16 sink causal", "bwd b3 q30 k30 h2 d32 fp32 sink packed tq40 tk40 alibi"})
    for (uint64_t seed = 0; seed < 6; ++seed) expect_pass(parse(line), seed, Layout::kBshd);
}

// The library's gradients against differences of the library's own values.
TEST_P(Contract, GradientsAreDerivatives) {
  const Problem p = parse("bwd b2 q6 k9 h4/2 d5/3 fp32 causal softcap=3 alibi sink");
  Problem forward = p;
  forward.pass = Pass::kForward;
  uint64_t seed = 0;
  while (!HostTrial(p, seed).arguments().dlse) ++seed;
  HostTrial t(p, seed);
  t.run_bits();
  const Arguments& a = t.arguments();
  const auto loss = [&] {
    Arguments f = a;
    f.do_ = f.dlse = f.dq = f.dk = f.dv = f.dsink = {};
    run(forward, f);
    double sum = 0;
    for (int64_t b = 0; b < 2; ++b)
      for (int64_t i = 0; i < 6; ++i)
        for (int64_t h = 0; h < 4; ++h) {
          sum += static_cast<double>(get(a.lse, {b, h, i})) * get(a.dlse, {b, h, i});
          for (int64_t x = 0; x < 3; ++x) sum += static_cast<double>(get(a.o, {b, i, h, x})) * get(a.do_, {b, i, h, x});
        }
    return sum;
  };
  const auto check = [&](const char* name, const TensorView& view, std::initializer_list<int64_t> index, float gradient) {
    const float kept = get(view, index);
    double differences[2];
    for (int level = 0; level < 2; ++level) {
      const double step = level ? 0.03125 : 0.0625;
      set(view, index, static_cast<float>(kept + step));
      const double above = loss(), x_above = get(view, index);
      set(view, index, static_cast<float>(kept - step));
      differences[level] = (above - loss()) / (x_above - get(view, index));
    }
    set(view, index, kept);
    EXPECT_NEAR(gradient, (4 * differences[1] - differences[0]) / 3, 3e-4 * (1 + std::abs(gradient))) << name;
  };
  for (int64_t n = 0; n < 5; ++n) {
    check("dq", a.q, {1, n, n % 4, n}, get(a.dq, {1, n, n % 4, n}));
    check("dk", a.k, {1, n, n % 2, n}, get(a.dk, {1, n, n % 2, n}));
    check("dv", a.v, {0, n, n % 2, n % 3}, get(a.dv, {0, n, n % 2, n % 3}));
    if (n < 4) check("dsink", a.sink, {n}, get(a.dsink, {n}));
  }
}

TEST_P(Contract, ScaleMayBeNegativeOrZero) {
  for (const char* line :
       {"fwd q50 k70 h2 d32 fp32 scale=-0.5", "bwd q50 k70 h2 d32 fp32 scale=-0.5", "fwd q50 k70 h2 d32 bf16 scale=0 causal",
        "bwd q50 k70 h2 d32 fp32 scale=0 causal", "bwd q50 k70 h2 d32 fp16 scale=-0.1 sink"})
    expect_pass(parse(line), 1, Layout::kBshd);
}

TEST_P(Contract, LargeScoresStayFinite) {
  for (const char* line :
       {"fwd q100 k300 h2 d64 fp32 scale=400", "bwd q100 k300 h2 d64 fp32 scale=400", "bwd q100 k300 h2 d64 bf16 scale=-1250 causal",
        "bwd q33 k1 h2 d64 fp32 scale=1250", "bwd q33 k2 h2 d1 fp32 scale=10000"}) {
    HostTrial t(parse(line), 4);
    t.run_bits();
    for (const TensorView& output : outputs_of(t.problem, t.arguments()))
      for (uint32_t element : bits_of(output)) {
        const float value =
            output.dtype == DataType::kFloat32 ? std::bit_cast<float>(element) : reference::from_bfloat16(static_cast<uint16_t>(element));
        ASSERT_TRUE(std::isfinite(value)) << line;
      }
    expect_pass(t.problem, 4, Layout::kBshd);
  }
}

TEST_P(Contract, LseSpansItsRangeInBackward) {
  // Two keys whose scores differ by 1, far from zero: p = 1 / (1 + e) whatever lse is.
  for (float score : {-1e4f, -300.0f, 0.0f, 300.0f, 1e4f}) {
    HostTrial t(parse("bwd q1 k2 h1 d1 fp32 scale=1"), 0);
    const Arguments& a = t.arguments();
    if (a.dlse) set(a.dlse, {0, 0, 0}, 0);
    set(a.q, {0, 0, 0, 0}, 1), set(a.do_, {0, 0, 0, 0}, 1);
    set(a.k, {0, 0, 0, 0}, score), set(a.k, {0, 1, 0, 0}, score + 1);
    set(a.v, {0, 0, 0, 0}, 0), set(a.v, {0, 1, 0, 0}, 1);
    t.run_bits();
    const double p = 1 / (1 + std::exp(1.0)), tolerance = 1e-6 + 2e-7 * std::abs(score);
    EXPECT_NEAR(get(a.lse, {0, 0, 0}), score + 1 + std::log1p(std::exp(-1.0)), tolerance);
    EXPECT_NEAR(get(a.dv, {0, 0, 0, 0}), p, tolerance);
    EXPECT_NEAR(get(a.dk, {0, 1, 0, 0}), p * (1 - p), tolerance);
  }
}

TEST_P(Contract, OptionalTensorsMayBeLeftOut) {
  HostTrial forward(parse("fwd q40 k50 h2 d24 fp32 sink"), 1);
  const auto expected = forward.run_bits();
  Arguments a = forward.arguments();
  a.lse = {};
  fill(a.o, NAN);
  run(forward.problem, a);
  EXPECT_EQ(bits_of(a.o), expected[0]);

  HostTrial backward(parse("bwd q40 k50 h2 d24 fp32 sink"), 1);
  const auto gradients = backward.run_bits();
  a = backward.arguments();
  a.dsink = {};
  run(backward.problem, a);
  EXPECT_EQ(bits_of(a.dq), gradients[0]);
  EXPECT_EQ(bits_of(a.dk), gradients[1]);
}

TEST_P(Contract, ErrorsHaveNoDirection) {
  for (const char* line : {"fwd q400 h3 d64 fp32", "fwd q400 h3 d64 bf16 causal", "bwd q300 h3 d64 fp32", "bwd q300 h3 d64 bf16 causal"}) {
    const auto report = reference::verify(parse(line), Device::cpu(), 8, Layout::kBshd).value();
    EXPECT_TRUE(report.pass) << report.first_failure;
    for (const reference::TensorReport& tensor : report.tensors) {
      if (tensor.name == "lse") continue;
      EXPECT_LT(std::abs(tensor.mean_signed), 0.05 * tensor.mean) << line << " " << tensor.name;
    }
  }
}

}  // namespace
}  // namespace tilewise
