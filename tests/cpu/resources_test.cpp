// What run() may not do: allocate, need more than O(N) memory, mind other threads, or count elements in 32 bits.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <new>
#include <thread>

#include "common.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define TW_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define TW_SANITIZED 1
#endif
#endif

// Every allocation of this program passes here: its own, the C++ runtime's and OpenMP's.
static std::atomic<int64_t> allocations{0};
// Not with clang: libomp 14 makes dozens of allocations of its own in a call.
#if !defined(TW_SANITIZED) && defined(__GLIBC__) && !defined(__clang__)
#define TW_COUNTS_ALLOCATIONS 1
// Others call these too: they must not be hidden as the rest of the program is.
#pragma GCC visibility push(default)
extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void* malloc(size_t bytes) { return ++allocations, __libc_malloc(bytes); }
void* calloc(size_t count, size_t bytes) { return ++allocations, __libc_calloc(count, bytes); }
void* realloc(void* memory, size_t bytes) { return ++allocations, __libc_realloc(memory, bytes); }
void* memalign(size_t alignment, size_t bytes) { return ++allocations, __libc_memalign(alignment, bytes); }
void* aligned_alloc(size_t alignment, size_t bytes) { return ++allocations, __libc_memalign(alignment, bytes); }
int posix_memalign(void** memory, size_t alignment, size_t bytes) {
  ++allocations;
  *memory = __libc_memalign(alignment, bytes);
  return *memory ? 0 : ENOMEM;
}
}
#pragma GCC visibility pop
#endif

