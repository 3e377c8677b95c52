// Plan once, run often: forward and backward with plans, a workspace of the caller's, and gradients that are checked against
// the change of a loss.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "tilewise/memory.hpp"
#include "tilewise/tilewise.hpp"

using namespace tilewise;

int main() {
  // 8 query heads share 2 key/value heads; the text is what Problem::to_string() prints.
  const Problem problem = Problem::parse("fwd b2 q96 k128 h8/2 d32 fp32 causal").value();
  Problem gradient_problem = problem;
  gradient_problem.pass = Pass::kBackward;
  const Plan forward_plan = Plan::make(problem).value(), backward_plan = Plan::make(gradient_problem).value();
  Buffer workspace = Buffer::make(Device::cpu(), std::max(forward_plan.workspace_bytes(), backward_plan.workspace_bytes())).value();

  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto draw = [&](int64_t elements) {
    std::vector<float> values(static_cast<size_t>(elements));
    for (float& value : values) value = normal(random);
    return values;
  };
  const int64_t q_elements = problem.batch * problem.seqlen_q * problem.num_heads_q * problem.head_dim;
  const int64_t k_elements = problem.batch * problem.seqlen_k * problem.num_heads_kv * problem.head_dim;
  std::vector<float> q = draw(q_elements), k = draw(k_elements), v = draw(k_elements), o = draw(q_elements), do_ = draw(q_elements);
  std::vector<float> dq(q.size()), dk(k.size()), dv(v.size()), lse(q.size() / static_cast<size_t>(problem.head_dim));

  const auto of_queries = [&](std::vector<float>& x) {
    return TensorView::contiguous(x.data(), problem.dtype, {problem.batch, problem.seqlen_q, problem.num_heads_q, problem.head_dim});
  };
  const auto of_keys = [&](std::vector<float>& x) {
    return TensorView::contiguous(x.data(), problem.dtype, {problem.batch, problem.seqlen_k, problem.num_heads_kv, problem.head_dim});
  };
  Arguments arguments;  // one set of arguments serves both plans: forward leaves the gradients alone
  arguments.q = of_queries(q);
  arguments.k = of_keys(k);
  arguments.v = of_keys(v);
  arguments.o = of_queries(o);
  arguments.lse = TensorView::contiguous(lse.data(), DataType::kFloat32, {problem.batch, problem.num_heads_q, problem.seqlen_q});
  arguments.do_ = of_queries(do_);
  arguments.dq = of_queries(dq);
  arguments.dk = of_keys(dk);
  arguments.dv = of_keys(dv);
  arguments.workspace = workspace.data();

  forward_plan.run(arguments).check();
  backward_plan.run(arguments).check();
  std::printf("%s: %s, %s, workspace %zu bytes\n", problem.to_string().c_str(), std::string(forward_plan.kernel()).c_str(),
              std::string(backward_plan.kernel()).c_str(), workspace.size());

  // loss = sum(o * do_). Along a direction x its slope is <dq, x_q> + <dk, x_k> + <dv, x_v>, and the difference quotient too.
  const std::vector<float> x_q = draw(q_elements), x_k = draw(k_elements), x_v = draw(k_elements);
  const auto loss_at = [&](float step) {
    const auto moved = [step](const std::vector<float>& from, const std::vector<float>& direction) {
      std::vector<float> to = from;
      for (size_t i = 0; i < to.size(); ++i) to[i] += step * direction[i];
      return to;
    };
    std::vector<float> moved_q = moved(q, x_q), moved_k = moved(k, x_k), moved_v = moved(v, x_v);
    Arguments there = arguments;
    there.q = of_queries(moved_q);
    there.k = of_keys(moved_k);
    there.v = of_keys(moved_v);
    forward_plan.run(there).check();
    double loss = 0;
    for (size_t i = 0; i < o.size(); ++i) loss += double{o[i]} * do_[i];
    return loss;
  };
  double slope = 0;
  for (size_t i = 0; i < q.size(); ++i) slope += double{dq[i]} * x_q[i];
  for (size_t i = 0; i < k.size(); ++i) slope += double{dk[i]} * x_k[i] + double{dv[i]} * x_v[i];
  const float step = 1e-3f;
  const double quotient = (loss_at(step) - loss_at(-step)) / (2.0 * step);
  std::printf("slope of the loss: %.6g by the gradients, %.6g by differences\n", slope, quotient);
  return std::fabs(slope - quotient) <= 1e-3 * std::fabs(slope) ? 0 : 1;
}
