// Runs one algorithm once, on one thread, as on a machine with a desk of a given size, while bench/traffic.py counts under
// Valgrind which cache lines cross between desk and warehouse. Prints what explain() predicts for the same problem.
// Usage: traffic flash|standard PROBLEM NEAR_BYTES DESK_BYTES
#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "reference/standard.h"
#include "reference/trial.h"
#include "tilewise/explain.hpp"

int main(int argc, char** argv) {
  using namespace tilewise;
  if (argc != 5) return 2;
  const Problem problem = Problem::parse(argv[2]).value();
  Device device = Device::cpu(1);
  if (device.arch == "avx512") device.arch = "avx2";  // the best that Valgrind can run
  device.near_bytes = std::atoll(argv[3]);
  device.desk_bytes = std::atoll(argv[4]);
  const Explanation e = explain(problem, device).value();
  std::printf("{\"kernel\": \"%s\", \"block_m\": %lld, \"block_n\": %lld, \"flash_bytes\": %.0f, \"standard_bytes\": %.0f}\n",
              e.kernel.c_str(), static_cast<long long>(e.tiles.block_m), static_cast<long long>(e.tiles.block_n), e.flash_bytes,
              e.standard_bytes);
  auto trial = reference::Trial::make(problem, device);
  if (std::string_view(argv[1]) == "flash") {
    trial.value().run().check();
  } else {
    reference::Standard::make(problem, 1).value().forward(trial.value().host_arguments()).check();
  }
}
