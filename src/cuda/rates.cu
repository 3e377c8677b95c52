// The device's own limits: the tensor cores fed from shared memory with the kernels' instruction, and reading memory.
#include <algorithm>

#include "cuda/backend.h"
#include "cuda/ptx/scalar.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/gemm.cuh"
#include "cuda/tile/shared.cuh"

namespace tilewise::cuda {
namespace {

constexpr int kProductDepth = 128, kProductKeys = 128;
constexpr double kProductFlops = 2.0 * 64 * kProductKeys * kProductDepth;

// Two warpgroups multiply random tiles: power, and with it the clock, depends on the data.
template <ptx::Element kElement>
__global__ void __launch_bounds__(256, 1) multiply(int rounds, float* sink) {
  struct Operands {
    tile::Tile<64, kProductDepth> q[2];
    tile::Tile<kProductKeys, kProductDepth> k;
  };
  extern __shared__ __align__(1024) unsigned char memory[];
  Operands& operands = *reinterpret_cast<Operands*>(memory);
  uint32_t state = threadIdx.x * 2654435761u + blockIdx.x * 40503u + 1;
  for (unsigned i = threadIdx.x; i < sizeof(Operands) / 2; i += blockDim.x) {
    int sum = 0;  // of eight bytes: near normal
    for (int j = 0; j < 8; ++j) {
      state = state * 1664525u + 1013904223u;
      sum += static_cast<int>(state >> 24);
    }
    reinterpret_cast<uint16_t*>(memory)[i] = static_cast<uint16_t>(ptx::pack<kElement>((sum - 1020) * (1 / 209.f), 0));
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  const auto& q = operands.q[threadIdx.x / 128];
  const uint32_t a = tile::operand(q.bytes, 16), b = tile::operand(operands.k.bytes, 16);
  float s[kProductKeys / 2] = {};
  for (int round = 0; round < rounds; ++round) {
    ptx::wgmma_fence();
    // Added up over the rounds: ptxas drops products whose results are overwritten, waits and volatile or not.
#pragma unroll
    for (int step = 0; step < kProductDepth / 16; ++step) {
      const int panel = step / 4, inside = step % 4 * 32;
      ptx::Wgmma<kElement, kProductKeys>::ss(s, a + ((panel * q.kPanelBytes + inside) >> 4),
                                             b + ((panel * operands.k.kPanelBytes + inside) >> 4), 1);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    tile::hold(s);
  }
  float total = 0;
  for (float x : s) total += x;
  if (total == 1.5e30f) *sink = total;
}

__global__ void __launch_bounds__(512) read(const uint4* data, size_t count, float* sink) {
  uint32_t bits = 0;
  for (size_t i = blockIdx.x * size_t{512} + threadIdx.x; i < count; i += gridDim.x * size_t{512}) {
    const uint4 x = __ldcs(data + i);
    bits ^= x.x ^ x.y ^ x.z ^ x.w;
  }
  if (bits == 0x12345678) *sink = 1;
}

// Seconds of the fastest of a few runs.
template <class Launch>
Status time(Launch launch, double& seconds) {
  cudaEvent_t begin, end;
  if (Status status = status_of(cudaEventCreate(&begin), "cudaEventCreate"); !status.ok()) return status;
  if (Status status = status_of(cudaEventCreate(&end), "cudaEventCreate"); !status.ok()) return status;
  seconds = 1e30;
  for (int i = 0; i < 6; ++i) {
    cudaEventRecord(begin);
    launch();
    cudaEventRecord(end);
    cudaEventSynchronize(end);
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    if (i > 0) seconds = std::min(seconds, ms * 1e-3);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return status_of(cudaGetLastError(), "measuring the device");
}

}  // namespace

Result<Rates> measure_rates(const Device& device, DataType dtype) {
  if (device.arch != "sm_90") return unsupported("no kernel here runs on " + device.arch);
  if (dtype != DataType::kBFloat16 && dtype != DataType::kFloat16) return unsupported("no kernel on " + device.arch + " takes this type");
  const Current current(device);
  if (Status status = status_of(current.error(), "cudaSetDevice"); !status.ok()) return status;
  const size_t bytes = std::min<size_t>(size_t{4} << 30, static_cast<size_t>(device.memory_bytes) / 8);
  void* data = nullptr;
  if (Status status = status_of(cudaMalloc(&data, bytes + 256), "cudaMalloc"); !status.ok()) return status;
  float* sink = reinterpret_cast<float*>(static_cast<char*>(data) + bytes);
  const auto multiply_kernel = dtype == DataType::kBFloat16 ? multiply<ptx::Element::kBFloat16> : multiply<ptx::Element::kFloat16>;
  constexpr int kShared = 2 * 64 * kProductDepth * 2 + kProductKeys * kProductDepth * 2, kRounds = 80000;
  Rates rates;
  double multiplying = 0, reading = 0;
  cudaMemset(data, 1, bytes);
  cudaFuncSetAttribute(multiply_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  const Status first = time([&] { multiply_kernel<<<device.units, 256, kShared>>>(kRounds, sink); }, multiplying);
  const Status second = time([&] { read<<<device.units * 4, 512>>>(static_cast<const uint4*>(data), bytes / 16, sink); }, reading);
  cudaFree(data);
  if (!first.ok()) return first;
  if (!second.ok()) return second;
  rates.flops_per_second = device.units * 2.0 * kRounds * kProductFlops / multiplying;
  rates.bytes_per_second = static_cast<double>(bytes) / reading;
  return rates;
}

}  // namespace tilewise::cuda
