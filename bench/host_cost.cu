// Host time of plan.run() beside that of launching an empty kernel: what a call costs before the GPU has done anything. And of making the
// plan first, as who calls once does and the Python package each time.
// Prints one JSON object: medians of many calls in microseconds. At most kQueue launches wait in the stream, so that none waits for room.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

#include "tilewise/memory.hpp"
#include "tilewise/tilewise.hpp"

__global__ void empty() {}

namespace {

constexpr int kRounds = 200, kQueue = 50;

double now_us() { return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Mean of kQueue calls, once for each round.
template <class Call>
void measure(const Call& call, std::vector<double>& rounds) {
  const double begin = now_us();
  for (int i = 0; i < kQueue; ++i) call();
  rounds.push_back((now_us() - begin) / kQueue);
  cudaDeviceSynchronize();
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

}  // namespace

int main() {
  using namespace tilewise;
  const Device device = Device::cuda().value();
  const Problem problem = Problem::parse("q128 h4 d128 bf16 causal").value();
  const Plan plan = Plan::make(problem, device).value();
  std::vector<Buffer> buffers;
  const auto tensor = [&](DataType dtype, std::initializer_list<int64_t> shape) {
    buffers.push_back(Buffer::make(device, 128 * 4 * 128 * sizeof(float)).value());
    cudaMemset(buffers.back().data(), 0, buffers.back().size());
    return TensorView::contiguous(buffers.back().data(), dtype, shape);
  };
  Arguments a;
  for (TensorView* view : {&a.q, &a.k, &a.v, &a.o}) *view = tensor(DataType::kBFloat16, {1, 128, 4, 128});
  a.lse = tensor(DataType::kFloat32, {1, 4, 128});
  cudaStream_t stream;
  cudaStreamCreate(&stream);

  std::vector<double> run, launch, plan_and_run;
  for (int i = 0; i < kRounds; ++i) {
    measure([&] { plan.run(a, stream).check(); }, run);
    measure([&] { empty<<<1, 1, 0, stream>>>(); }, launch);
    measure([&] { Plan::make(problem, device).value().run(a, stream).check(); }, plan_and_run);
  }
  std::printf(
      "{\"device\": \"%s\", \"problem\": \"%s\", \"run_us\": %.2f, \"empty_launch_us\": %.2f, \"difference_us\": %.2f, "
      "\"plan_and_run_us\": %.2f}\n",
      device.name.c_str(), problem.to_string().c_str(), median(run), median(launch), median(run) - median(launch), median(plan_and_run));
}
