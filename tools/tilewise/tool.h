// What the subcommands share: exit codes, the device options, problem lists, and figures as text.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "reference/trial.h"
#include "tilewise/explain.hpp"
#include "tilewise/tilewise.hpp"

namespace tilewise::tool {

using Json = nlohmann::ordered_json;

enum ExitCode {
  kVerifyFailed = 1,  // a result is wrong
  kBadRequest = 2,    // usage, file or problem
  kUnavailable = 3,   // a device or memory that is not there
};

// Ends the command: one sentence for stderr and the exit code.
struct Failure : std::runtime_error {
  Failure(ExitCode code, const std::string& sentence) : std::runtime_error(sentence), exit_code(code) {}
  ExitCode exit_code;
};
void require(const Status& status);
template <class T>
T require(Result<T> result) {
  require(result.status());
  return std::move(*result);
}

// Refuses what would not fit, before any of it is taken: one allocation after the other may succeed, and their first use
// end the process. `what` needs so many bytes of host memory.
void require_memory(const std::string& what, double bytes);
// Of the tensors that a pass reads and writes, lse among them; gaps: bytes after each of their rows.
double tensor_bytes(const Problem& problem, double gaps = 0);
// Of a reference::Trial: the tensors on the host and, where that is the same memory, on the device, and its workspace.
double trial_bytes(const Problem& problem, const Device& device, reference::Layout layout = reference::Layout::kBshd);

std::vector<std::string> card_names();  // GPUs that explain plans for by their data sheets: h100, ...

// --device and --threads.
struct DeviceOptions {
  std::string device = "cpu";
  int threads = 0;
  void add_to(CLI::App* command, bool with_cards = false);
  Device open() const;
  std::string to_string() const;  // the options that are not at their default, with a space before each
};

// Each argument is a problem or @file with one per line; arguments without spaces form one problem together.
std::vector<Problem> read_problems(const std::vector<std::string>& arguments);

// Rates are measured once per device and type in a process.
Rates rates_of(const Device& device, DataType dtype);
double limit_seconds(double flops, double bytes, const Rates& rates);

Json device_json(const Device& device);
// To stdout for "-", otherwise to a file, whole or not at all.
void write_json(const Json& json, const std::string& path);

std::string_view dtype_name(DataType dtype);  // as in the problem grammar
std::string device_text(const Device& device);
std::string bytes_text(double bytes);      // 1.5 MiB
std::string seconds_text(double seconds);  // 12.3 ms
std::string si_text(double value);         // 12.3 G
std::string ratio_text(double ratio);      // 2.5x

// One line on stderr that is written over, only where that is a terminal and after the first half second.
class Progress {
 public:
  Progress();
  ~Progress();
  bool visible() const { return visible_; }
  void show(const std::string& what, double share);
  void clear();

 private:
  bool visible_, shown_ = false;
  double start_;
};
double now();  // seconds of a steady clock

void add_attend(CLI::App* app);
void add_bench(CLI::App* app);
void add_verify(CLI::App* app);
void add_explain(CLI::App* app);
void add_devices(CLI::App* app);

}  // namespace tilewise::tool
