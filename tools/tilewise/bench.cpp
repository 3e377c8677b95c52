// tilewise bench: Tilewise and standard attention take turns on the same data in one process. Memory is measured, not
// computed: while one call runs with fresh buffers, the growth of this process's peak resident set, or what a GPU has less of.
#include <fmt/chrono.h>
#include <fmt/format.h>
#include <malloc.h>

#include <algorithm>
#include <cmath>
#include <ctime>
#include <fstream>
#include <functional>
#include <optional>

#include "files.h"
#include "reference/attention.h"
#include "reference/standard.h"
#include "reference/trial.h"
#include "tilewise/memory.hpp"
#include "tool.h"

namespace tilewise::tool {
namespace {

constexpr const char* kMemoryMethod =
    "growth of the peak resident set (VmHWM, reset through /proc/self/clear_refs) during one call that allocates all it needs beyond "
    "q, k, v, o and the gradients: lse, workspace, scores; both algorithms have run before on a small problem";
constexpr const char* kGpuMemoryMethod =
    "the GPU's free memory before one call minus that after it, while lse and workspace of its own are held; the driver takes 2 MiB at a "
    "time, and the kernel has run before";

struct BenchOptions {
  std::vector<std::string> problems;
  std::string peers, json;
  double seconds = 1;
  int rounds = 3;
  bool error = false;
  uint64_t seed = 0;
  DeviceOptions device;
};

// Seconds per call, of all turns.
struct Times {
  std::vector<double> turns;
  double at(double share) const {  // quantile, the turns sorted
    const double position = share * static_cast<double>(turns.size() - 1);
    const auto below = static_cast<size_t>(position);
    const double rest = position - static_cast<double>(below);
    return turns[below] + (rest > 0 ? rest * (turns[below + 1] - turns[below]) : 0);
  }
  double median() const { return at(0.5); }
  double spread() const { return (at(0.75) - at(0.25)) / 2 / median(); }  // half the interquartile range, relative
};

struct Error {
  double max = 0, mean = 0;
};

// One algorithm on one problem.
struct Contender {
  std::string name, kernel;
  std::string refusal;                 // why it did not run
  int64_t needed_bytes = 0;            // where memory was the reason
  std::optional<int64_t> extra_bytes;  // measured
  double bytes_moved = 0;              // as explain() counts
  std::optional<Error> error;
  Times times;
  int64_t calls_per_turn = 1;
  bool ran() const { return refusal.empty(); }
};

struct Row {
  Problem problem;
  Explanation explanation;
  Rates rates;
  std::vector<Contender> contenders;
};

// KiB of a field of /proc/self/status, as bytes.
std::optional<int64_t> status_bytes(const std::string& field) {
  std::ifstream status("/proc/self/status");
  std::string word;
  for (int64_t kib = 0; status >> word;)
    if (word == field + ":" && status >> kib) return kib * 1024;
  return std::nullopt;
}

// Runs work() and tells by how much the peak of resident memory rose above what was resident before. Free pages of the
// heap go back first, so that none is used again unseen. Nothing where the kernel does not keep the peak.
std::optional<int64_t> peak_growth(const std::function<void()>& work) {
  ::malloc_trim(0);
  std::ofstream reset("/proc/self/clear_refs");
  reset << "5" << std::flush;
  const auto before = status_bytes("VmHWM");
  work();
  const auto after = status_bytes("VmHWM");
  if (!reset || !before || !after) return std::nullopt;
  return *after - *before;
}

Arguments with_workspace(Arguments arguments, const Buffer& workspace) {
  arguments.workspace = workspace.data();
  return arguments;
}

Problem forward_of(Problem problem) {
  problem.pass = Pass::kForward;
  problem.accumulate = false;  // of gradients
  return problem;
}

// One training or inference step with buffers of its own, as a caller without any would make them. Returns what was free at its end.
int64_t run_fresh(const Problem& problem, const Device& device, Arguments arguments) {
  const int64_t rows = problem.packed ? problem.total_q : problem.batch * problem.seqlen_q;
  const Buffer lse = require(Buffer::make(device, static_cast<size_t>(rows * problem.num_heads_q) * sizeof(float)));
  arguments.lse = problem.packed
                      ? TensorView::contiguous(lse.data(), DataType::kFloat32, {problem.num_heads_q, rows})
                      : TensorView::contiguous(lse.data(), DataType::kFloat32, {problem.batch, problem.num_heads_q, problem.seqlen_q});
  int64_t free = 0;
  for (const Problem& pass : {forward_of(problem), problem}) {
    const Plan plan = require(Plan::make(pass, device));
    const Buffer workspace = require(Buffer::make(device, plan.workspace_bytes()));
    require(plan.run(with_workspace(arguments, workspace)));
    require(synchronize(device));
    free = require(free_bytes(device));
    if (problem.pass == Pass::kForward) break;
  }
  return free;
}

// A few query rows of one sequence as a problem of their own, aligned as in the whole: o and dq of a row depend on no
// other query, so float64 of these few judges any length.
struct Sample {
  Problem problem;
  Arguments arguments;
  std::vector<double> before;  // of dq, where gradients are added to what it holds

