// Judges a trial after its run: first the memory, then every output against float64 beside standard attention's error.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <span>

#include "reference/attention.h"
#include "reference/standard.h"
#include "reference/trial_state.h"

namespace tilewise::reference {
namespace {

// The bounds that trial.h states. The floor decides for short rows, where standard attention may be exact by chance (one key:
// p = 1); for long rows it is far below twice the standard error.
constexpr double kFloorMax = 16, kFloorMean = 6, kFloorMeanAlone = 8;
constexpr int64_t kFewRows = 32;
constexpr double kFrobenius32 = 2e-6, kModerateLse = 12;
constexpr double kLargestDrawn = 8;  // of normal numbers in float32

double unit_roundoff(DataType dtype) { return dtype == DataType::kFloat32 ? 0x1p-24 : dtype == DataType::kBFloat16 ? 0x1p-8 : 0x1p-11; }

struct Errors {
  double max = 0, mean = 0, mean_signed = 0, rel_frobenius = 0;
  double noise_max = 0, noise_mean = 0;
  double largest = 0, magnitude = 0;            // of the expected values: largest and mean magnitude
  int64_t misplaced = -1, misplaced_count = 0;  // first element that is NaN or infinite where it should not be, or not where it should
};

// Elements that counted(index) leaves out are not judged.
template <class F>
Errors errors_of(const TensorView& got, const std::vector<double>& expected, const std::vector<double>& noise, const F& counted) {
  const int64_t count = count_of(got);
  std::vector<double> values(count);
  for_each_element(got, [&](int64_t index, int64_t at) { values[index] = read_element(got.data, got.dtype, at); });
  const double overflow = got.dtype == DataType::kFloat16 ? 65520 : std::ldexp(1.0, 128);
  Errors e;
  double squares = 0, squares_expected = 0;
  int64_t judged = 0;
  for (int64_t n = 0; n < count; ++n) {
    if (!counted(n)) continue;
    const double want = std::abs(expected[n]) >= overflow ? std::copysign(INFINITY, expected[n]) : expected[n];
    if (!std::isfinite(want) || !std::isfinite(values[n])) {
      const bool same = std::isnan(want) ? std::isnan(values[n]) : want == values[n];
      if (!same && e.misplaced_count++ == 0) e.misplaced = n;
      continue;
    }
    const double error = values[n] - want;
    e.max = std::max(e.max, std::abs(error));
    e.mean += std::abs(error);
    e.mean_signed += error;
    squares += error * error, squares_expected += want * want;
    e.noise_max = std::max(e.noise_max, noise[n]);
    e.largest = std::max(e.largest, std::abs(want));
    e.magnitude += std::abs(want);
    e.noise_mean += noise[n];
    ++judged;
  }
  if (judged == 0) return e;
  e.mean /= judged, e.mean_signed /= judged, e.noise_mean /= judged, e.magnitude /= judged;
  e.rel_frobenius = squares_expected > 0 ? std::sqrt(squares / squares_expected) : std::sqrt(squares);
  return e;
}

const std::vector<double>& values_of(const Outputs& outputs, std::string_view name) {
  return name == "o"     ? outputs.o
         : name == "lse" ? outputs.lse
         : name == "dq"  ? outputs.dq
         : name == "dk"  ? outputs.dk
         : name == "dv"  ? outputs.dv
                         : outputs.dsink;
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g", value);
  return text;
}

void fail(Report* report, TensorReport* tensor, const std::string& reason) {
  tensor->pass = report->pass = false;
  if (tensor->reason.empty()) tensor->reason = reason;
  if (report->first_failure.empty()) report->first_failure = tensor->name + ": " + reason;
}

}  // namespace

// Brings the outputs to the mirrors and begins their reports; finds bytes that should not have been touched.
Status Trial::State::check_memory(const Ownership& owned, Report* report) {
  for (Tensor& t : tensors) {
    std::vector<std::byte> now(t.mirror.size());
    if (Status status = t.buffer.copy_to_host(now.data(), now.size()); !status.ok()) return status;
    TensorReport tensor_report;
    tensor_report.name = t.name;
    if (t.output) {
      TensorView written = t.host;
      written.data = now.data() + t.offset_bytes();
      std::vector<std::byte> kept = now;
      const int64_t bytes = element_bytes(t.host.dtype);
      int64_t unwritten = 0, strayed = 0;
      prepare_output(t);
      for_each_element(written, [&](int64_t index, int64_t at) {
        std::byte* element = static_cast<std::byte*>(written.data) + at * bytes;
        const std::byte* before = static_cast<std::byte*>(t.host.data) + at * bytes;
        const bool kept_value = std::memcmp(element, before, bytes) == 0, must_be_written = owned(t, index);
        if (t.added_to) {  // what was added is judged; it may be 0
          const float was = read_element(t.host.data, t.host.dtype, at);
          write_element(kept.data() + t.offset_bytes(), t.host.dtype, at, read_element(written.data, t.host.dtype, at) - was);
        }
        if (kept_value == must_be_written && !(t.added_to && must_be_written)) {
          int64_t& count = kept_value ? unwritten : strayed;
#pragma omp atomic
          ++count;
        }
        std::memcpy(element, before, bytes);
      });
      if (unwritten)
        fail(report, &tensor_report, std::to_string(unwritten) + " of " + std::to_string(count_of(t.host)) + " elements are not written");
      if (strayed) fail(report, &tensor_report, std::to_string(strayed) + " elements of rows that belong to no sequence are written");
      if (now != t.mirror) fail(report, &tensor_report, "memory around it is written");
      t.mirror = std::move(kept);
      t.host.data = t.mirror.data() + (static_cast<std::byte*>(written.data) - now.data());
      host_arguments.*t.member = t.host;
      report->tensors.push_back(std::move(tensor_report));
    } else if (now != t.mirror) {
      fail(report, &tensor_report, "an input is written");
    }
  }
  std::vector<std::byte> margins(workspace.size());
  if (Status status = workspace.copy_to_host(margins.data(), margins.size()); !status.ok()) return status;
  const auto intact = [](std::span<const std::byte> bytes) {
    return std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == std::byte{0xff}; });
  };
  if (!intact({margins.data(), kMarginBytes}) || !intact({margins.data() + margins.size() - kMarginBytes, kMarginBytes})) {
    TensorReport tensor_report;
    tensor_report.name = "workspace";
    fail(report, &tensor_report, "memory around it is written");
  }
  return {};
}

