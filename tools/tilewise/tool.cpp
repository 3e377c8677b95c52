#include "tool.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <map>
#include <tuple>

#include "files.h"
#include "reference/standard.h"

namespace tilewise::tool {

void require(const Status& status) {
  if (!status.ok()) throw Failure(status.code() == StatusCode::kUnavailable ? kUnavailable : kBadRequest, status.message());
}

void require_memory(const std::string& what, double bytes) {
  const auto available = static_cast<double>(reference::available_bytes());
  if (bytes > available - available / 32)
    throw Failure(kUnavailable, fmt::format("{} needs {} of memory, {} are available", what, bytes_text(bytes), bytes_text(available)));
}

double tensor_bytes(const Problem& p, double gaps) {
  const double element = p.dtype == DataType::kFloat32 ? 4 : 2, copies = p.pass == Pass::kForward ? 1 : 2;
  const double batch = static_cast<double>(p.batch), d = element * static_cast<double>(p.head_dim) + gaps;
  const double dv = element * static_cast<double>(p.head_dim_v) + gaps;
  const double rows = static_cast<double>(p.num_heads_q) * (p.packed ? static_cast<double>(p.total_q) : batch * p.seqlen_q);
  const double keys = static_cast<double>(p.num_heads_kv) * (p.packed ? static_cast<double>(p.total_k) : batch * p.seqlen_k);
  const double wider = p.accumulate ? 4 - element : 0;  // gradients that are added to are float32
  const double gradients = rows * static_cast<double>(p.head_dim) + keys * static_cast<double>(p.head_dim + p.head_dim_v);
  return copies * (rows * (d + dv + 4) + keys * (d + dv)) + wider * gradients;
}

double trial_bytes(const Problem& problem, const Device& device, reference::Layout layout) {
  const bool gaps = layout == reference::Layout::kGaps || layout == reference::Layout::kPermuted, on_host = device.type == DeviceType::kCpu;
  const auto workspace = static_cast<double>(require(Plan::make(problem, device)).workspace_bytes());
  return (on_host ? 2 : 1) * (tensor_bytes(problem, gaps ? 32 : 0) + workspace);
}

void DeviceOptions::add_to(CLI::App* command, bool with_cards) {
  std::vector<std::string> names{"cpu", "cuda"};
  const std::vector<std::string> cards = card_names();
  if (with_cards) names.insert(names.end(), cards.begin(), cards.end());
  const auto needs_a_device = [=](const std::string& name) -> std::string {
    if (with_cards || std::ranges::find(cards, name) == cards.end()) return {};
    return fmt::format("{} is for explain only, which plans by its data sheet: {} runs on cpu or cuda", name, command->get_name());
  };
  command->add_option("--device", device, fmt::format("{}", fmt::join(names, ", ")))
      ->type_name("NAME")
      ->check(needs_a_device)
      ->check(CLI::IsMember(names).description(""))
      ->capture_default_str();
  command->add_option("--threads", threads, "of the CPU; otherwise OMP_NUM_THREADS or every core")
      ->type_name("N")
      ->check(CLI::Range(1, 4096).description(""));
}

Device DeviceOptions::open() const { return device == "cuda" ? require(Device::cuda()) : Device::cpu(threads); }

std::string DeviceOptions::to_string() const {
  return (device == "cpu" ? "" : " --device " + device) + (threads == 0 ? "" : fmt::format(" --threads {}", threads));
}

namespace {

Problem parse_problem(const std::string& text) { return require(Problem::parse(text)); }

void read_problem_file(const std::string& path, std::vector<Problem>* problems) {
  std::ifstream file(path);
  if (!file) throw Failure(kBadRequest, fmt::format("{}: cannot be read", path));
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    line.resize(std::min(line.find('#'), line.size()));
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const Result<Problem> problem = Problem::parse(line);
    if (!problem) throw Failure(kBadRequest, fmt::format("{}:{}: {}", path, number, problem.status().message()));
    problems->push_back(*problem);
  }
  if (file.bad() || problems->empty()) throw Failure(kBadRequest, fmt::format("{}: holds no problem", path));
}

}  // namespace