  Sample(const Problem& whole, const Arguments& all, const Lengths& lengths) : problem(whole), arguments(all) {
    constexpr int64_t kRows = 64;
    const bool top_left = whole.alignment == Alignment::kTopLeft;
    const auto* cu_q = static_cast<const int32_t*>(all.cu_seqlens_q.data);
    const auto* cu_k = static_cast<const int32_t*>(all.cu_seqlens_k.data);
    const auto length = [](const std::vector<int32_t>& given, int64_t b, int64_t bound) { return given.empty() ? bound : given[b]; };
    int64_t b = 0;  // the sequence with the most keys among those with queries
    for (int64_t n = 1; n < whole.batch; ++n)
      if (length(lengths.q, b, whole.seqlen_q) == 0 ||
          (length(lengths.q, n, whole.seqlen_q) > 0 && length(lengths.k, n, whole.seqlen_k) > length(lengths.k, b, whole.seqlen_k)))
        b = n;
    const int64_t seqlen_q = length(lengths.q, b, whole.seqlen_q), seqlen_k = length(lengths.k, b, whole.seqlen_k);
    const int64_t rows = std::min(kRows, seqlen_q), first = top_left ? 0 : seqlen_q - rows;
    problem.batch = 1, problem.packed = false, problem.seqused_k = false;
    problem.seqlen_q = rows, problem.seqlen_k = seqlen_k, problem.total_q = problem.total_k = 0;
    arguments.cu_seqlens_q = arguments.cu_seqlens_k = arguments.seqused_k = {};
    const auto cut = [&](TensorView& view, const int32_t* cu, int64_t begin, int64_t count) {
      if (!view) return;
      const int64_t stride = cu ? view.stride[0] : view.stride[1];
      const int64_t offset = cu ? (cu[b] + begin) * stride : b * view.stride[0] + begin * stride;
      view.data = static_cast<char*>(view.data) + offset * reference::element_bytes(view.dtype);
      const int64_t heads = view.shape[cu ? 1 : 2], head_stride = view.stride[cu ? 1 : 2], dim = view.shape[cu ? 2 : 3];
      view.rank = 4, view.shape = {1, count, heads, dim}, view.stride = {0, stride, head_stride, 1};
    };
    for (TensorView* view : {&arguments.q, &arguments.o, &arguments.do_, &arguments.dq}) cut(*view, cu_q, first, rows);
    for (TensorView* view : {&arguments.k, &arguments.v}) cut(*view, cu_k, 0, seqlen_k);
    if (TensorView& dlse = arguments.dlse) {
      const int64_t head_stride = dlse.stride[cu_q ? 0 : 1], row_stride = dlse.stride[cu_q ? 1 : 2];
      const int64_t offset = (cu_q ? 0 : b * dlse.stride[0]) + ((cu_q ? cu_q[b] : 0) + first) * row_stride;
      dlse.data = static_cast<float*>(dlse.data) + offset;
      dlse.rank = 3, dlse.shape = {1, whole.num_heads_q, rows}, dlse.stride = {0, head_stride, row_stride};
    }
    if (TensorView& slopes = arguments.alibi_slopes; slopes.rank == 2) {
      slopes.data = static_cast<float*>(slopes.data) + b * slopes.stride[0];
      slopes.rank = 1, slopes.shape[0] = slopes.shape[1], slopes.stride[0] = slopes.stride[1];
    }
  }

