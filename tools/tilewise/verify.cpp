// tilewise verify: problems with drawn data against float64, errors beside those of standard attention in the same type.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "reference/attention.h"
#include "reference/trial.h"
#include "tool.h"

namespace tilewise::tool {
namespace {

struct VerifyOptions {
  std::vector<std::string> problems;
  int64_t fuzz = 0;
  bool insist = false;
  uint64_t seed = 0;
  std::string layout = "bshd";
  DeviceOptions device;
};

// Of one thread for each pair and dimension, thrice that backward; measured on an EPYC 9755: 0.7 and 0.8 ns.
constexpr double kSecondsPerProduct = 1e-9;
constexpr double kMostSeconds = 600;

struct Case {
  Problem problem;
  uint64_t seed;
  reference::Layout layout;
};

// Errors in units of standard attention's. Where one of the two has no error there is no ratio.
struct Ratios {
  double log_max = 0, log_mean = 0, count = 0;
  void add(const reference::TensorReport& t) {
    if (!(t.max > 0 && t.standard_max > 0)) return;
    log_max += std::log(t.max / t.standard_max), log_mean += std::log(t.mean / t.standard_mean), ++count;
  }
};

void print_header() { fmt::print("{:8} {:>11} {:>11}   {:>11} {:>11}\n", "", "max error", "standard", "mean error", "standard"); }

void print_report(const reference::Report& report) {
  for (const auto& t : report.tensors)
    fmt::print("  {:6} {:11.2e} {:11.2e}   {:11.2e} {:11.2e}   {}\n", t.name, t.max, t.standard_max, t.mean, t.standard_mean,
               t.pass ? "ok" : "WRONG: " + t.reason);
}

std::string repeat_line(const Case& c, const VerifyOptions& options) {
  return reference::verify_line(c.problem, c.seed, c.layout) + options.device.to_string();
}

// Float64 takes time in proportion to the square of the length, and memory for every output.
void check_size(const Case& c, const Device& device, bool insisted) {
  const Problem& p = c.problem;
  const std::string name = "'" + p.to_string() + "'";
  // Beside the trial: a copy of it, and float64 values, noise and errors of each output.
  constexpr double kFloat64 = 3 * 8;
  require_memory("verifying " + name, 1.5 * trial_bytes(p, device, c.layout) +
                                          kFloat64 / static_cast<double>(reference::element_bytes(p.dtype)) * tensor_bytes(p) / 2);
  const double keys = static_cast<double>(p.packed ? std::min(p.seqlen_k, p.total_k) : p.seqlen_k);
  const double rows =
      static_cast<double>(p.num_heads_q) * (p.packed ? static_cast<double>(p.total_q) : static_cast<double>(p.batch) * p.seqlen_q);
  const double products = rows * keys * static_cast<double>(p.head_dim + p.head_dim_v) * (p.pass == Pass::kForward ? 1 : 3);
  const double seconds = products * kSecondsPerProduct / Device::cpu().units;
  if (seconds > kMostSeconds && !insisted)
    throw Failure(kBadRequest, fmt::format("{} would take float64 about {:.0f} minutes; --long does it all the same", name, seconds / 60));
}

// A problem that no kernel takes is counted where problems are drawn, and ends the command where one was asked for.
void verify(const VerifyOptions& options) {
  const Device device = options.device.open();
  std::vector<Case> cases;
  for (const Problem& problem : read_problems(options.problems))
    cases.push_back({problem, options.seed, require(reference::parse_layout(options.layout))});
  for (int64_t n = 0; n < options.fuzz; ++n) {
    const uint64_t seed = options.seed + static_cast<uint64_t>(n);
    cases.push_back({reference::random_problem(seed), seed, reference::random_layout(seed)});
  }
  if (cases.empty()) throw Failure(kBadRequest, "verify needs a PROBLEM, an @file or --fuzz N");

  for (size_t n = 0; n + static_cast<size_t>(options.fuzz) < cases.size(); ++n) check_size(cases[n], device, options.insist);

  Progress progress;
  int64_t failed = 0, refused = 0;
  std::map<std::string, Ratios> ratios;  // by tensor
  if (options.fuzz == 0) print_header();
  for (size_t n = 0; n < cases.size(); ++n) {
    const Case& c = cases[n];
    const bool drawn = n >= cases.size() - static_cast<size_t>(options.fuzz);
    if (drawn) progress.show(fmt::format("problem {} of {}, {} wrong", n, cases.size(), failed), static_cast<double>(n) / cases.size());
    const Result<reference::Report> report = reference::verify(c.problem, device, c.seed, c.layout);
    if (drawn && !report && report.status().code() == StatusCode::kUnsupported) {
      ++refused;
      continue;
    }
    require(report.status());
    if (!drawn) fmt::print("{}\n", c.problem.to_string());
    if (!drawn || !report->pass) print_report(*report);
    for (const auto& t : report->tensors) ratios[t.name].add(t);
    if (report->pass) continue;
    ++failed;
    progress.clear();
    fmt::print("wrong: {}\nrepeat: {}\n", report->first_failure, repeat_line(c, options));
  }
  progress.clear();
  if (options.fuzz > 0) {
    fmt::print("errors in units of standard attention's, geometric mean over the problems:\n");
    for (const auto& [name, r] : ratios)
      if (r.count > 0) fmt::print("  {:6} max {:.2f}   mean {:.2f}\n", name, std::exp(r.log_max / r.count), std::exp(r.log_mean / r.count));
  }
  const size_t judged = cases.size() - static_cast<size_t>(refused);
  fmt::print("{} of {} problems agree with float64 on {}{}\n", judged - static_cast<size_t>(failed), judged, device_text(device),
             refused ? fmt::format("; no kernel takes {} more", refused) : "");
  if (failed > 0) throw Failure(kVerifyFailed, fmt::format("{} of {} problems are wrong", failed, judged));
  if (judged == 0) throw Failure(kBadRequest, "no kernel takes any of the problems");
}

}  // namespace

void add_verify(CLI::App* app) {
  auto* command = app->add_subcommand("verify", "Results and gradients against float64, beside standard attention's error");
  auto options = std::make_shared<VerifyOptions>();
  command->add_option("problem", options->problems, "PROBLEM, or @FILE with one per line")->type_name("");
  command->add_option("--fuzz", options->fuzz, "so many problems, drawn from seed, seed + 1, ...")
      ->type_name("N")
      ->check(CLI::Range(0, 100'000'000).description(""));
  command->add_flag("--long", options->insist, "also what takes float64 more than ten minutes");
  command->add_option("--seed", options->seed, "of the data")->type_name("N")->capture_default_str();
  command->add_option("--layout", options->layout, "strides of the tensors: bshd, bhsd, gaps or permuted")
      ->type_name("NAME")
      ->capture_default_str();
  options->device.add_to(command);
  command->footer("Example: tilewise verify \"bwd b2 q300 k300 h8/2 d64 bf16 causal\"\n         tilewise verify --fuzz 1000 --seed 1");
  command->callback([options] { verify(*options); });
}

}  // namespace tilewise::tool