std::vector<Problem> read_problems(const std::vector<std::string>& arguments) {
  std::vector<Problem> problems;
  std::string words;  // of a problem that the shell has cut
  const auto flush = [&] {
    if (!words.empty()) problems.push_back(parse_problem(words));
    words.clear();
  };
  for (const std::string& argument : arguments) {
    if (!argument.starts_with('@') && argument.find(' ') == std::string::npos) {
      words += (words.empty() ? "" : " ") + argument;
      continue;
    }
    flush();
    if (argument.starts_with('@'))
      read_problem_file(argument.substr(1), &problems);
    else
      problems.push_back(parse_problem(argument));
  }
  flush();
  return problems;
}

Rates rates_of(const Device& device, DataType dtype) {
  static std::map<std::tuple<DeviceType, int, int, DataType>, Rates> known;
  const auto key = std::tuple(device.type, device.index, device.units, dtype);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  return known[key] = require(measure_rates(device, dtype));
}

double limit_seconds(double flops, double bytes, const Rates& rates) {
  return std::max(flops / rates.flops_per_second, bytes / rates.bytes_per_second);
}

Json device_json(const Device& device) {
  return {{"type", device.type == DeviceType::kCuda ? "cuda" : "cpu"},
          {"index", device.index},
          {"name", device.name},
          {"arch", device.arch},
          {"units", device.units},
          {"near_bytes", device.near_bytes},
          {"desk_bytes", device.desk_bytes},
          {"memory_bytes", device.memory_bytes}};
}

void write_json(const Json& json, const std::string& path) {
  const std::string text = json.dump(2) + "\n";
  if (path == "-") {
    std::fputs(text.c_str(), stdout);
    return;
  }
  require(files::write(path, {text}));
}

std::string_view dtype_name(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat32:
      return "fp32";
    case DataType::kBFloat16:
      return "bf16";
    case DataType::kFloat16:
      return "fp16";
    case DataType::kInt32:
      return "int32";
  }
  return "";
}

std::string device_text(const Device& device) {
  return fmt::format("{}, {}, {} {}", device.name, device.arch, device.units,
                     device.type == DeviceType::kCuda ? "SMs" : (device.units == 1 ? "thread" : "threads"));
}

namespace {

// Three digits and a unit: the largest unit that leaves at least 1 before the point.
template <size_t N>
std::string scaled(double value, double step, const std::array<const char*, N>& units) {
  size_t u = 0;
  while (u + 1 < N && std::abs(value) >= step * 0.9995) value /= step, ++u;
  const int decimals = value == std::floor(value) && u == 0 ? 0 : std::abs(value) < 9.995 ? 2 : std::abs(value) < 99.95 ? 1 : 0;
  return fmt::format("{:.{}f} {}", value, decimals, units[u]);
}

}  // namespace

std::string bytes_text(double bytes) { return scaled(bytes, 1024, std::array{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}); }
std::string seconds_text(double seconds) {
  if (seconds >= 0.9995) return scaled(seconds, 1e300, std::array{"s"});
  return scaled(seconds * 1e9, 1e3, std::array{"ns", "us", "ms", "s"});
}
std::string si_text(double value) { return scaled(value, 1e3, std::array{"", "k", "M", "G", "T", "P", "E"}); }
std::string ratio_text(double ratio) { return fmt::format("{:.{}f}x", ratio, ratio < 9.95 ? 1 : 0); }

Progress::Progress() : visible_(::isatty(STDERR_FILENO)), start_(now()) {}
Progress::~Progress() { clear(); }
void Progress::clear() {
  if (std::exchange(shown_, false)) fmt::print(stderr, "\r\x1b[K");
}
void Progress::show(const std::string& what, double share) {
  if (!visible_ || now() - start_ < 0.5) return;
  fmt::print(stderr, "\r{} {:3.0f} %\x1b[K", what, 100 * share);
  std::fflush(stderr);
  shown_ = true;
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace tilewise::tool
