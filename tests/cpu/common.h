// Tests that run once for every instruction set of this machine, whose rows TILEWISE_KERNEL then forces.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "reference/attention.h"
#include "reference/trial.h"
#include "tilewise/tilewise.hpp"

namespace tilewise {

inline Problem parse(std::string_view line) { return Problem::parse(line).value(); }

// Instruction sets whose rows this machine can run, best first.
inline std::vector<std::string> isas() {
  constexpr std::string_view kPrefix = "forward_";
  std::vector<std::string> names;
  for (const Candidate& candidate : Plan::candidates(parse("q8 d8"), Device::cpu()))
    if (candidate.refusal.empty()) names.push_back(candidate.name.substr(kPrefix.size()));
  return names;
}

class KernelTest : public testing::Test {
 protected:
  explicit KernelTest(const std::string& isa) { setenv("TILEWISE_KERNEL", ("forward_" + isa + ",backward_" + isa).c_str(), 1); }
  ~KernelTest() override { unsetenv("TILEWISE_KERNEL"); }
};

inline std::string isa_name(const testing::TestParamInfo<std::string>& parameter) { return parameter.param; }

// Fixture of a test with an instruction set as its only parameter.
class Cpu : public KernelTest, public testing::WithParamInterface<std::string> {
 protected:
  Cpu() : KernelTest(GetParam()) {}
};

inline void expect_pass(const Problem& problem, uint64_t seed, reference::Layout layout) {
  const Result<reference::Report> report = reference::verify(problem, Device::cpu(), seed, layout);
  ASSERT_TRUE(report.ok()) << report.status().message();
  EXPECT_TRUE(report->pass) << report->first_failure << "\n  " << reference::verify_line(problem, seed, layout);
}

// The bits of every element, in the order of the shape.
inline std::vector<uint32_t> bits_of(const TensorView& view) {
  std::vector<uint32_t> bits;
  const int64_t bytes = reference::element_bytes(view.dtype);
  int64_t count = 1;
  for (int d = 0; d < view.rank; ++d) count *= view.shape[d];
  for (int64_t index = 0; index < count; ++index) {
    int64_t offset = 0, rest = index;
    for (int d = view.rank - 1; d >= 0; --d) offset += rest % view.shape[d] * view.stride[d], rest /= view.shape[d];
    uint32_t element = 0;
    std::memcpy(&element, static_cast<const char*>(view.data) + offset * bytes, bytes);
    bits.push_back(element);
  }
  return bits;
}

inline std::vector<TensorView> outputs_of(const Problem& problem, const Arguments& a) {
  if (problem.pass == Pass::kForward) return {a.o, a.lse};
  return problem.sink ? std::vector{a.dq, a.dk, a.dv, a.dsink} : std::vector{a.dq, a.dk, a.dv};
}

// Runs a plan on arguments in host memory with a workspace of its own.
inline void run(const Problem& problem, Arguments arguments, int threads = 0) {
  const Plan plan = Plan::make(problem, Device::cpu(threads)).value();
  const Buffer workspace = Buffer::make(plan.device(), plan.workspace_bytes() + 1).value();
  arguments.workspace = workspace.data();
  plan.run(arguments).check();
}

// A trial's tensors in host memory, where tests may change them, and results of running on them.
struct HostTrial {
  reference::Trial trial;
  Problem problem;

  explicit HostTrial(const Problem& p, uint64_t seed = 0, reference::Layout layout = reference::Layout::kBshd)
      : trial(reference::Trial::make(p, Device::cpu(), seed, layout).value()), problem(p) {}
  const Arguments& arguments() const { return trial.host_arguments(); }

  // Backward reads o and lse: made anew from the tensors as they are now.
  void make_forward_results(int threads = 0) {
    Problem forward = problem;
    forward.pass = Pass::kForward;
    Arguments a = arguments();
    a.do_ = a.dlse = a.dq = a.dk = a.dv = a.dsink = {};
    run(forward, a, threads);
  }
  std::vector<std::vector<uint32_t>> run_bits(int threads = 0) {
    if (problem.pass == Pass::kBackward) make_forward_results(threads);
    run(problem, arguments(), threads);
    std::vector<std::vector<uint32_t>> bits;
    for (const TensorView& output : outputs_of(problem, arguments())) bits.push_back(bits_of(output));
    return bits;
  }
  // Judged against float64 with the tensors as they are now.
  void expect_pass() {
    if (problem.pass == Pass::kBackward) make_forward_results();
    ASSERT_TRUE(trial.upload().ok() && trial.run().ok());
    const reference::Report report = trial.compare().value();
    EXPECT_TRUE(report.pass) << problem.to_string() << ": " << report.first_failure;
  }
};

inline int64_t offset_of(const TensorView& view, std::initializer_list<int64_t> index) {
  int64_t offset = 0;
  int d = 0;
  for (int64_t i : index) offset += i * view.stride[d++];
  return offset;
}
inline float get(const TensorView& view, std::initializer_list<int64_t> index) {
  return reference::read_element(view.data, view.dtype, offset_of(view, index));
}
inline void set(const TensorView& view, std::initializer_list<int64_t> index, float value) {
  reference::write_element(view.data, view.dtype, offset_of(view, index), value);
}
inline void fill(const TensorView& view, float value) {
  for (int64_t a = 0; a < view.shape[0]; ++a)
    for (int64_t b = 0; b < view.shape[1]; ++b)
      for (int64_t c = 0; c < view.shape[2]; ++c)
        for (int64_t d = 0; d < view.shape[3]; ++d) set(view, {a, b, c, d}, value);
}

}  // namespace tilewise