  // The judged output, o or where gradients are computed dq, as it lies in host memory now.
  std::vector<double> values() const {
    const TensorView& view = problem.pass == Pass::kBackward ? arguments.dq : arguments.o;
    std::vector<double> values;
    for (int64_t i = 0; i < view.shape[1]; ++i)
      for (int64_t h = 0; h < view.shape[2]; ++h)
        for (int64_t x = 0; x < view.shape[3]; ++x)
          values.push_back(reference::read_element(view.data, view.dtype, i * view.stride[1] + h * view.stride[2] + x));
    return values;
  }

  Error error_against(const reference::Outputs& exact) const {
    const std::vector<double>&expected = problem.pass == Pass::kBackward ? exact.dq : exact.o, found = values();
    Error error;
    for (size_t n = 0; n < found.size(); ++n) {
      const double difference = std::abs(found[n] - (problem.accumulate ? before[n] : 0) - expected[n]);
      error.max = difference <= error.max ? error.max : difference;  // NaN counts
      error.mean += difference / static_cast<double>(expected.size());
    }
    return error;
  }
};

// A trial keeps NaN where no query looks, and standard attention multiplies it by 0. Without NaN both can take turns.
void zero_unseen_keys(const Arguments& arguments) {
  for (const TensorView& view : {arguments.k, arguments.v}) {
    const int64_t rows = view.shape[0] * view.shape[1] * (view.rank == 4 ? view.shape[2] : 1), dim = view.shape[view.rank - 1];
    for (int64_t n = 0; n < rows * dim; ++n)  // the layout is bshd without gaps
      if (std::isnan(reference::read_element(view.data, view.dtype, n))) reference::write_element(view.data, view.dtype, n, 0);
  }
}

// Threads, code pages and the buffers of OpenBLAS are there before anything is measured.
void warm_up(const Problem& like, const Device& device, bool standard) {
  Problem small;
  small.pass = like.pass, small.dtype = like.dtype, small.accumulate = like.accumulate;
  small.seqlen_q = small.seqlen_k = 256, small.num_heads_q = small.num_heads_kv = 4;
  small.head_dim = like.head_dim, small.head_dim_v = like.head_dim_v;
  const reference::Trial trial = require(reference::Trial::make(small, device));
  run_fresh(small, device, trial.arguments());
  if (!standard) return;
  auto peer = require(reference::Standard::make(small, device.units));
  require(peer.forward(trial.arguments()));
  if (small.pass == Pass::kBackward) require(peer.backward(trial.arguments()));
}

// A contender and what it is timed on.
struct Runner {
  Contender* contender;
  std::function<void()> call;
  double seconds_per_call() const {
    const double start = now();
    for (int64_t n = 0; n < contender->calls_per_turn; ++n) call();
    return (now() - start) / static_cast<double>(contender->calls_per_turn);
  }
};

// Runners take turns until all have had `rounds` turns and `seconds` have passed. A turn is at least 2 ms of calls.
void take_turns(const std::vector<Runner>& runners, const BenchOptions& options) {
  constexpr double kShortestTurn = 2e-3;
  constexpr int kMostTurns = 1000;
  for (const Runner& r : runners) {
    int64_t& calls = r.contender->calls_per_turn;
    for (double each = r.seconds_per_call(); each * static_cast<double>(calls) < kShortestTurn; each = r.seconds_per_call())
      calls = std::max(2 * calls, static_cast<int64_t>(std::min(kShortestTurn / each, 1e6)));
  }
  const double start = now();
  for (int turn = 0; turn < kMostTurns && (turn < options.rounds || now() - start < options.seconds); ++turn)
    for (const Runner& r : runners) r.contender->times.turns.push_back(r.seconds_per_call());
  for (const Runner& r : runners) std::sort(r.contender->times.turns.begin(), r.contender->times.turns.end());
}

Row measure(const Problem& problem, const Device& device, const BenchOptions& options) {
  const bool backward = problem.pass == Pass::kBackward, on_cpu = device.type == DeviceType::kCpu;
  const bool with_standard = !options.peers.empty();
  if (with_standard && !on_cpu)
    throw Failure(kBadRequest, "standard attention takes turns on the CPU only; on a GPU bench/io_gpu.py compares, with PyTorch");
  // float64 of the sampled rows has the gradients of all keys.
  const double judged = options.error && backward ? 8 / static_cast<double>(reference::element_bytes(problem.dtype)) : 0;
  require_memory("'" + problem.to_string() + "'", trial_bytes(problem, device) + judged * tensor_bytes(problem));
  Row row{problem, {}, rates_of(device, problem.dtype), {}};
  warm_up(problem, device, with_standard);
  reference::Trial trial = require(reference::Trial::make(problem, device, options.seed));
  const Lengths lengths = trial.lengths();
  row.explanation = require(explain(problem, device, lengths));
  if (row.explanation.flops == 0)
    throw Failure(kBadRequest, fmt::format("'{}' with seed {} drew no visible pair", problem.to_string(), options.seed));

  std::optional<Sample> sample;
  reference::Outputs exact;
  if (options.error) {
    sample.emplace(problem, trial.host_arguments(), lengths);
    exact = reference::attention(sample->problem, sample->arguments);
  }
  // The first call, with memory and error; later ones are timed.
  const auto first_call = [&](Contender& c, const std::function<void()>& work) {
    if (sample && problem.accumulate) {
      require(trial.download());
      sample->before = sample->values();
    }
    const auto growth = peak_growth(work);
    if (!c.ran()) return;
    if (!c.extra_bytes) c.extra_bytes = growth;
    if (!sample) return;
    require(trial.download());
    c.error = sample->error_against(exact);
  };

  Contender ours, peer;
  ours.name = "tilewise", ours.kernel = trial.plan().kernel();
  ours.bytes_moved = row.explanation.flash_bytes;
  first_call(ours, [&] {
    const int64_t before = require(free_bytes(device)), after = run_fresh(problem, device, trial.arguments());
    if (!on_cpu) ours.extra_bytes = before - after;
  });
  std::vector<Runner> runners{{&ours, [&] { require(trial.plan().run(trial.arguments())), require(synchronize(device)); }}};

  std::optional<reference::Standard> standard;
  peer.name = "standard", peer.kernel = "OpenBLAS";
  peer.bytes_moved = row.explanation.standard_bytes;
  if (with_standard) {
    zero_unseen_keys(trial.arguments());
    first_call(peer, [&] {
      auto made = reference::Standard::make(problem, device.units);
      if (!made) {
        peer.refusal = made.status().message(), peer.needed_bytes = reference::standard_bytes(problem);
        return;
      }
      standard.emplace(std::move(*made));
      require(standard->forward(trial.arguments()));
      if (backward) require(standard->backward(trial.arguments()));
    });
    if (peer.ran())
      runners.push_back({&peer, [&] { require(backward ? standard->backward(trial.arguments()) : standard->forward(trial.arguments())); }});
  }
  take_turns(runners, options);
  row.contenders.push_back(ours);
  if (with_standard) row.contenders.push_back(peer);
  return row;
}

std::string now_utc() { return fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr))); }

