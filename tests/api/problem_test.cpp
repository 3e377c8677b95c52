// The grammar of problems and the rules of legal ones.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <sstream>

#include "core/config.h"
#include "tilewise/tilewise.hpp"

namespace tilewise {
namespace {

std::string error_of(std::string_view text) { return Problem::parse(text).status().message(); }

TEST(Problem, PrintsEveryToken) {
  Problem p;
  p.seqlen_q = 4096;
  p.seqlen_k = 8192;
  p.head_dim = p.head_dim_v = 128;
  EXPECT_EQ(p.to_string(), "fwd b1 q4096 k8192 h1 d128 fp32");
  p.pass = Pass::kBackward;
  p.dtype = DataType::kBFloat16;
  p.batch = 2;
  p.num_heads_q = 32;
  p.num_heads_kv = 8;
  p.head_dim_v = 64;
  p.window_right = 0;
  p.alignment = Alignment::kTopLeft;
  p.packed = true;
  p.total_q = 300;
  p.total_k = 400;
  p.seqused_k = p.alibi = p.sink = p.deterministic = p.accumulate = true;
  p.softmax_scale = 0.1f;
  p.softcap = 30;
  EXPECT_EQ(p.to_string(),
            "bwd b2 q4096 k8192 h32/8 d128/64 bf16 causal topleft packed tq300 tk400 seqused scale=0.1 softcap=30 alibi sink deterministic "
            "accumulate");
  EXPECT_EQ(*Problem::parse(p.to_string()), p);
}

TEST(Problem, ParsesInAnyOrderWithDefaults) {
  const Problem p = *Problem::parse("\tcausal  d64 q10\nfp16 h4 ");
  EXPECT_EQ(p.pass, Pass::kForward);
  EXPECT_EQ(p.dtype, DataType::kFloat16);
  EXPECT_EQ(p.batch, 1);
  EXPECT_EQ(p.seqlen_k, 10);
  EXPECT_EQ(p.num_heads_kv, 4);
  EXPECT_EQ(p.head_dim_v, 64);
  EXPECT_EQ(p.window_left, -1);
  EXPECT_EQ(p.window_right, 0);
  EXPECT_EQ(p.to_string(), "fwd b1 q10 k10 h4 d64 fp16 causal");
  EXPECT_EQ(*Problem::parse("q10 d64 window=-1,0"), *Problem::parse("q10 d64 causal"));
  EXPECT_FLOAT_EQ(p.scale(), 0.125f);
  EXPECT_EQ(Problem::parse("q1 d64 scale=0.3")->scale(), 0.3f);
}

TEST(Problem, EveryLegalProblemSurvivesTheRoundTrip) {
  std::mt19937_64 random(1);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
  const auto any_float = [&] {
    for (;;) {
      const float value = std::bit_cast<float>(static_cast<uint32_t>(random()));
      if (std::isfinite(value)) return value;
    }
  };
  for (int i = 0; i < 20000; ++i) {
    Problem p;
    p.pass = static_cast<Pass>(below(2));
    p.dtype = static_cast<DataType>(below(3));
    p.batch = below(5);
    p.seqlen_q = below(i % 2 ? 10 : kMaxSeqlen);
    p.seqlen_k = below(i % 3 ? 10 : kMaxSeqlen);
    p.num_heads_kv = 1 + below(8);
    p.num_heads_q = p.num_heads_kv * (1 + below(4));
    p.head_dim = 1 + below(512);
    p.head_dim_v = below(2) ? p.head_dim : 1 + below(512);
    if (below(2)) p.softmax_scale = any_float();
    if (below(2)) p.softcap = std::abs(any_float());
    if (below(2)) p.window_left = below(3) ? below(100) : std::numeric_limits<int64_t>::max() - below(2);
    if (below(2)) p.window_right = below(2) ? below(100) : 0;
    p.alignment = static_cast<Alignment>(below(2));
    p.packed = below(2);
    if (p.packed) {
      p.total_q = std::min<int64_t>(below(p.batch * p.seqlen_q + 1), kMaxSeqlen);
      p.total_k = std::min<int64_t>(below(p.batch * p.seqlen_k + 1), kMaxSeqlen);
    }
    p.seqused_k = below(2);
    p.alibi = below(2);
    p.sink = below(2);
    p.deterministic = below(2);
    p.accumulate = p.pass == Pass::kBackward && below(2);
    ASSERT_TRUE(p.validate().ok()) << p.validate().message();
    const Result<Problem> again = Problem::parse(p.to_string());
    ASSERT_TRUE(again.ok()) << p.to_string() << ": " << again.status().message();
    ASSERT_EQ(*again, p) << p.to_string();
  }
}

TEST(Problem, BadTokensAreNamed) {
  EXPECT_EQ(error_of(""), "the problem has no q: the number of queries, as in q4096");
  EXPECT_EQ(error_of("q4"), "the problem has no d: the head dimension, as in d128 or d192/128");
  EXPECT_EQ(error_of("q4 d8 q5"), "token 'q5' sets again what token 'q4' has set");
  EXPECT_EQ(error_of("fwd q4 d8 bwd"), "token 'bwd' sets again what token 'fwd' has set");
  EXPECT_EQ(error_of("q4 d8 causal window=3,0"), "token 'window=3,0' sets again what token 'causal' has set: window=L,0 already is causal");
  EXPECT_EQ(error_of("q4 d8 window=3,0 causal"), "token 'causal' sets again what token 'window=3,0' has set: window=L,0 already is causal");
  EXPECT_EQ(error_of("q4 d8 window=3,0 window=3,1"), "token 'window=3,1' sets again what token 'window=3,0' has set");
  EXPECT_EQ(error_of("q d8"), "token 'q' needs a number, as in q4096");
  EXPECT_EQ(error_of("q4 d"), "token 'd' needs a number, as in d128 or d192/128");
  EXPECT_EQ(error_of("q4 d8 fp32 fp16"), "token 'fp16' sets again what token 'fp32' has set");
  EXPECT_EQ(error_of("q9223372036854775808 d8"), "token 'q9223372036854775808' has a number that is out of range");
  EXPECT_EQ(error_of("q4 d8 scale=1e99"), "token 'scale=1e99' has a number that is out of range");
  EXPECT_EQ(error_of("q4x d8"), "token 'q4x' has '4x' where a number belongs");
  EXPECT_EQ(error_of("q4 d8 scale="), "token 'scale=' has '' where a number belongs");
  EXPECT_EQ(error_of("q4 d8/"), "token 'd8/' has '' where a number belongs");
  EXPECT_EQ(error_of("q4 d8/4/2"), "token 'd8/4/2' has '4/2' where a number belongs");
  EXPECT_EQ(error_of("q4 d8 window=1"), "token 'window=1' needs two numbers, as in window=128,0 (-1: unbounded)");
  EXPECT_EQ(error_of("q4 d8 packed tq4"), "packed needs tq and tk, the rows of all sequences together, as in packed tq300 tk400");
  for (const char* token : {"b", "q", "k", "h", "d", "tq", "tk"})
    EXPECT_EQ(error_of(std::string("q4 d8 ") + token).find("token '" + std::string(token) + "' needs a number, as in " + token), 0u)
        << token;
  for (const char* token : {"foo", "Q4", "t", "causa", "causal,", "window", "scale", "q+4", "=", "fp64", "\x01"}) {
    const std::string error = error_of(std::string("q4 d8 ") + token);
    EXPECT_EQ(error.find("token '" + std::string(token) + "' is none of fwd bwd "), 0u) << error;
  }
}

TEST(Problem, EveryFieldIsSetOnce) {
  const std::string line =
      "bwd b2 q8 k9 h4 d8 bf16 causal topleft packed tq3 tk4 seqused scale=1 softcap=2 alibi sink deterministic "
      "accumulate";
  ASSERT_TRUE(Problem::parse(line).ok()) << error_of(line);
  std::istringstream words(line);
  for (std::string token; words >> token;) {
    EXPECT_EQ(error_of(line + " " + token), "token '" + token + "' sets again what token '" + token + "' has set");
  }
}

struct Rule {
  const char* text;
  const char* error;
};

TEST(Problem, IllegalProblemsAreRefused) {
  for (const Rule& rule : {
           Rule{"q4 d8 h30/8", "num_heads_q 30 is not a multiple of num_heads_kv 8"},
           Rule{"q4 d8 h2/4", "num_heads_q 2 is not a multiple of num_heads_kv 4"},
           Rule{"q4 d8 h0", "num_heads_q 0 is not positive"},
           Rule{"q4 d8 h4/0", "num_heads_kv 0 is not positive"},
           Rule{"q4 d0", "head_dim 0 is not positive"},
           Rule{"q4 d8/-1", "head_dim_v -1 is not positive"},
           Rule{"q-4 d8", "seqlen_q -4 is negative"},
           Rule{"q4 k-1 d8", "seqlen_k -1 is negative"},
           Rule{"b-1 q4 d8", "batch -1 is negative"},
           Rule{"q1073741823 d8", "seqlen_q 1073741823 is more than 1073741822"},
           Rule{"q4 d8 window=-2,0", "window_left -2 is less than -1, which means unbounded"},
           Rule{"q4 d8 window=0,-2", "window_right -2 is less than -1, which means unbounded"},
           Rule{"q4 d8 tq4", "total_q 4 is given, but the problem is not packed"},
           Rule{"b2 q4 k5 d8 packed tq9 tk3", "total_q 9 is more than batch 2 times seqlen_q 4"},
           Rule{"b2 q4 k5 d8 packed tq8 tk11", "total_k 11 is more than batch 2 times seqlen_k 5"},
           Rule{"b2 q4 d8 packed tq8 tk-1", "total_k -1 is negative"},
           Rule{"q4 d8 scale=nan", "softmax_scale nan is not finite"},
           Rule{"q4 d8 scale=-inf", "softmax_scale -inf is not finite"},
           Rule{"q4 d8 softcap=inf", "softcap inf is not finite"},
           Rule{"q4 d8 softcap=-1", "softcap -1 is negative"},
           Rule{"b1000000000 q1000000000 d8",
                "q of 1000000000000000000 rows, 1 heads and 8 dimensions has more elements than "
                "36028797018963967"},
       }) {
    EXPECT_EQ(error_of(rule.text), rule.error) << rule.text;
  }
  Problem p = *Problem::parse("q4 d8");
  p.dtype = DataType::kInt32;
  EXPECT_EQ(p.validate().message(), "dtype int32 is none of fp32, bf16 and fp16");
  p = *Problem::parse("q4 d8");
  p.pass = static_cast<Pass>(7);
  EXPECT_EQ(p.validate().message(), "pass 7 is neither forward nor backward");
  EXPECT_EQ(p.validate().code(), StatusCode::kInvalidArgument);
  p = *Problem::parse("q4 d8");
  p.alignment = static_cast<Alignment>(-1);
  EXPECT_EQ(p.validate().message(), "alignment -1 is neither bottom_right nor top_left");
}

TEST(Problem, EmptyProblemsAreLegal) {
  for (const char* text : {"b0 q4 d8", "q0 k5 d8", "q5 k0 d8", "b3 q5 d8 packed tq0 tk0", "b0 q5 d8 packed tq0 tk0"}) {
    EXPECT_TRUE(Problem::parse(text).ok()) << error_of(text);
  }
}

}  // namespace
}  // namespace tilewise
