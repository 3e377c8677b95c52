// On a GPU, as an inference engine calls it: the engine's own memory and stream, run() captured into a CUDA graph, and a comparison with
// the CPU kernels. Plain C++: of CUDA only the runtime library is needed. Exit code 77 where there is no Hopper GPU.
#include <cuda_runtime_api.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "tilewise/tilewise.hpp"

using namespace tilewise;

namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

uint16_t to_bfloat16(float x) {  // rounds to nearest, ties to even; no NaN here
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float to_float(uint16_t x) { return std::bit_cast<float>(uint32_t{x} << 16); }

}  // namespace

int main() {
  const Result<Device> gpu = Device::cuda();
  if (!gpu) {
    std::printf("skipped: %s\n", gpu.status().message().c_str());
    return 77;
  }
  // Grouped heads, the queries at the end of the keys, as in a prompt that continues a conversation.
  const Problem problem = Problem::parse("b2 q300 k1000 h8/2 d128 bf16 causal").value();
  if (gpu->arch != "sm_90") {
    std::printf("skipped: %s is %s, and Tilewise's kernels are for sm_90\n", gpu->name.c_str(), gpu->arch.c_str());
    return 77;
  }
  const Plan plan = Plan::make(problem, *gpu).value();

  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto draw = [&](int64_t elements) {
    std::vector<uint16_t> values(static_cast<size_t>(elements));
    for (uint16_t& value : values) value = to_bfloat16(normal(random));
    return values;
  };
  const int64_t query_rows = problem.batch * problem.seqlen_q * problem.num_heads_q;
  const int64_t key_rows = problem.batch * problem.seqlen_k * problem.num_heads_kv;
  std::vector<uint16_t> q = draw(query_rows * problem.head_dim), k = draw(key_rows * problem.head_dim),
                        v = draw(key_rows * problem.head_dim);
  std::vector<uint16_t> o(q.size()), expected(q.size());
  const auto arguments_at = [&](void* q_, void* k_, void* v_, void* o_) {
    const auto of_keys = [&](void* x) {
      return TensorView::contiguous(x, problem.dtype, {problem.batch, problem.seqlen_k, problem.num_heads_kv, problem.head_dim});
    };
    const auto of_queries = [&](void* x) {
      return TensorView::contiguous(x, problem.dtype, {problem.batch, problem.seqlen_q, problem.num_heads_q, problem.head_dim});
    };
    Arguments arguments;
    arguments.q = of_queries(q_), arguments.k = of_keys(k_), arguments.v = of_keys(v_), arguments.o = of_queries(o_);
    return arguments;
  };

  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const auto bytes = [](const std::vector<uint16_t>& x) { return x.size() * sizeof x[0]; };
  void *device_q, *device_k, *device_v, *device_o, *workspace = nullptr;
  check(cudaMalloc(&device_q, bytes(q)));
  check(cudaMalloc(&device_k, bytes(k)));
  check(cudaMalloc(&device_v, bytes(v)));
  check(cudaMalloc(&device_o, bytes(o)));
  if (plan.workspace_bytes() > 0) check(cudaMalloc(&workspace, plan.workspace_bytes()));
  check(cudaMemcpyAsync(device_q, q.data(), bytes(q), cudaMemcpyHostToDevice, stream));
  check(cudaMemcpyAsync(device_k, k.data(), bytes(k), cudaMemcpyHostToDevice, stream));
  check(cudaMemcpyAsync(device_v, v.data(), bytes(v), cudaMemcpyHostToDevice, stream));

  // run() only launches: it allocates nothing and waits for nothing, so that a graph can hold it.
  Arguments arguments = arguments_at(device_q, device_k, device_v, device_o);
  arguments.workspace = workspace;
  cudaGraph_t graph;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  plan.run(arguments, stream).check();
  check(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t layers;
  check(cudaGraphInstantiate(&layers, graph, 0));
  check(cudaGraphLaunch(layers, stream));
  check(cudaMemcpyAsync(o.data(), device_o, bytes(o), cudaMemcpyDeviceToHost, stream));
  check(cudaStreamSynchronize(stream));

  const Arguments on_host = arguments_at(q.data(), k.data(), v.data(), expected.data());
  Options options;
  options.causal = true;
  forward(on_host.q, on_host.k, on_host.v, on_host.o, {}, options).check();
  float difference = 0, largest = 0;
  for (size_t i = 0; i < o.size(); ++i) {
    difference = std::fmax(difference, std::fabs(to_float(o[i]) - to_float(expected[i])));
    largest = std::fmax(largest, std::fabs(to_float(expected[i])));
  }
  std::printf("%s on %s: %s; largest output %.3g, largest difference from the CPU's %.3g\n", problem.to_string().c_str(), gpu->name.c_str(),
              std::string(plan.kernel()).c_str(), largest, difference);
  check(cudaGraphExecDestroy(layers));
  check(cudaGraphDestroy(graph));
  for (void* memory : {device_q, device_k, device_v, device_o, workspace}) check(cudaFree(memory));
  check(cudaStreamDestroy(stream));
  return largest > 0 && difference <= largest / 64 ? 0 : 1;  // both round to 8 bits
}