// The fastest core's clock as the kernel tells it now; 0 where it does not.
double clock_hertz() {
  std::ifstream info("/proc/cpuinfo");
  double fastest = 0;
  for (std::string line; std::getline(info, line);)
    if (line.starts_with("cpu MHz")) fastest = std::max(fastest, std::atof(line.c_str() + line.find(':') + 1) * 1e6);
  return fastest;
}

// No computation of the problem is faster: standard attention has its own, for its traffic is part of what it is.
double limit_of(const Row& row, const Contender& c) {
  const bool standard = c.name == "standard";
  return limit_seconds(row.explanation.flops, standard ? c.bytes_moved : row.explanation.least_bytes, row.rates);
}

Json contender_json(const Row& row, const Contender& c) {
  const auto or_null = [](const auto& value) { return value ? Json(*value) : Json(nullptr); };
  Json json{{"name", c.name}, {"kernel", c.kernel}, {"bytes_moved", c.bytes_moved}, {"limit_seconds", limit_of(row, c)}};
  if (!c.ran()) {
    json["refusal"] = c.refusal;
    if (c.needed_bytes) json["needed_bytes"] = c.needed_bytes;
    return json;
  }
  const Times& t = c.times;
  json["seconds"] = {{"median", t.median()}, {"q25", t.at(0.25)},    {"q75", t.at(0.75)},       {"min", t.at(0)},
                     {"max", t.at(1)},       {"spread", t.spread()}, {"turns", t.turns.size()}, {"calls_per_turn", c.calls_per_turn}};
  json["flops_per_second"] = row.explanation.flops / t.median();
  json["roofline_share"] = limit_of(row, c) / t.median();
  json["extra_bytes"] = or_null(c.extra_bytes);
  if (c.error) json["max_error"] = c.error->max, json["mean_error"] = c.error->mean;
  return json;
}

