// Chooses a kernel: the first row of the device's backend, in the table's order, that has no objection. Every row that was
// passed over can say why.
#include <algorithm>
#include <cstdlib>

#include "registry/kernel.h"

namespace tilewise {
namespace {

// TILEWISE_KERNEL: names of rows with commas between, the only ones that may be taken. Empty: all may.
std::string_view allowed_kernels() {
  const char* names = std::getenv("TILEWISE_KERNEL");
  return names ? names : "";
}

bool is_allowed(std::string_view name, std::string_view allowed) {
  if (allowed.empty()) return true;
  for (size_t at = 0; at <= allowed.size();) {
    const size_t comma = std::min(allowed.find(',', at), allowed.size());
    if (allowed.substr(at, comma - at) == name) return true;
    at = comma + 1;
  }
  return false;
}

// What is said of the rows that TILEWISE_KERNEL does not allow. Names of the other pass or the other backend are kernels too.
std::string refuse_others(std::string_view allowed) {
  const auto known = [&](const Kernel& kernel) { return is_allowed(kernel.name, allowed); };
  const bool any = std::ranges::any_of(cpu_backend().kernels(), known) || std::ranges::any_of(cuda_backend().kernels(), known);
  return "TILEWISE_KERNEL " + (any ? "allows " + std::string(allowed) + " only" : std::string(allowed) + " is no kernel of this build");
}

Status check_device(const Backend& backend, const Device& device) {
  if (backend.kernels().empty()) return unsupported(kNoCuda);
  if (device.arch.empty()) {
    const std::string type = backend.type == DeviceType::kCuda ? "cuda" : "cpu";
    return invalid_argument("device was not filled in: Device::" + type + "() or tw_device_" + type + "() does");
  }
  if (backend.check)
    if (Status status = backend.check(device); !status.ok()) return status;
  return device.units < 1 ? invalid_argument("device.units " + std::to_string(device.units) + " is not positive") : Status();
}

}  // namespace

const Backend& backend_of(DeviceType type) { return type == DeviceType::kCuda ? cuda_backend() : cpu_backend(); }

Result<const Kernel*> select_kernel(const Problem& problem, const Device& device) {
  const Backend& backend = backend_of(device.type);
  if (Status status = check_device(backend, device); !status.ok()) return status;
  const std::string_view allowed = allowed_kernels();
  std::vector<Candidate> refusals;  // rows that say the same stand together
  for (const Kernel& kernel : backend.kernels()) {
    if (kernel.pass != problem.pass || !is_allowed(kernel.name, allowed)) continue;
    const std::string refusal = kernel.refusal(problem, device);
    if (refusal.empty()) return &kernel;
    const auto same = std::ranges::find(refusals, refusal, &Candidate::refusal);
    if (same == refusals.end())
      refusals.push_back({std::string(kernel.name), refusal});
    else
      same->name.append(", ").append(kernel.name);
  }
  std::string text = allowed.empty() ? "" : refuse_others(allowed);
  const bool all_alike = allowed.empty() && refusals.size() == 1;  // then what they are called is of no use
  for (const Candidate& refused : refusals)
    text.append(text.empty() ? "" : "; ").append(all_alike ? "" : refused.name + ": ").append(refused.refusal);
  return unsupported("no kernel takes '" + problem.to_string() + "' on " + device.name + " (" + device.arch + "): " + text);
}

std::vector<Candidate> list_candidates(const Problem& problem, const Device& device) {
  const Backend& backend = backend_of(device.type);
  const Status status = check_device(backend, device);
  const std::string_view allowed = allowed_kernels();
  const std::string others = refuse_others(allowed);
  std::vector<Candidate> candidates;
  for (const Kernel& kernel : backend.kernels()) {
    if (kernel.pass != problem.pass) continue;
    candidates.push_back({std::string(kernel.name), !status.ok()                       ? status.message()
                                                    : is_allowed(kernel.name, allowed) ? kernel.refusal(problem, device)
                                                                                       : others});
  }
  return candidates;
}

}  // namespace tilewise
