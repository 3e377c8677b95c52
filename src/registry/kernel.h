// A row of the kernel table and a backend that owns rows. Rows are ordered best first; a row that cannot keep a clause
// of the contract for a problem refuses it with a sentence. A backend left out of the build is an empty list.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "tilewise/explain.hpp"
#include "tilewise/tilewise.hpp"

namespace tilewise {

struct Kernel {
  std::string_view name;
  DeviceType device;
  Pass pass;
  // Why this row does not take the problem; empty if it does. The problem has passed validate().
  std::string (*refusal)(const Problem&, const Device&);
  TilePlan (*tile_plan)(const Problem&, const Device&);
  size_t (*workspace_bytes)(const Problem&, const Device&);
  // Arguments have been checked against the problem.
  Status (*launch)(const Problem&, const Device&, const Arguments&, Stream);
  // Loads the kernel where the device is there, so that its first run costs what others do. May be null.
  Status (*prepare)(const Device&) = nullptr;
};

struct Backend {
  DeviceType type;
  std::vector<Device> (*devices)();
  const std::vector<Kernel>& (*kernels)();
  Result<Rates> (*measure_rates)(const Device&, DataType);
  void* (*allocate)(const Device&, size_t bytes);  // nullptr where there is no memory left
  void (*release)(const Device&, void*);
  Result<int64_t> (*free_bytes)(const Device&);
  Status (*copy)(const Device&, void* target, const void* source, size_t bytes, bool to_host);
  Status (*synchronize)(const Device&);
  Status (*check)(const Device&) = nullptr;  // what a caller can have set wrong
};

constexpr const char* kNoCuda = "this build has no CUDA: configure with -DTILEWISE_CUDA=ON";

const Backend& cpu_backend();
const Backend& cuda_backend();
const Backend& backend_of(DeviceType type);

// The first row that accepts, or every refusal in one sentence.
Result<const Kernel*> select_kernel(const Problem& problem, const Device& device);
std::vector<Candidate> list_candidates(const Problem& problem, const Device& device);

}  // namespace tilewise
