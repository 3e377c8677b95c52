// What plan.run() asks of its arguments before a kernel sees them.
#pragma once

#include "tilewise/tilewise.hpp"

namespace tilewise {

// Every tensor that the problem needs is there, and each has the shape, type and strides of the contract. Cheap, and allocates
// only to say what is wrong. Does not look at data: lengths stay on the device.
Status check_arguments(const Problem& problem, size_t workspace_bytes, const Arguments& arguments);

}  // namespace tilewise