Json row_json(const Row& row) {
  Json json{{"problem", row.problem.to_string()},
            {"pass", row.problem.pass == Pass::kForward ? "forward" : "backward"},
            {"flops", row.explanation.flops},
            {"rates", {{"flops_per_second", row.rates.flops_per_second}, {"bytes_per_second", row.rates.bytes_per_second}}},
            {"workspace_bytes", row.explanation.workspace_bytes},
            {"planned_extra_bytes", row.explanation.flash_extra_bytes},
            {"standard_extra_bytes", row.explanation.standard_extra_bytes}};
  for (const Contender& c : row.contenders) json["contenders"].push_back(contender_json(row, c));
  return json;
}

void print_header(const Device& device, bool error) {
  fmt::print("{}\n\n{:10} {:>8} {:>6} {:>13} {:>8} {:>9} {:>9}{}\n", device_text(device), "", "time", "spread", "useful", "of roof",
             "extra mem", "moved", error ? "  max error" : "");
}

void print_row(const Row& row) {
  fmt::print("{}\n", row.problem.to_string());
  for (const Contender& c : row.contenders) {
    if (!c.ran()) {
      fmt::print("  {:8} does not fit: it needs {} beyond q, k, v and o\n", c.name, bytes_text(static_cast<double>(c.needed_bytes)));
      continue;
    }
    fmt::print("  {:8} {:>8} {:>4.0f} % {:>13} {:>6.0f} % {:>9} {:>9}{}\n", c.name, seconds_text(c.times.median()), 100 * c.times.spread(),
               si_text(row.explanation.flops / c.times.median()) + "FLOP/s", 100 * limit_of(row, c) / c.times.median(),
               c.extra_bytes ? bytes_text(static_cast<double>(*c.extra_bytes)) : "unknown", bytes_text(c.bytes_moved),
               c.error ? fmt::format("{:11.1e}", c.error->max) : "");
  }
  if (row.contenders.size() < 2 || !row.contenders[1].ran()) return;
  const Contender &ours = row.contenders[0], &peer = row.contenders[1];
  const double faster = peer.times.median() / ours.times.median(), fewer = peer.bytes_moved / ours.bytes_moved;
  fmt::print("           {} as fast, ", ratio_text(faster));
  if (ours.extra_bytes && peer.extra_bytes && *ours.extra_bytes > 0)
    fmt::print("{} less extra memory, ", ratio_text(static_cast<double>(*peer.extra_bytes) / static_cast<double>(*ours.extra_bytes)));
  fmt::print("{} fewer bytes moved\n", ratio_text(fewer));
}