// Standard attention multiplies unseen keys by 0: it gets copies in which they are 0.
Result<StandardResults> Trial::State::run_standard() const {
  StandardResults results{host_arguments, {}};
  const auto contiguous_copy = [&](const Tensor& t) {
    results.memory.emplace_back(std::max<int64_t>(count_of(t.host) * element_bytes(t.host.dtype), 1));
    TensorView copy = t.host;
    copy.data = results.memory.back().data();
    int64_t pitch = 1;
    for (int d = copy.rank - 1; d >= 0; --d) copy.stride[d] = pitch, pitch *= copy.shape[d];
    return copy;
  };
  const std::vector<char> keys = keys_in_use();
  for (const Tensor& t : tensors) {
    if (t.name == "k" || t.name == "v") {
      const TensorView copy = contiguous_copy(t);
      const int64_t per_row = count_of(copy) / std::max<int64_t>(static_cast<int64_t>(keys.size()), 1);
      for_each_element(t.host, [&](int64_t index, int64_t at) {
        write_element(copy.data, copy.dtype, index, keys[index / per_row] ? read_element(t.host.data, t.host.dtype, at) : 0.0f);
      });
      results.arguments.*t.member = copy;
    } else if (t.output || t.name == "o" || t.name == "lse") {
      results.arguments.*t.member = contiguous_copy(t);
    }
  }
  Result<Standard> standard = Standard::make(problem());
  if (!standard) return standard.status();
  if (Status status = standard->forward(results.arguments); !status.ok()) return status;
  if (problem().pass == Pass::kBackward)
    if (Status status = standard->backward(results.arguments); !status.ok()) return status;
  return results;
}

