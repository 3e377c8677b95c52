// plan.run() as a program that uses CUDA meets it: recorded in a graph, behind work that is not done, from many threads, and on
// tensors that are far apart in memory.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <limits>
#include <thread>

#include "common.h"

namespace tilewise {
namespace {

constexpr const char* kLines[] = {"b2 q600 k900 h6/2 d128 bf16 causal", "b3 q200 k300 h4 d64 fp16 packed tq400 tk700 seqused",
                                  "b1 q300 k700 h3 d256 bf16 window=90,20 softcap=20",
                                  "bwd b70 q20 h14 d64 bf16 causal deterministic",  // by all four kernels
                                  "bwd b2 q300 k500 h4/2 d256 bf16 causal deterministic"};

struct Run : Cuda {
  // A stream that waits for no other.
  struct Queue {
    cudaStream_t stream = nullptr;
    Queue() { EXPECT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess); }
    ~Queue() { cudaStreamDestroy(stream); }
    Queue(const Queue&) = delete;
    Queue& operator=(const Queue&) = delete;
  };
  static size_t free_bytes() {
    size_t free = 0, total = 0;
    EXPECT_EQ(cudaMemGetInfo(&free, &total), cudaSuccess);
    return free;
  }
};

// Capture in global mode refuses every call that allocates or waits.
TEST_F(Run, AGraphRepeatsTheBits) {
  for (const char* line : kLines) {
    Trial t = trial(line);
    const Queue queue;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t recorded = nullptr;
    ASSERT_EQ(cudaStreamBeginCapture(queue.stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    const Status status = t.plan().run(t.arguments(), queue.stream);
    ASSERT_EQ(cudaStreamEndCapture(queue.stream, &graph), cudaSuccess) << line;
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_EQ(cudaGraphInstantiate(&recorded, graph, 0), cudaSuccess);
    const std::vector<char> expected = output(t);
    for (int i = 0; i < 3; ++i) {
      t.upload().check();  // outputs are NaN again
      ASSERT_EQ(cudaGraphLaunch(recorded, queue.stream), cudaSuccess);
      ASSERT_EQ(cudaStreamSynchronize(queue.stream), cudaSuccess) << line;
      EXPECT_EQ(written(t) == expected, true) << line;
    }
    cudaGraphExecDestroy(recorded);
    cudaGraphDestroy(graph);
  }
}

TEST_F(Run, NeitherWaitsNorAllocates) {
  // The stream stands still until the gate opens; a run() that waits for it would find it opened by the clock.
  struct Gate {
    std::atomic<bool> open{false}, by_clock{false};
    static void wait(void* self) {
      Gate& gate = *static_cast<Gate*>(self);
      const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(5);
      while (!gate.open && !gate.by_clock) gate.by_clock = std::chrono::steady_clock::now() > limit;
    }
  };
  for (const char* line : kLines) {
    Trial t = trial(line);
    const std::vector<char> expected = output(t);
    const size_t before = free_bytes();
    Gate gate;
    const Queue queue;
    ASSERT_EQ(cudaLaunchHostFunc(queue.stream, Gate::wait, &gate), cudaSuccess);
    for (int i = 0; i < 100; ++i) t.plan().run(t.arguments(), queue.stream).check();
    EXPECT_FALSE(gate.by_clock) << line;
    gate.open = true;
    ASSERT_EQ(cudaStreamSynchronize(queue.stream), cudaSuccess);
    EXPECT_EQ(free_bytes(), before) << line;
    EXPECT_EQ(written(t), expected) << line;
  }
}

// Plan::make() has loaded the kernels: nothing is left for the first run() of a row that no other test takes.
TEST_F(Run, TheFirstRunTakesNoMemory) {
  for (const char* line : {"q200 h2 d248 fp16 alibi", "bwd q200 h2 d248 fp16 alibi"}) {
    Trial t = trial(line);
    const size_t before = free_bytes();
    t.plan().run(t.arguments()).check();
    synchronize(device_).check();
    EXPECT_EQ(free_bytes(), before) << line;
  }
}

// The thread's device stays what it was, and one that nobody has used gets no context.
TEST_F(Run, OnTheSecondDevice) {
  const Result<Device> second = Device::cuda(1);
  if (!second) GTEST_SKIP() << second.status().message();
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  const Device first = device_;
  for (const char* line : kLines) {
    device_ = first;
    Trial here = trial(line);
    const std::vector<char> expected = output(here);
    device_ = *second;
    Trial there = trial(line);
    EXPECT_EQ(output(there), expected) << line;
    int current = -1;
    ASSERT_EQ(cudaGetDevice(&current), cudaSuccess);
    EXPECT_EQ(current, 0) << line;
  }
  // A new thread has used no device.
  Trial there = trial(kLines[0]);
  std::thread([&] {
    there.plan().run(there.arguments()).check();
    CUcontext context = nullptr;
    void* get = nullptr;
    ASSERT_EQ(cudaGetDriverEntryPointByVersion("cuCtxGetCurrent", &get, 12000, cudaEnableDefault, nullptr), cudaSuccess);
    ASSERT_EQ(reinterpret_cast<decltype(&cuCtxGetCurrent)>(get)(&context), CUDA_SUCCESS);
    EXPECT_EQ(context, nullptr);
    void* memory = nullptr;
    ASSERT_EQ(cudaMalloc(&memory, 256), cudaSuccess);
    cudaPointerAttributes attributes;
    ASSERT_EQ(cudaPointerGetAttributes(&attributes, memory), cudaSuccess);
    EXPECT_EQ(attributes.device, 0);
    cudaFree(memory);
  }).join();
}

TEST_F(Run, ThreadsShareAPlan) {
  Trial t = trial(kLines[0]);
  const Plan plan = t.plan();
  const std::vector<char> expected = output(t);
  const size_t o_bytes = bytes_of(t.arguments().o), lse_bytes = bytes_of(t.arguments().lse);
  std::vector<std::vector<char>> found(8, std::vector<char>(expected.size()));
  std::vector<std::thread> threads;
  for (std::vector<char>& bytes : found)
    threads.emplace_back([&] {
      const Queue queue;
      const Buffer o = Buffer::make(device_, o_bytes).value(), lse = Buffer::make(device_, lse_bytes).value();
      Arguments own = t.arguments();
      own.o.data = o.data(), own.lse.data = lse.data();
      for (int i = 0; i < 50; ++i) plan.run(own, queue.stream).check();
      EXPECT_EQ(cudaStreamSynchronize(queue.stream), cudaSuccess);
      o.copy_to_host(bytes.data(), o_bytes).check();
      lse.copy_to_host(bytes.data() + o_bytes, lse_bytes).check();
    });
  for (std::thread& thread : threads) thread.join();
  for (const std::vector<char>& bytes : found) EXPECT_EQ(bytes, expected);
}

// A stride of one dimension after the other takes the last element past 2^31. One value is infinite, so that the plain loads are far too.
TEST_F(Run, OffsetsPastTwoToThe31) {
  constexpr int64_t kFar = (int64_t{1} << 31) + (1 << 20), kApart = 1 << 21;  // elements: within a tensor, between tensors
  Trial t = trial("b2 q150 k150 h2 d64 bf16 causal");
  set_row(t.host_arguments().v, 0, 100, 1, std::numeric_limits<float>::infinity());
  t.upload().check();
  const std::vector<char> expected = output(t);
  constexpr size_t kBytes = 2 * (kFar + 5 * kApart);
  if (free_bytes() < kBytes + (size_t{1} << 28)) GTEST_SKIP() << "needs " << kBytes << " bytes of free memory, there are " << free_bytes();
  const Buffer memory = Buffer::make(device_, kBytes).value();

  const auto copy_rows = [](const TensorView& to, const TensorView& from) {
    for (int64_t b = 0; b < from.shape[0]; ++b)
      for (int64_t row = 0; row < from.shape[1]; ++row)
        for (int64_t head = 0; head < from.shape[2]; ++head) {
          const auto at = [&](const TensorView& view) {
            return static_cast<char*>(view.data) + 2 * (b * view.stride[0] + row * view.stride[1] + head * view.stride[2]);
          };
          ASSERT_EQ(cudaMemcpyAsync(at(to), at(from), 2 * static_cast<size_t>(from.shape[3]), cudaMemcpyDefault), cudaSuccess);
        }
  };
  for (const size_t dimension : {0, 1, 2}) {
    t.upload().check();
    Arguments far = t.arguments();
    auto* start = static_cast<char*>(memory.data());
    for (auto member : {&Arguments::q, &Arguments::k, &Arguments::v, &Arguments::o}) {
      TensorView& view = far.*member;
      view.data = start, start += 2 * kApart;
      view.stride[dimension] = (kFar / (view.shape[dimension] - 1) + 7) / 8 * 8;
      copy_rows(view, t.arguments().*member);
    }
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    t.plan().run(far).check();
    copy_rows(t.arguments().o, far.o);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_EQ(written(t), expected) << "stride " << far.q.stride[dimension] << " in dimension " << dimension;
  }
}

// Query i sees nothing but keys j = i modulo head_dim: all other weights are e^-1024, which is 0 in float64 too. The mean of a few small
// integers has no tie to round, so that float64 rounded once is the only right answer.
TEST_F(Run, SmallIntegersAreExact) {
  for (const char* line :
       {"b2 q150 k300 h4/2 d64 bf16 scale=1", "b1 q300 k300 h2 d128 bf16 scale=1 causal", "q200 k500 h2 d256 bf16 scale=1",
        "q200 k300 h2 d96 fp16 scale=1 causal", "b2 q90 k200 h2 d192/128 fp16 scale=1", "q100 k300 h1 d64 fp16 scale=1 window=128,64"}) {
    Trial t = trial(line);
    const Problem problem = parse(line);
    const Arguments& a = t.host_arguments();
    const auto fill = [](const TensorView& view, auto&& value) {
      for (int64_t b = 0; b < view.shape[0]; ++b)
        for (int64_t row = 0; row < view.shape[1]; ++row)
          for (int64_t head = 0; head < view.shape[2]; ++head)
            for (int64_t x = 0; x < view.shape[3]; ++x)
              reference::write_element(view.data, view.dtype, b * view.stride[0] + row * view.stride[1] + head * view.stride[2] + x,
                                       static_cast<float>(value(b, row, head, x)));
    };
    const auto one_of_dim = [&](int64_t, int64_t row, int64_t, int64_t x) { return row % problem.head_dim == x ? 32 : 0; };
    fill(a.q, one_of_dim);
    fill(a.k, one_of_dim);
    fill(a.v, [](int64_t b, int64_t row, int64_t head, int64_t x) { return (7 * row + 3 * x + 5 * head + b) % 9 - 4; });
    t.upload().check();
    output(t);
    const reference::Outputs exact = reference::attention(problem, a);
    uint16_t rounded[2] = {};  // room for a float, which the compiler thinks could be written
    for (size_t i = 0; i < exact.o.size(); ++i) {
      const double value = std::abs(exact.o[i]) < 1e-12 ? 0 : exact.o[i];  // thirds do not add up to 0 in float64 either
      reference::write_element(rounded, a.o.dtype, 0, static_cast<float>(value));
      ASSERT_EQ(static_cast<const uint16_t*>(a.o.data)[i], rounded[0]) << line << ", element " << i << ", which is " << value;
    }
  }
}

}  // namespace
}  // namespace tilewise