namespace tilewise {
namespace {

using reference::Trial;

struct Resources : Cpu {};
INSTANTIATE_TEST_SUITE_P(Isa, Resources, testing::ValuesIn(isas()), isa_name);

TEST_P(Resources, RunAllocatesNothing) {
#if !defined(TW_COUNTS_ALLOCATIONS)
  GTEST_SKIP() << "allocations are not counted under a sanitizer or with clang's OpenMP runtime";
#endif
  const int64_t before_any = allocations;
  ::operator delete(::operator new(100));  // a call of its own: a compiler may leave out what a new expression would allocate
  ASSERT_GT(allocations, before_any) << "the counter does not count";
  for (const char* line :
       {"fwd b2 q100 k200 h4/2 d64 fp32 causal", "bwd b2 q100 k200 h4/2 d64 fp32 causal", "fwd b3 q50 h2 d40 bf16 packed tq90 tk90 sink",
        "bwd b3 q50 h2 d40 fp16 packed tq90 tk90 sink", "fwd q1 k3000 h8/2 d128 fp32"}) {
    Trial trial = std::move(Trial::make(parse(line), Device::cpu(2)).value());
    ASSERT_TRUE(trial.plan().run(trial.arguments()).ok());  // OpenMP has its threads now
    const int64_t before = allocations;
    const Status status = trial.plan().run(trial.arguments());
    EXPECT_EQ(allocations - before, 0) << line;
    EXPECT_TRUE(status.ok());
  }
}

TEST_P(Resources, OnePlanServesManyThreads) {
  for (const char* line : {"fwd b2 q90 k120 h4/2 d64 fp32 causal", "bwd b2 q90 k120 h4/2 d64 fp32 causal"}) {
    HostTrial t(parse(line), 1);
    const auto expected = t.run_bits(2);
    const Plan plan = Plan::make(t.problem, Device::cpu(2)).value();
    constexpr int kThreads = 4;
    std::vector<std::unique_ptr<HostTrial>> trials;
    std::vector<Buffer> workspaces;
    for (int n = 0; n < kThreads; ++n) {
      trials.push_back(std::make_unique<HostTrial>(t.problem, 1));
      trials.back()->run_bits(2);  // backward: o and lse
      workspaces.push_back(Buffer::make(plan.device(), plan.workspace_bytes() + 1).value());
    }
    std::atomic<int> failures{0};
    std::vector<std::thread> threads;
    for (int n = 0; n < kThreads; ++n)
      threads.emplace_back([&, n] {
        Arguments a = trials[n]->arguments();
        a.workspace = workspaces[n].data();
        for (int repeat = 0; repeat < 10; ++repeat) failures += !plan.run(a).ok();
      });
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(failures, 0);
    for (auto& trial : trials) {
      size_t n = 0;
      for (const TensorView& output : outputs_of(t.problem, trial->arguments())) EXPECT_EQ(bits_of(output), expected[n++]) << line;
    }
  }
}

// Address space of which only the touched pages exist.
struct Reserved {
  void* memory = MAP_FAILED;
  size_t bytes = 0;
  explicit Reserved(size_t size) : bytes(size) {
    memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  ~Reserved() {
    if (memory != MAP_FAILED) munmap(memory, bytes);
  }
};

TEST_P(Resources, OffsetsPastTwoToThe31Elements) {
  for (const char* line : {"fwd b2 q70 k90 h2/1 d16 fp32 causal", "bwd b2 q70 k90 h2/1 d16 fp32 causal", "fwd b2 q70 k90 h2/1 d16 bf16",
                           "bwd b2 q70 k90 h2/1 d16 bf16"}) {
    const Problem p = parse(line);
    HostTrial t(p, 1);
    const auto expected = t.run_bits();
    const int64_t row = (int64_t{1} << 31) / 60, batch = row * 91,
                  bytes = reference::element_bytes(p.dtype);  // rows reach past 2^31 in each batch
    std::vector<std::unique_ptr<Reserved>> reserved;
    Arguments a = t.arguments();
    for (auto member :
         {&Arguments::q, &Arguments::k, &Arguments::v, &Arguments::o, &Arguments::do_, &Arguments::dq, &Arguments::dk, &Arguments::dv}) {
      TensorView& view = a.*member;
      if (!view) continue;
      const TensorView near = view;
      reserved.push_back(std::make_unique<Reserved>(static_cast<size_t>((2 * batch + row) * bytes)));
      if (reserved.back()->memory == MAP_FAILED) GTEST_SKIP() << "no address space for large tensors";
      view.data = reserved.back()->memory, view.stride = {batch, row, 1000, 1};
      for (int64_t b = 0; b < 2; ++b)
        for (int64_t i = 0; i < view.shape[1]; ++i)
          for (int64_t h = 0; h < view.shape[2]; ++h)
            for (int64_t x = 0; x < view.shape[3]; ++x) set(view, {b, i, h, x}, get(near, {b, i, h, x}));
    }
    run(p, a);
    size_t n = 0;
    for (const TensorView& output : outputs_of(p, a)) EXPECT_EQ(bits_of(output), expected[n++]) << line;
  }
}

int64_t status_kib(const std::string& key) {
  std::ifstream status("/proc/self/status");
  int64_t kib = 0;
  for (std::string word, line; status >> word; std::getline(status, line))
    if (word == key + ":" && status >> kib) return kib;
  return 0;
}

TEST_P(Resources, WorkspaceGrowsWithTheLengthOnly) {
  for (const char* pass : {"fwd", "bwd"})
    for (const char* rest : {" h4 d64 fp32", " h4/1 d128 bf16 causal", " h1 d16 fp32"}) {
      const auto bytes = [&](int64_t n) {
        return static_cast<double>(Plan::make(parse(pass + (" q" + std::to_string(n)) + rest), Device::cpu(2))->workspace_bytes());
      };
      // Backward keeps up to 16 partial sums of dq, one for each chunk of keys: from 32768 keys on it grows with the queries only.
      EXPECT_LE(bytes(1 << 20), 4.1 * bytes(1 << 18)) << pass << rest;
    }
}

TEST_P(Resources, SlowPeakMemoryIsLinear) {
  if (GetParam() != Device::cpu().arch) GTEST_SKIP() << "memory does not depend on the instruction set";
  for (const char* line : {"fwd q16384 h1 d64 fp32 causal", "bwd q12288 h1 d64 fp32 causal"}) {
    const Problem p = parse(line);
    Trial trial = std::move(Trial::make(p, Device::cpu(2)).value());
    std::ofstream("/proc/self/clear_refs") << "5";  // the peak starts from here
    const int64_t before = status_kib("VmHWM");
    ASSERT_GT(before, 0);
    ASSERT_TRUE(trial.run().ok());
    const int64_t matrix_kib = p.seqlen_q * p.seqlen_k * 4 / 1024;
    EXPECT_LT(status_kib("VmHWM") - before, matrix_kib / 20) << line;
  }
}

}  // namespace
}  // namespace tilewise
