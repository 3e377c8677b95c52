// What a plan will do, counted from the mask.
#include "tilewise/explain.hpp"

#include "registry/kernel.h"

namespace tilewise {

Result<Explanation> explain(const Problem& problem, const Device& device, const Lengths&) {
  if (Status status = problem.validate(); !status.ok()) return status;
  Explanation e;
  e.candidates = list_candidates(problem, device);
  return e;
}

Result<Rates> measure_rates(const Device& device, DataType dtype) {
  if (dtype == DataType::kInt32) return invalid_argument("dtype int32 is none of fp32, bf16 and fp16");
  return backend_of(device.type).measure_rates(device, dtype);
}

}  // namespace tilewise