void Trial::State::judge(const Exact& exact, const StandardResults* standard, const Ownership& owned, Report* report, TensorReport* r) {
  const bool float32 = problem().dtype == DataType::kFloat32;
  const Tensor& t = tensor(r->name);
  const auto counted = [&](int64_t index) { return owned(t, index); };
  const std::vector<double>&expected = values_of(exact.values, r->name), &noise = values_of(exact.noise, r->name);
  const Errors e = errors_of(t.host, expected, noise, counted);
  r->max = e.max, r->mean = e.mean, r->mean_signed = e.mean_signed, r->rel_frobenius = e.rel_frobenius;
  r->standard_max = r->standard_mean = std::numeric_limits<double>::quiet_NaN();
  if (e.misplaced_count > 0)
    fail(report, r,
         std::to_string(e.misplaced_count) + " elements are not finite or should not be, the first at " + std::to_string(e.misplaced) +
             " where float64 has " + number(expected[e.misplaced]));
  const double u = unit_roundoff(r->name == "lse" ? DataType::kFloat32 : problem().dtype);
  // A sum with what was there before is rounded at the size of the sum.
  const double of_sum = t.added_to ? 0x1p-23 * (kLargestDrawn + e.largest) : 0;
  const double mean_of_sum = t.added_to ? 0x1p-24 * (1 + e.magnitude) : 0;
  if (standard) {
    const Errors standard_errors = errors_of(standard->arguments.*t.member, expected, noise, counted);
    r->standard_max = standard_errors.max, r->standard_mean = standard_errors.mean;
    const double max_bound = 2 * r->standard_max + kFloorMax * u * e.noise_max + of_sum;
    // A row's elements share the errors of its probabilities: the mean over few rows is no surer than one of them.
    const bool of_rows = r->name != "lse" && r->name != "dsink";  // which have one element a row, or a head
    const bool few = of_rows && count_of(t.host) < kFewRows * t.host.shape[t.host.rank - 1];
    const double mean_bound = 2 * r->standard_mean + (few ? kFloorMax : kFloorMean) * u * e.noise_mean + mean_of_sum;
    if (!(e.max <= max_bound)) fail(report, r, "max error " + number(e.max) + " is above " + number(max_bound));
    if (!(e.mean <= mean_bound)) fail(report, r, "mean error " + number(e.mean) + " is above " + number(mean_bound));
  } else {
    const double bound = kFloorMeanAlone * u * e.noise_mean + mean_of_sum;
    if (!(e.mean <= bound)) fail(report, r, "mean error " + number(e.mean) + " is above " + number(bound));
  }
  const auto is_moderate = [](double lse) { return !std::isfinite(lse) || std::abs(lse) <= kModerateLse; };
  if (float32 && !t.added_to && (r->name == "o" || r->name == "dv") && std::ranges::all_of(exact.values.lse, is_moderate) &&
      !(e.rel_frobenius < kFrobenius32))
    fail(report, r, "relative Frobenius error " + number(e.rel_frobenius) + " is not below " + number(kFrobenius32));
}

Result<Report> Trial::compare() {
  State& s = *state_;
  Report report;
  const Ownership owned = s.ownership();
  if (Status status = s.check_memory(owned, &report); !status.ok()) return status;
  Exact exact;
  exact.values = attention(s.problem(), s.host_arguments, &exact.noise);
  const Result<StandardResults> standard = s.run_standard();
  if (!standard && standard.status().code() != StatusCode::kUnavailable) return standard.status();
  for (TensorReport& tensor : report.tensors) s.judge(exact, standard ? &*standard : nullptr, owned, &report, &tensor);
  return report;
}

}  // namespace tilewise::reference
