// A problem in host memory cut into parts that do not depend on each other, so that there is progress to show: no row's
// result depends on what else is in the batch, nor on the other rows. The parts write every output once.
#pragma once

#include <memory>
#include <vector>

#include "tilewise/tilewise.hpp"

namespace tilewise::tool {

struct Part {
  Problem problem;
  Arguments arguments;                               // views into those of the whole
  std::shared_ptr<std::vector<int32_t>> cu_seqlens;  // packed: of its sequences, which start at row 0 of its views
};

// About `count` parts where the problem has so many: sequences, then key/value heads, then, forward, runs of queries.
std::vector<Part> cut(const Problem& problem, const Arguments& arguments, int64_t count);

}  // namespace tilewise::tool
