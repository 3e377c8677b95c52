// float64 attention: cases computed by hand, and its gradients against differences of its own values.
#include "reference/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>

#include "host_tensors.h"
#include "reference/trial.h"

namespace tilewise::reference {
namespace {

constexpr double kInf = INFINITY;

// One head of dimension 1 with softmax_scale 1, so that score(i, j) = q_i * k_j.
Problem scalar_problem(int64_t seqlen_q, int64_t seqlen_k) {
  Problem p;
  p.seqlen_q = seqlen_q, p.seqlen_k = seqlen_k, p.head_dim = p.head_dim_v = 1, p.softmax_scale = 1.0f;
  return p;
}

TEST(Attention, OneKeyIsItsValue) {
  HostTensors t(scalar_problem(1, 1), 0);
  t.set(t.arguments.q, {3}), t.set(t.arguments.k, {-2}), t.set(t.arguments.v, {7});
  const Outputs out = attention(t.problem, t.arguments);
  EXPECT_DOUBLE_EQ(out.o[0], 7);
  EXPECT_DOUBLE_EQ(out.lse[0], -6);
}

TEST(Attention, EqualScoresAverage) {
  HostTensors t(scalar_problem(1, 4), 0);
  t.set(t.arguments.q, {1}), t.set(t.arguments.k, {2, 2, 2, 2}), t.set(t.arguments.v, {1, 2, 3, 10});
  const Outputs out = attention(t.problem, t.arguments);
  EXPECT_DOUBLE_EQ(out.o[0], 4);
  EXPECT_DOUBLE_EQ(out.lse[0], 2 + std::log(4.0));
}

TEST(Attention, WeightsAreExponentials) {
  HostTensors t(scalar_problem(1, 2), 0);
  const float log3 = std::log(3.0f);
  t.set(t.arguments.q, {1}), t.set(t.arguments.k, {0, log3}), t.set(t.arguments.v, {4, 8});
  const Outputs out = attention(t.problem, t.arguments);
  EXPECT_NEAR(out.o[0], 4 * 0.25 + 8 * 0.75, 1e-7);
  EXPECT_NEAR(out.lse[0], std::log(4.0), 1e-7);
}

TEST(Attention, SoftcapBoundsScores) {
  Problem p = scalar_problem(1, 1);
  p.softcap = 2;
  HostTensors t(p, 0);
  t.set(t.arguments.q, {3}), t.set(t.arguments.k, {1}), t.set(t.arguments.v, {1});
  EXPECT_DOUBLE_EQ(attention(p, t.arguments).lse[0], 2 * std::tanh(1.5));
}

TEST(Attention, AlibiCountsFromTheDiagonal) {
  Problem p = scalar_problem(1, 3);
  p.alibi = true;
  HostTensors t(p, 1);
  t.set(t.arguments.q, {0}), t.set(t.arguments.alibi_slopes, {0.5f}), t.set(t.arguments.v, {1, 0, 0});
  // Bottom right: the query stands at key 2.
  const double sum = std::exp(-1.0) + std::exp(-0.5) + 1;
  EXPECT_NEAR(attention(p, t.arguments).o[0], std::exp(-1.0) / sum, 1e-12);
  p.alignment = Alignment::kTopLeft;  // at key 0
  EXPECT_NEAR(attention(p, t.arguments).o[0], 1 / sum, 1e-12);
}

TEST(Attention, CausalAlignments) {
  Problem p = scalar_problem(2, 3);
  p.window_right = 0;
  HostTensors t(p, 0);
  t.set(t.arguments.q, {0, 0}), t.set(t.arguments.v, {1, 3, 8});
  Outputs out = attention(p, t.arguments);
  EXPECT_DOUBLE_EQ(out.o[0], 2);
  EXPECT_DOUBLE_EQ(out.o[1], 4);
  p.alignment = Alignment::kTopLeft;
  out = attention(p, t.arguments);
  EXPECT_DOUBLE_EQ(out.o[0], 1);
  EXPECT_DOUBLE_EQ(out.o[1], 2);
}

TEST(Attention, WindowIsInclusive) {
  Problem p = scalar_problem(5, 5);
  p.window_left = 1, p.window_right = 2;
  HostTensors t(p, 0);
  t.set(t.arguments.q, {0, 0, 0, 0, 0}), t.set(t.arguments.v, {1, 10, 100, 1000, 10000});
  const Outputs out = attention(p, t.arguments);
  EXPECT_NEAR(out.o[2] * 4, 10 + 100 + 1000 + 10000, 1e-9);
  EXPECT_NEAR(out.o[4] * 2, 1000 + 10000, 1e-9);
}

TEST(Attention, RowThatSeesNothing) {
  Problem p = scalar_problem(3, 1);
  p.window_right = 0, p.pass = Pass::kBackward;  // bottom right: only the last query sees the key
  HostTensors t(p, 1);
  Outputs out = attention(p, t.arguments);
  for (int i : {0, 1}) {
    EXPECT_EQ(out.o[i], 0);
    EXPECT_EQ(out.lse[i], -kInf);
    EXPECT_EQ(out.dq[i], 0);
  }
  EXPECT_NE(out.o[2], 0);

  p.sink = true;
  HostTensors with_sink(p, 1);
  out = attention(p, with_sink.arguments);
  EXPECT_EQ(out.o[0], 0);
  EXPECT_EQ(out.lse[0], with_sink.get(with_sink.arguments.sink, 0));
  EXPECT_EQ(out.dq[0], 0);
}

TEST(Attention, ScoresOfMinusInfinity) {
  HostTensors t(scalar_problem(2, 3), 0);
  t.set(t.arguments.q, {1, -1}), t.set(t.arguments.k, {0, INFINITY, INFINITY}), t.set(t.arguments.v, {5, 6, 7});
  const Outputs out = attention(t.problem, t.arguments);
  EXPECT_TRUE(std::isnan(out.o[0]));  // +inf - inf
  EXPECT_DOUBLE_EQ(out.o[1], 5);
  EXPECT_DOUBLE_EQ(out.lse[1], 0);

  HostTensors all(scalar_problem(1, 2), 0);
  all.set(all.arguments.q, {-1}), all.set(all.arguments.k, {INFINITY, INFINITY}), all.set(all.arguments.v, {NAN, INFINITY});
  EXPECT_EQ(attention(all.problem, all.arguments).o[0], 0);
  EXPECT_EQ(attention(all.problem, all.arguments).lse[0], -kInf);
}

TEST(Attention, RowsOfMinusInfinityHaveNoGradient) {
  Problem p = scalar_problem(2, 2);
  p.pass = Pass::kBackward;
  HostTensors t(p, 1);
  t.set(t.arguments.q, {-1, 1}), t.set(t.arguments.k, {INFINITY, INFINITY});
  t.set(t.arguments.v, {NAN, 1}), t.set(t.arguments.do_, {NAN, 1});
  Outputs out = attention(p, t.arguments);
  EXPECT_EQ(out.dq[0], 0);
  EXPECT_TRUE(std::isnan(out.dq[1]));  // scores of +inf
  EXPECT_TRUE(std::isnan(out.dv[0]));
  t.set(t.arguments.q, {-1, -2});
  out = attention(p, t.arguments);
  for (const std::vector<double>& gradient : {out.dq, out.dk, out.dv}) EXPECT_EQ(gradient, std::vector<double>(2, 0.0));
}

TEST(Attention, PlusInfinityMakesItsRowNan) {
  HostTensors t(scalar_problem(2, 3), 0);
  t.set(t.arguments.q, {1, 0}), t.set(t.arguments.k, {0, INFINITY, 1}), t.set(t.arguments.v, {5, 6, 7});
  Outputs out = attention(t.problem, t.arguments);
  for (int i : {0, 1}) EXPECT_TRUE(std::isnan(out.o[i]) && std::isnan(out.lse[i])) << i;  // +inf; 0 * inf

  Problem p = scalar_problem(2, 1);
  p.sink = true, p.window_right = 0;  // the first query sees nothing
  for (float sink : {INFINITY, NAN}) {
    HostTensors with_sink(p, 0);
    with_sink.set(with_sink.arguments.sink, {sink});
    out = attention(p, with_sink.arguments);
    EXPECT_EQ(out.o[0], 0);
    EXPECT_EQ(std::isnan(out.lse[0]), std::isnan(sink));
    EXPECT_TRUE(std::isnan(out.o[1]) && std::isnan(out.lse[1])) << sink;
  }
}

TEST(Attention, SinkTakesPartInTheSum) {
  Problem p = scalar_problem(1, 1);
  p.sink = true;
  HostTensors t(p, 0);
  t.set(t.arguments.q, {0}), t.set(t.arguments.v, {8}), t.set(t.arguments.sink, {std::log(3.0f)});
  const Outputs out = attention(p, t.arguments);
  EXPECT_NEAR(out.o[0], 2, 1e-6);
  EXPECT_NEAR(out.lse[0], std::log(4.0), 1e-7);
}

TEST(Attention, NanGoesToItsRowsOnly) {
  Problem p = scalar_problem(4, 4);
  p.window_right = 0;
  HostTensors t(p, 0);
  for (const TensorView& view : {t.arguments.k, t.arguments.v}) {
    const float kept = t.get(view, 2);
    write_element(view.data, view.dtype, 2, NAN);
    const Outputs out = attention(p, t.arguments);
    for (int i = 0; i < 4; ++i) EXPECT_EQ(std::isnan(out.o[i]), i >= 2);
    write_element(view.data, view.dtype, 2, kept);
  }
}

TEST(Attention, GroupedHeadsShareKeys) {
  Problem p = scalar_problem(3, 5);
  p.num_heads_q = 6, p.num_heads_kv = 2, p.head_dim = p.head_dim_v = 4;
  HostTensors grouped(p, 3);
  const Outputs expected = attention(p, grouped.arguments);
  Problem each = p;
  each.num_heads_kv = 6;
  HostTensors repeated(each, 3);
  for (int64_t n = 0; n < 3 * 6 * 4; ++n) write_element(repeated.arguments.q.data, p.dtype, n, grouped.get(grouped.arguments.q, n));
  for (auto [from, to] : {std::pair(grouped.arguments.k, repeated.arguments.k), std::pair(grouped.arguments.v, repeated.arguments.v)})
    for (int64_t row = 0; row < 5; ++row)
      for (int64_t head = 0; head < 6; ++head)
        for (int64_t x = 0; x < 4; ++x)
          write_element(to.data, p.dtype, (row * 6 + head) * 4 + x, grouped.get(from, (row * 2 + head / 3) * 4 + x));
  EXPECT_EQ(attention(each, repeated.arguments).o, expected.o);
}

TEST(Attention, PackedIsALoopOverSequences) {
  Problem p = scalar_problem(6, 7);
  p.num_heads_q = 2, p.num_heads_kv = 1, p.head_dim = 3, p.head_dim_v = 2, p.window_right = 0, p.pass = Pass::kBackward;
  p.batch = 4, p.packed = true, p.total_q = 12, p.total_k = 15;
  HostTensors t(p, 4);
  const Arguments& a = t.arguments;
  const Outputs out = attention(p, a);
  const int32_t* cu_q = static_cast<const int32_t*>(a.cu_seqlens_q.data);
  const int32_t* cu_k = static_cast<const int32_t*>(a.cu_seqlens_k.data);
  for (int b = 0; b < 4; ++b) {
    Problem one = p;
    one.packed = false, one.batch = 1, one.total_q = one.total_k = 0;
    one.seqlen_q = cu_q[b + 1] - cu_q[b], one.seqlen_k = cu_k[b + 1] - cu_k[b];
    Arguments dense = a;
    dense.cu_seqlens_q = dense.cu_seqlens_k = {};
    const auto part = [&](TensorView view, int64_t begin, int64_t rows) {
      view.data = static_cast<float*>(view.data) + begin * view.stride[0];
      view.rank = 4, view.shape = {1, rows, view.shape[1], view.shape[2]}, view.stride = {0, view.stride[0], view.stride[1], 1};
      return view;
    };
    dense.q = part(a.q, cu_q[b], one.seqlen_q), dense.do_ = part(a.do_, cu_q[b], one.seqlen_q);
    dense.k = part(a.k, cu_k[b], one.seqlen_k), dense.v = part(a.v, cu_k[b], one.seqlen_k);
    if (a.dlse) {
      dense.dlse.data = static_cast<float*>(a.dlse.data) + cu_q[b];
      dense.dlse.rank = 3, dense.dlse.shape = {1, 2, one.seqlen_q}, dense.dlse.stride = {0, p.total_q, 1};
    }
    const Outputs expected = attention(one, dense);
    EXPECT_TRUE(std::equal(expected.o.begin(), expected.o.end(), out.o.begin() + cu_q[b] * 2 * 2)) << b;
    EXPECT_TRUE(std::equal(expected.dq.begin(), expected.dq.end(), out.dq.begin() + cu_q[b] * 2 * 3)) << b;
    EXPECT_TRUE(std::equal(expected.dk.begin(), expected.dk.end(), out.dk.begin() + cu_k[b] * 3)) << b;
    EXPECT_TRUE(std::equal(expected.dv.begin(), expected.dv.end(), out.dv.begin() + cu_k[b] * 2)) << b;
    for (int head = 0; head < 2; ++head)
      for (int i = 0; i < one.seqlen_q; ++i) EXPECT_EQ(expected.lse[head * one.seqlen_q + i], out.lse[head * p.total_q + cu_q[b] + i]);
  }
}

// sum(o * do) + sum(lse * dlse): its derivatives are what backward returns. Rows without a key have no finite lse.
double loss(const HostTensors& t) {
  const Outputs out = attention(t.problem, t.arguments);
  double sum = 0;
  for (size_t n = 0; n < out.o.size(); ++n) sum += out.o[n] * t.get(t.arguments.do_, n);
  if (t.arguments.dlse)
    for (size_t n = 0; n < out.lse.size(); ++n)
      if (std::isfinite(out.lse[n])) sum += out.lse[n] * t.get(t.arguments.dlse, n);
  return sum;
}

// Central differences over three steps, extrapolated: the error falls with the sixth power of the step. All steps are
// exact in float32, as the inputs are multiples of 2^-10.
double derivative(HostTensors& t, const TensorView& view, int64_t index) {
  float& x = static_cast<float*>(view.data)[index];
  const float kept = x;
  double d[3];
  for (int level = 0; level < 3; ++level) {
    const float step = std::ldexp(0x1p-4f, -level);
    x = kept + step;
    const double above = loss(t);
    x = kept - step;
    d[level] = (above - loss(t)) / (2 * static_cast<double>(step));
  }
  x = kept;
  const double first = (4 * d[1] - d[0]) / 3, second = (4 * d[2] - d[1]) / 3;
  return (16 * second - first) / 15;
}

TEST(Attention, GradientsAreDerivatives) {
  FuzzLimits limits;
  limits.max_products = 400, limits.max_head_dim = 4;
  int sinks = 0, caps = 0, packed = 0, slopes = 0;
  for (uint64_t seed = 0; seed < 200; ++seed) {
    Problem p = random_problem(seed, limits);
    p.dtype = DataType::kFloat32, p.pass = Pass::kBackward;
    if (p.softcap > 0) p.softcap = std::max(p.softcap, 1.0f);  // sharper bends need smaller steps
    SCOPED_TRACE(p.to_string() + " seed " + std::to_string(seed));
    HostTensors t(p, seed);
    if (t.count(t.arguments.q) + t.count(t.arguments.k) + t.count(t.arguments.v) > 200) continue;  // each takes six evaluations
    const Outputs out = attention(p, t.arguments);
    const auto check = [&](const char* name, const TensorView& view, const std::vector<double>& gradient) {
      ASSERT_EQ(static_cast<int64_t>(gradient.size()), t.count(view));
      for (int64_t n = 0; n < t.count(view); ++n)
        ASSERT_NEAR(gradient[n], derivative(t, view, n), 2e-6 * (1 + std::abs(gradient[n]))) << name << n;
    };
    check("dq", t.arguments.q, out.dq);
    check("dk", t.arguments.k, out.dk);
    check("dv", t.arguments.v, out.dv);
    if (p.sink) check("dsink", t.arguments.sink, out.dsink);
    if (HasFatalFailure()) return;
    sinks += p.sink, caps += p.softcap > 0, packed += p.packed, slopes += p.alibi;
  }
  EXPECT_GT(sinks, 5);
  EXPECT_GT(caps, 5);
  EXPECT_GT(packed, 20);
  EXPECT_GT(slopes, 5);
}

}  // namespace
}  // namespace tilewise::reference
