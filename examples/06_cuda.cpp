// On a GPU, as an engine calls it: its own memory and stream, forward and backward captured into one CUDA graph, and a comparison with
// the CPU kernels. Plain C++: of CUDA only the runtime library is needed. Exit code 77 where there is no Hopper GPU.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "tilewise/memory.hpp"
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

// bfloat16 [batch, seqlen, heads, head_dim], on the host and on the GPU.
struct Tensor {
  const char* name;
  int64_t seqlen, heads;
  std::vector<uint16_t> host;
  void* device = nullptr;
  size_t bytes() const { return host.size() * sizeof host[0]; }
};

}  // namespace

int main() {
  const Result<Device> gpu = Device::cuda();
  if (!gpu) {
    std::printf("skipped: %s\n", gpu.status().message().c_str());
    return 77;
  }
  if (gpu->arch != "sm_90") {
    std::printf("skipped: %s is %s, and Tilewise's kernels are for sm_90\n", gpu->name.c_str(), gpu->arch.c_str());
    return 77;
  }
  // Grouped heads, the queries at the end of the keys, as in a prompt that continues a conversation.
  const Problem problem = Problem::parse("fwd b2 q300 k1000 h8/2 d128 bf16 causal").value();
  Problem gradient_problem = problem;
  gradient_problem.pass = Pass::kBackward;
  const Plan forward_plan = Plan::make(problem, *gpu).value(), backward_plan = Plan::make(gradient_problem, *gpu).value();

  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto make = [&](const char* name, int64_t seqlen, int64_t heads, bool input) {
    Tensor x{name, seqlen, heads, std::vector<uint16_t>(static_cast<size_t>(problem.batch * seqlen * heads * problem.head_dim))};
    if (input)
      for (uint16_t& value : x.host) value = to_bfloat16(normal(random));
    check(cudaMalloc(&x.device, x.bytes()));
    check(cudaMemcpyAsync(x.device, x.host.data(), x.bytes(), cudaMemcpyHostToDevice, stream));
    return x;
  };
  const auto of_queries = [&](const char* name, bool input) { return make(name, problem.seqlen_q, problem.num_heads_q, input); };
  const auto of_keys = [&](const char* name, bool input) { return make(name, problem.seqlen_k, problem.num_heads_kv, input); };
  Tensor q = of_queries("q", true), k = of_keys("k", true), v = of_keys("v", true), do_ = of_queries("do", true);
  Tensor o = of_queries("o", false), dq = of_queries("dq", false), dk = of_keys("dk", false), dv = of_keys("dv", false);
  std::vector<float> lse(static_cast<size_t>(problem.batch * problem.num_heads_q * problem.seqlen_q));
  void *device_lse, *workspace = nullptr;
  check(cudaMalloc(&device_lse, lse.size() * sizeof lse[0]));
  if (const size_t bytes = std::max(forward_plan.workspace_bytes(), backward_plan.workspace_bytes())) check(cudaMalloc(&workspace, bytes));

  // One set of arguments serves both plans: forward leaves the gradients alone.
  const auto arguments_in = [&](bool device, void* lse_, void* workspace_) {
    const auto view = [&](Tensor& x) {
      return TensorView::contiguous(device ? x.device : x.host.data(), problem.dtype, {problem.batch, x.seqlen, x.heads, problem.head_dim});
    };
    Arguments arguments;
    arguments.q = view(q), arguments.k = view(k), arguments.v = view(v), arguments.o = view(o);
    arguments.lse = TensorView::contiguous(lse_, DataType::kFloat32, {problem.batch, problem.num_heads_q, problem.seqlen_q});
    arguments.do_ = view(do_), arguments.dq = view(dq), arguments.dk = view(dk), arguments.dv = view(dv);
    arguments.workspace = workspace_;
    return arguments;
  };

  // run() only launches: it allocates nothing and waits for nothing, so that a graph can hold it.
  const Arguments on_gpu = arguments_in(true, device_lse, workspace);
  cudaGraph_t graph;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  forward_plan.run(on_gpu, stream).check();
  backward_plan.run(on_gpu, stream).check();
  check(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t layer;
  check(cudaGraphInstantiate(&layer, graph, 0));
  check(cudaGraphLaunch(layer, stream));

  const Plan on_cpu = Plan::make(problem).value(), gradients_on_cpu = Plan::make(gradient_problem).value();
  Buffer host_workspace = Buffer::make(Device::cpu(), std::max(on_cpu.workspace_bytes(), gradients_on_cpu.workspace_bytes())).value();
  const Arguments on_host = arguments_in(false, lse.data(), host_workspace.data());
  on_cpu.run(on_host).check();
  gradients_on_cpu.run(on_host).check();

  std::printf("%s on %s: %s, %s\n", problem.to_string().c_str(), gpu->name.c_str(), std::string(forward_plan.kernel()).c_str(),
              std::string(backward_plan.kernel()).c_str());
  bool close = true;
  for (const Tensor* x : {&o, &dq, &dk, &dv}) {
    std::vector<uint16_t> got(x->host.size());
    check(cudaMemcpyAsync(got.data(), x->device, x->bytes(), cudaMemcpyDeviceToHost, stream));
    check(cudaStreamSynchronize(stream));
    float difference = 0, largest = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      difference = std::fmax(difference, std::fabs(to_float(got[i]) - to_float(x->host[i])));
      largest = std::fmax(largest, std::fabs(to_float(x->host[i])));
    }
    std::printf("%-2s largest %.3g, largest difference from the CPU's %.2g\n", x->name, largest, difference);
    close = close && largest > 0 && difference <= largest / 64;  // both round to 8 bits
  }
  check(cudaGraphExecDestroy(layer));
  check(cudaGraphDestroy(graph));
  for (const Tensor* x : {&q, &k, &v, &do_, &o, &dq, &dk, &dv}) check(cudaFree(x->device));
  for (void* memory : {device_lse, workspace}) check(cudaFree(memory));
  check(cudaStreamDestroy(stream));
  return close ? 0 : 1;
}
