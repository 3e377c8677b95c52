// What the files of the CPU backend share.
#pragma once

#include <vector>

#include "cpu/params.h"
#include "registry/kernel.h"

namespace tilewise::cpu {

const std::vector<Kernel>& kernels();
// The best instruction set of the device that this build has kernels for, or nullptr.
const Isa* best_isa_of(const Device& device);
// Beyond it a plan is refused: where threads cannot be made, OpenMP ends the process.
int most_threads();
Status check_threads(const Device& device);

}  // namespace tilewise::cpu