void bench(const BenchOptions& options) {
  const std::vector<Problem> problems = read_problems(options.problems);
  const bool as_text = options.json != "-";
  if (!options.json.empty() && as_text) require(files::check_writable(options.json));
  const Device device = options.device.open();
  for (const Problem& problem : problems)
    if (require(explain(problem, device)).flops == 0)
      throw Failure(kBadRequest, fmt::format("'{}' has no work to time: no query sees a key", problem.to_string()));
  Json json{{"tilewise", TILEWISE_VERSION},
            {"time", now_utc()},
            {"device", device_json(device)},
            {"clock_hertz", clock_hertz()},
            {"memory_method", device.type == DeviceType::kCpu ? kMemoryMethod : kGpuMemoryMethod},
            {"error_method", "largest |difference| to float64 of o, backward: dq, in 64 rows of one sequence"},
            {"bytes_method", "counted from the tile plan"},
            {"results", Json::array()}};
  if (as_text) print_header(device, options.error);
  Progress progress;
  for (size_t n = 0; n < problems.size(); ++n) {
    progress.show(fmt::format("problem {} of {}", n + 1, problems.size()), static_cast<double>(n) / static_cast<double>(problems.size()));
    try {
      const Row row = measure(problems[n], device, options);
      json["results"].push_back(row_json(row));
      progress.clear();
      if (as_text) print_row(row), std::fflush(stdout);
    } catch (const std::exception& error) {  // what has been measured is kept
      if (n > 0 && !options.json.empty()) {
        json["failure"] = fmt::format("'{}': {}", problems[n].to_string(), error.what());
        write_json(json, options.json);
      }
      throw;
    }
  }
  if (!options.json.empty()) write_json(json, options.json);
}

}  // namespace

void add_bench(CLI::App* app) {
  auto* command = app->add_subcommand("bench", "Time, extra memory and traffic, beside standard attention");
  auto options = std::make_shared<BenchOptions>();
  command->add_option("problem", options->problems, "PROBLEM, or @FILE with one per line")->type_name("")->required();
  command->add_option("--peers", options->peers, "standard: standard attention takes turns with Tilewise")
      ->type_name("NAME")
      ->check(CLI::IsMember({"standard"}).description(""));
  command->add_option("--json", options->json, "write the figures to this file; -: to stdout, instead of the table")->type_name("FILE");
  command->add_option("--seconds", options->seconds, "take turns at least so long")
      ->type_name("S")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 1e6).description(""));
  command->add_option("--rounds", options->rounds, "and at least so often")
      ->type_name("N")
      ->capture_default_str()
      ->check(CLI::Range(1, 1000).description(""));
  command->add_flag("--error", options->error, "largest error of o (backward: of dq) against float64, in 64 rows");
  command->add_option("--seed", options->seed, "of the data")->type_name("N")->capture_default_str();
  options->device.add_to(command);
  command->footer("Example: tilewise bench --peers standard \"q4096 h8 d64 causal\" \"bwd q4096 h8 d64 causal\"");
  command->callback([options] { bench(*options); });
}

}  // namespace tilewise::tool
