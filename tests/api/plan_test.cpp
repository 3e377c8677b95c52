// Plans, the checks that run() makes before a kernel sees anything, and the one-call functions.
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <numeric>

#include "tilewise/memory.hpp"
#include "tilewise/tilewise.hpp"

static std::atomic<int> allocations = 0;
// Not inlined: GCC would see free() meet a pointer from new and warn.
[[gnu::noinline]] void* operator new(size_t bytes) {
  ++allocations;
  if (void* data = std::malloc(bytes)) return data;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* data) noexcept { std::free(data); }
[[gnu::noinline]] void operator delete(void* data, size_t) noexcept { std::free(data); }

// The address sanitizer asks: memory that is not there is an answer, not a crash.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options();
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1"; }

namespace tilewise {
namespace {

// Buffers and views for every argument that a problem can have.
struct Call {
  Problem problem;
  std::vector<std::vector<float>> buffers;
  Arguments arguments;
  Buffer workspace;

  TensorView tensor(std::initializer_list<int64_t> shape, DataType dtype = DataType::kFloat32) {
    const int64_t elements = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
    std::vector<float>& buffer = buffers.emplace_back(static_cast<size_t>(std::max<int64_t>(elements, 1)));
    for (size_t i = 0; i < buffer.size(); ++i) buffer[i] = static_cast<float>(i * 37 % 101) / 101 - 0.5f;
    return TensorView::contiguous(buffer.data(), dtype, shape);
  }

  explicit Call(std::string_view text) : problem(*Problem::parse(text)) {
    const Problem& p = problem;
    const auto rows = [&](int64_t total, int64_t seqlen, int64_t heads, int64_t dim) {
      return p.packed ? tensor({total, heads, dim}, p.dtype) : tensor({p.batch, seqlen, heads, dim}, p.dtype);
    };
    const auto per_row = [&] { return p.packed ? tensor({p.num_heads_q, p.total_q}) : tensor({p.batch, p.num_heads_q, p.seqlen_q}); };
    Arguments& a = arguments;
    a.q = rows(p.total_q, p.seqlen_q, p.num_heads_q, p.head_dim);
    a.k = rows(p.total_k, p.seqlen_k, p.num_heads_kv, p.head_dim);
    a.v = rows(p.total_k, p.seqlen_k, p.num_heads_kv, p.head_dim_v);
    a.o = rows(p.total_q, p.seqlen_q, p.num_heads_q, p.head_dim_v);
    a.lse = per_row();
    if (p.packed) {
      a.cu_seqlens_q = starts(p.seqlen_q, p.total_q);
      a.cu_seqlens_k = starts(p.seqlen_k, p.total_k);
    }
    if (p.seqused_k) a.seqused_k = integers(std::vector<int32_t>(static_cast<size_t>(p.batch), static_cast<int32_t>(p.seqlen_k)));
    if (p.alibi) a.alibi_slopes = tensor({p.num_heads_q});
    if (p.sink) a.sink = tensor({p.num_heads_q});
    if (p.pass == Pass::kBackward) {
      a.do_ = rows(p.total_q, p.seqlen_q, p.num_heads_q, p.head_dim_v);
      a.dlse = per_row();
      const auto gradient = [&](TensorView view) {
        if (p.accumulate) view.dtype = DataType::kFloat32;
        return view;
      };
      a.dq = gradient(rows(p.total_q, p.seqlen_q, p.num_heads_q, p.head_dim));
      a.dk = gradient(rows(p.total_k, p.seqlen_k, p.num_heads_kv, p.head_dim));
      a.dv = gradient(rows(p.total_k, p.seqlen_k, p.num_heads_kv, p.head_dim_v));
      if (p.sink) a.dsink = tensor({p.num_heads_q});
    }
    const Result<Plan> plan = Plan::make(problem);
    if (plan) workspace = *Buffer::make(plan->device(), plan->workspace_bytes());
    a.workspace = workspace.data();
  }

  TensorView integers(const std::vector<int32_t>& values) {
    const TensorView view = tensor({static_cast<int64_t>(values.size())}, DataType::kInt32);
    std::copy(values.begin(), values.end(), static_cast<int32_t*>(view.data));
    return view;
  }
  TensorView starts(int64_t longest, int64_t total) {
    std::vector<int32_t> values;
    for (int64_t b = 0; b <= problem.batch; ++b) values.push_back(static_cast<int32_t>(std::min(b * longest, total)));
    return integers(values);
  }
  Status run() { return Plan::make(problem)->run(arguments); }
};

// Runs with one thing changed and gives back the sentence.
std::string error_with(std::string_view problem, const std::function<void(Arguments&)>& change) {
  Call call(problem);
  EXPECT_TRUE(call.run().ok()) << call.run().message();
  change(call.arguments);
  const Status status = call.run();
  EXPECT_TRUE(status.ok() || status.code() == StatusCode::kInvalidArgument);
  return status.message();
}

constexpr const char* kForward = "b2 q5 k7 h4/2 d8/16";
constexpr const char* kBackward = "bwd b2 q5 k7 h4/2 d8/16 sink";
constexpr const char* kPacked = "b2 q5 k7 h4/2 d8 packed tq9 tk10 alibi sink seqused";

TEST(Arguments, AreAllNeeded) {
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.q = {}; }), "q is missing: the problem needs it");
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.k = {}; }), "k is missing: the problem needs it");
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.v = {}; }), "v is missing: the problem needs it");
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.o = {}; }), "o is missing: the problem needs it");
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.lse = {}; }), "");
  EXPECT_EQ(error_with(kPacked, [](auto& a) { a.cu_seqlens_q = {}; }), "cu_seqlens_q is missing: the problem needs it");
  EXPECT_EQ(error_with(kPacked, [](auto& a) { a.cu_seqlens_k = {}; }), "cu_seqlens_k is missing: the problem needs it");
  EXPECT_EQ(error_with(kPacked, [](auto& a) { a.seqused_k = {}; }), "seqused_k is missing: the problem needs it");
  EXPECT_EQ(error_with(kPacked, [](auto& a) { a.alibi_slopes = {}; }), "alibi_slopes is missing: the problem needs it");
  EXPECT_EQ(error_with(kPacked, [](auto& a) { a.sink = {}; }), "sink is missing: the problem needs it");
  EXPECT_EQ(error_with(kBackward, [](auto& a) { a.o = {}; }), "o is missing: the problem needs it");
  EXPECT_EQ(error_with(kBackward, [](auto& a) { a.lse = {}; }), "lse is missing: the problem needs it");
  EXPECT_EQ(error_with(kBackward, [](auto& a) { a.do_ = {}; }), "do is missing: the problem needs it");
  EXPECT_EQ(error_with(kBackward, [](auto& a) { a.dq = {}; }), "dq is missing: the problem needs it");
  EXPECT_EQ(error_with(kBackward, [](auto& a) { a.dk = {}; }), "dk is missing: the problem needs it");
  EXPECT_EQ(error_with(kBackward, [](auto& a) { a.dv = {}; }), "dv is missing: the problem needs it");
  EXPECT_EQ(error_with(kBackward, [](auto& a) { a.dlse = a.dsink = {}; }), "");
}

TEST(Arguments, ThatTheProblemDoesNotHaveAreRefused) {
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.sink = a.lse; }), "sink is given, but the problem is not made with sink");
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.alibi_slopes = a.lse; }), "alibi_slopes is given, but the problem is not made with alibi");
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.seqused_k = a.lse; }), "seqused_k is given, but the problem is not made with seqused_k");
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.cu_seqlens_q = a.lse; }),
            "cu_seqlens_q is given, but the problem is not made with packed");
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.cu_seqlens_k = a.lse; }),
            "cu_seqlens_k is given, but the problem is not made with packed");
  EXPECT_EQ(error_with("bwd q5 d8", [](auto& a) { a.dsink = a.dlse; }), "dsink is given, but the problem is not made with sink");
}

TEST(Arguments, HaveTheShapeOfTheProblem) {
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.k.shape[1] = 8; }),
            "k has shape [2, 8, 2, 8], but the problem needs [batch 2, seqlen_k 7, num_heads_kv 2, head_dim 8]");
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.o.shape[3] = 8; }),
            "o has shape [2, 5, 4, 8], but the problem needs [batch 2, seqlen_q 5, num_heads_q 4, head_dim_v 16]");
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.q.rank = 3; }),
            "q has shape [2, 5, 4], but the problem needs [batch 2, seqlen_q 5, num_heads_q 4, head_dim 8]");
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.q.rank = 5; }),
            "q has shape [2, 5, 4, 8] and more dimensions, but the problem needs [batch 2, seqlen_q 5, num_heads_q 4, head_dim 8]");
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.q.rank = -1; }),
            "q has shape [], but the problem needs [batch 2, seqlen_q 5, num_heads_q 4, head_dim 8]");
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.lse.shape[2] = 6; }),
            "lse has shape [2, 4, 6], but the problem needs [batch 2, num_heads_q 4, seqlen_q 5]");
  EXPECT_EQ(error_with(kPacked, [](auto& a) { a.v.shape[0] = 11; }),
            "v has shape [11, 2, 8], but the problem needs [total_k 10, num_heads_kv 2, head_dim_v 8]");
  EXPECT_EQ(error_with(kPacked, [](auto& a) { a.lse.shape[1] = 10; }),
            "lse has shape [4, 10], but the problem needs [num_heads_q 4, total_q 9]");
  EXPECT_EQ(error_with(kPacked, [](auto& a) { a.cu_seqlens_k.shape[0] = 2; }),
            "cu_seqlens_k has shape [2], but the problem needs [batch + 1 = 3]");
  EXPECT_EQ(error_with(kPacked, [](auto& a) { a.seqused_k.shape[0] = 3; }), "seqused_k has shape [3], but the problem needs [batch 2]");
  EXPECT_EQ(error_with(kPacked, [](auto& a) { a.alibi_slopes.rank = 2; }),
            "alibi_slopes has shape [4, 0], but the problem needs [batch 2, num_heads_q 4]");
  EXPECT_EQ(error_with(kPacked, [](auto& a) { a.sink.shape[0] = 2; }), "sink has shape [2], but the problem needs [num_heads_q 4]");
  EXPECT_EQ(error_with(kBackward, [](auto& a) { a.dq.shape[3] = 9; }),
            "dq has shape [2, 5, 4, 9], but the problem needs [batch 2, seqlen_q 5, num_heads_q 4, head_dim 8]");
  EXPECT_EQ(error_with(kBackward, [](auto& a) { a.dk.shape[2] = 4; }),
            "dk has shape [2, 7, 4, 8], but the problem needs [batch 2, seqlen_k 7, num_heads_kv 2, head_dim 8]");
  EXPECT_EQ(error_with(kBackward, [](auto& a) { a.dv.shape[0] = 1; }),
            "dv has shape [1, 7, 2, 16], but the problem needs [batch 2, seqlen_k 7, num_heads_kv 2, head_dim_v 16]");
  EXPECT_EQ(error_with(kBackward, [](auto& a) { a.do_.shape[1] = 4; }),
            "do has shape [2, 4, 4, 16], but the problem needs [batch 2, seqlen_q 5, num_heads_q 4, head_dim_v 16]");
  EXPECT_EQ(error_with(kBackward, [](auto& a) { a.dlse.shape[1] = 3; }),
            "dlse has shape [2, 3, 5], but the problem needs [batch 2, num_heads_q 4, seqlen_q 5]");
  EXPECT_EQ(error_with(kBackward, [](auto& a) { a.dsink.shape[0] = 5; }), "dsink has shape [5], but the problem needs [num_heads_q 4]");
}

TEST(Arguments, HaveTheTypeOfTheProblem) {
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.k.dtype = DataType::kFloat16; }), "k has dtype float16, but the problem needs float32");
  EXPECT_EQ(error_with("q5 d8 bf16", [](auto& a) { a.o.dtype = DataType::kFloat32; }),
            "o has dtype float32, but the problem needs bfloat16");
  EXPECT_EQ(error_with("q5 d8 bf16", [](auto& a) { a.lse.dtype = DataType::kBFloat16; }),
            "lse has dtype bfloat16, but the problem needs float32");
  EXPECT_EQ(error_with(kPacked, [](auto& a) { a.cu_seqlens_q.dtype = DataType::kFloat32; }),
            "cu_seqlens_q has dtype float32, but the problem needs int32");
  EXPECT_EQ(error_with(kPacked, [](auto& a) { a.sink.dtype = static_cast<DataType>(9); }),
            "sink has dtype unknown, but the problem needs float32");
}

TEST(Arguments, HaveUsableStridesAndAddresses) {
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.v.stride[3] = 2; }),
            "v has stride 2 in its dimension head_dim_v, but the last dimension must be contiguous (stride 1)");
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.lse.stride[2] = 0; }),
            "lse has stride 0 in its dimension seqlen_q, but the last dimension must be contiguous (stride 1)");
  EXPECT_EQ(error_with("q5 h4 d1", [](auto& a) { a.q.stride[3] = 77; }), "") << "an extent of 1 has any stride";
  EXPECT_EQ(error_with("q5 h4 d8", [](auto& a) { a.o.stride[0] = 0; }), "") << "an extent of 1 has any stride";
  EXPECT_EQ(error_with("q5 h4 d8", [](auto& a) { a.q.stride[0] = INT64_MIN; }), "") << "an extent of 1 has any stride";
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.k.stride[0] = 0; }), "") << "inputs may repeat";
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.o.stride[0] = 0; }),
            "o has stride 0 in its dimension batch, so that elements of this output overlap");
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.o.stride[2] = 15; }),
            "o has stride 15 in its dimension num_heads_q, so that elements of this output overlap");
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.lse.stride[1] = -4; }),
            "lse has stride -4 in its dimension num_heads_q, so that elements of this output overlap");
  EXPECT_EQ(error_with(kBackward, [](auto& a) { a.dk.stride[1] = 0; }),
            "dk has stride 0 in its dimension seqlen_k, so that elements of this output overlap");
  EXPECT_EQ(error_with(kBackward, [](auto& a) { a.o.stride[0] = 0; }), "") << "backward reads o";
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.q.stride[0] = INT64_MAX / 2; }),
            "q has stride 4611686018427387903 in its dimension batch, which times its extent 2 does not fit in 64 bits");
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.o.stride[0] = INT64_MIN; }),
            "o has stride -9223372036854775808 in its dimension batch, which times its extent 2 does not fit in 64 bits");
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.q.data = static_cast<char*>(a.q.data) + 2; }),
            "q lies at an address that is not a multiple of its element size 4");
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.o.data = a.q.data; }), "o shares memory with q");
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.lse.data = a.o.data; }), "lse shares memory with o");
  EXPECT_EQ(error_with(kBackward, [](auto& a) { a.dv.data = a.do_.data; }), "dv shares memory with do");
  EXPECT_EQ(error_with("bwd q5 d8", [](auto& a) { a.dv.data = a.dk.data; }), "dv shares memory with dk");
}

TEST(Arguments, OutputsShareMemoryWithNothing) {
  const auto moved = [](TensorView view, int64_t elements) {
    view.data = static_cast<float*>(view.data) + elements;
    return view;
  };
  EXPECT_EQ(error_with("q5 h4/2 d8", [&](auto& a) { a.o = moved(a.q, 7); }), "o shares memory with q");
  EXPECT_EQ(error_with("q5 h4/2 d8", [&](auto& a) { a.o = moved(a.q, -159); }), "o shares memory with q");
  std::vector<float> memory(80);  // of the test's own: what lies beside another tensor is not known
  EXPECT_EQ(error_with(kPacked,
                       [&](auto& a) {
                         std::memcpy(&memory[40], a.cu_seqlens_k.data, 3 * sizeof(int32_t));
                         a.cu_seqlens_k.data = &memory[40], a.lse.data = &memory[5];
                       }),
            "lse shares memory with cu_seqlens_k");
  EXPECT_EQ(error_with("bwd q5 d8", [&](auto& a) { a.dlse.data = &memory[60], a.dk.data = &memory[21]; }), "dk shares memory with dlse");
  EXPECT_EQ(error_with("bwd q5 d8", [&](auto& a) { a.dlse.data = &memory[60], a.dk.data = &memory[20]; }), "");
  EXPECT_EQ(error_with(kBackward, [](auto& a) { a.dsink.data = a.sink.data; }), "dsink shares memory with sink");

  // Two heads of 8 in one buffer of 5 rows: the first is q, the second o, and the other way round with rows from the end.
  std::vector<float> both(5 * 16);
  const auto half = [&](TensorView view, int64_t first, int64_t row_stride) {
    view.data = both.data() + first;
    view.stride[1] = row_stride;
    return view;
  };
  EXPECT_EQ(error_with("q5 d8", [&](auto& a) { a.q = half(a.q, 0, 16), a.o = half(a.o, 8, 16); }), "");
  EXPECT_EQ(error_with("q5 d8", [&](auto& a) { a.q = half(a.q, 0, 16), a.o = half(a.o, 7, 16); }), "o shares memory with q");
  EXPECT_EQ(error_with("q5 d8", [&](auto& a) { a.q = half(a.q, 0, 16), a.o = half(a.o, 4 * 16 + 8, -16); }), "");
  EXPECT_EQ(error_with("q5 d8", [&](auto& a) { a.q = half(a.q, 0, 16), a.o = half(a.o, 4 * 16 + 7, -16); }), "o shares memory with q");
  EXPECT_EQ(error_with("q5 d8", [&](auto& a) { a.q = half(a.q, 0, 0), a.o = half(a.o, 8, 8); }), "") << "an input that repeats one row";
}

// Against a look at every element: small tensors with strides of any kind, on one buffer.
TEST(Arguments, OutputsShareMemoryWithNothingWhateverTheStrides) {
  std::vector<float> memory(4000), kv(4000);
  uint32_t state = 1;
  const auto below = [&](uint32_t n) { return static_cast<int64_t>((state = state * 1664525 + 1013904223) >> 8) % n; };
  int shared = 0, apart = 0;
  for (int round = 0; round < 20000; ++round) {
    Problem p;
    p.batch = 1 + below(3), p.seqlen_q = p.seqlen_k = 1 + below(4), p.num_heads_q = p.num_heads_kv = 1 + below(3);
    p.head_dim = 1 + below(5), p.head_dim_v = 1 + below(5);
    const auto draw = [&](int64_t dim) {
      TensorView view = TensorView::contiguous(memory.data() + 2000, DataType::kFloat32, {p.batch, p.seqlen_q, p.num_heads_q, dim});
      if (below(2)) std::swap(view.stride[0], view.stride[2]);
      const int64_t wider = 1 + below(3);
      for (size_t d = 0; d < 3; ++d) view.stride[d] = (view.stride[d] * wider + dim * below(2)) * (below(4) ? 1 : -1);
      view.data = static_cast<float*>(view.data) + below(2) * below(60) - below(2) * below(60);
      return view;
    };
    Arguments a;
    a.q = draw(p.head_dim), a.o = draw(p.head_dim_v);
    bool itself = false;  // whether rows of o meet: another rule refuses that
    std::vector<char> of_o(4000);
    bool meets = false;
    const auto each = [&](const TensorView& view, auto use) {
      for (int64_t b = 0; b < view.shape[0]; ++b)
        for (int64_t i = 0; i < view.shape[1]; ++i)
          for (int64_t h = 0; h < view.shape[2]; ++h)
            for (int64_t x = 0; x < view.shape[3]; ++x)
              use(static_cast<float*>(view.data) - memory.data() + b * view.stride[0] + i * view.stride[1] + h * view.stride[2] + x);
    };
    each(a.o, [&](int64_t at) { itself |= of_o[static_cast<size_t>(at)], of_o[static_cast<size_t>(at)] = 1; });
    each(a.q, [&](int64_t at) { meets |= of_o[static_cast<size_t>(at)] != 0; });
    if (itself) continue;
    a.k = TensorView::contiguous(kv.data(), DataType::kFloat32, {p.batch, p.seqlen_q, p.num_heads_q, p.head_dim});
    a.v = TensorView::contiguous(kv.data(), DataType::kFloat32, {p.batch, p.seqlen_q, p.num_heads_q, p.head_dim_v});
    const Plan plan = *Plan::make(p, Device::cpu(1));
    std::vector<float> workspace(plan.workspace_bytes() / 4 + 64);
    a.workspace = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 255) / 256 * 256);
    const std::string message = plan.run(a).message();
    EXPECT_EQ(message, meets ? "o shares memory with q" : "") << p.to_string() << " round " << round;
    (meets ? shared : apart) += 1;
  }
  EXPECT_GT(shared, 1000);
  EXPECT_GT(apart, 1000);
}

TEST(Arguments, WorkspaceIsThereAndAligned) {
  const size_t bytes = Plan::make(*Problem::parse(kForward))->workspace_bytes();
  ASSERT_GT(bytes, 0u);
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.workspace = nullptr; }),
            "workspace is missing: the plan needs " + std::to_string(bytes) + " bytes");
  EXPECT_EQ(error_with(kForward, [](auto& a) { a.workspace = static_cast<char*>(a.workspace) + 64; }),
            "workspace lies at an address that is not a multiple of 256");
}

TEST(Arguments, EmptyTensorsNeedNoMemoryAndTheRestIsWritten) {
  Call no_keys("q3 k0 h2 d4");
  no_keys.arguments.k.data = no_keys.arguments.v.data = nullptr;
  ASSERT_TRUE(no_keys.run().ok()) << no_keys.run().message();
  for (int i = 0; i < 24; ++i) EXPECT_EQ(static_cast<float*>(no_keys.arguments.o.data)[i], 0);
  for (int i = 0; i < 6; ++i) EXPECT_EQ(static_cast<float*>(no_keys.arguments.lse.data)[i], -INFINITY);

  Call no_queries("bwd q0 k3 h2 d4 sink");
  ASSERT_TRUE(no_queries.run().ok()) << no_queries.run().message();
  for (int i = 0; i < 24; ++i) EXPECT_EQ(static_cast<float*>(no_queries.arguments.dk.data)[i], 0);
  for (int i = 0; i < 24; ++i) EXPECT_EQ(static_cast<float*>(no_queries.arguments.dv.data)[i], 0);
  for (int i = 0; i < 2; ++i) EXPECT_EQ(static_cast<float*>(no_queries.arguments.dsink.data)[i], 0);

  Call nothing("bwd b0 q3 h2 d4 sink");
  ASSERT_TRUE(nothing.run().ok()) << nothing.run().message();
  for (int i = 0; i < 2; ++i) EXPECT_EQ(static_cast<float*>(nothing.arguments.dsink.data)[i], 0);
  EXPECT_TRUE(Call("b0 q3 d4").run().ok());
  EXPECT_TRUE(Call("b0 q3 d4 packed tq0 tk0").run().ok());
  EXPECT_TRUE(Call("b2 q3 d4 packed tq0 tk0").run().ok());
}

TEST(Plan, RunAllocatesNothing) {
  for (const char* text : {kForward, kBackward, kPacked}) {
    Call call(text);
    const Plan plan = *Plan::make(call.problem);
    ASSERT_TRUE(plan.run(call.arguments).ok());
    const int before = allocations;
    const Status status = plan.run(call.arguments);
    EXPECT_EQ(allocations, before) << text;
    EXPECT_TRUE(status.ok());
  }
}

TEST(Plan, TellsWhatItIs) {
  const Problem problem = *Problem::parse("b2 q64 h4/2 d32 causal");
  const Plan plan = *Plan::make(problem, Device::cpu(2));
  EXPECT_EQ(plan.problem(), problem);
  EXPECT_EQ(plan.device().units, 2);
  const std::vector<Candidate> candidates = Plan::candidates(problem);
  const auto first = std::find_if(candidates.begin(), candidates.end(), [](const Candidate& c) { return c.refusal.empty(); });
  ASSERT_NE(first, candidates.end());
  EXPECT_EQ(plan.kernel(), first->name);
}

TEST(Plan, RefusesWithSentences) {
  Problem problem = *Problem::parse("q64 h4 d32");
  problem.num_heads_kv = 3;
  EXPECT_EQ(Plan::make(problem).status().message(), "num_heads_q 4 is not a multiple of num_heads_kv 3");
  EXPECT_EQ(Plan::make(problem).status().code(), StatusCode::kInvalidArgument);
  for (const Candidate& candidate : Plan::candidates(problem)) {
    EXPECT_EQ(candidate.refusal, "num_heads_q 4 is not a multiple of num_heads_kv 3");
  }
  problem = *Problem::parse("q64 d513");
  const Status status = Plan::make(problem).status();
  EXPECT_EQ(status.code(), StatusCode::kUnsupported);
  EXPECT_EQ(status.message().find("no kernel takes 'fwd b1 q64 k64 h1 d513 fp32' on "), 0u) << status.message();
  for (const Candidate& candidate : Plan::candidates(problem)) {
    EXPECT_NE(candidate.refusal, "");
    EXPECT_NE(status.message().find(": " + candidate.refusal), std::string::npos) << status.message();
  }
  Device device = Device::cpu();
  device.units = 0;
  EXPECT_EQ(Plan::make(*Problem::parse("q64 d32"), device).status().message(), "device.units 0 is not positive");

  device = {};
  EXPECT_EQ(Plan::make(*Problem::parse("q64 d32"), device).status().message(),
            "device was not filled in: Device::cpu() or tw_device_cpu() does");
  device.type = DeviceType::kCuda;
  const bool has_cuda = !Plan::candidates(problem, device).empty();
  EXPECT_EQ(Plan::make(*Problem::parse("q64 d32 bf16"), device).status().message(),
            has_cuda ? "device was not filled in: Device::cuda() or tw_device_cuda() does"
                     : "this build has no CUDA: configure with -DTILEWISE_CUDA=ON");

  const auto error_on = [](int threads) {
    const Device on = Device::cpu(threads);
    const Status sentence = Plan::make(*Problem::parse("q64 d32"), on).status();
    EXPECT_EQ(sentence.code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(Plan::candidates(*Problem::parse("q64 d32"), on)[0].refusal, sentence.message());
    return sentence.message();
  };
  EXPECT_EQ(error_on(-1), "Device::cpu(-1): threads -1 is negative");
  EXPECT_TRUE(error_on(1 << 20).starts_with("Device::cpu(1048576): threads 1048576 is above ")) << error_on(1 << 20);

  Call call("q4 d8");
  EXPECT_EQ(Plan().run(call.arguments).message(), "this plan is empty: Plan::make() makes one");
  EXPECT_EQ(Plan().workspace_bytes(), 0u);
  EXPECT_EQ(Plan().kernel(), "");
  EXPECT_EQ(Plan().problem(), Problem());
  EXPECT_EQ(Plan::make(call.problem)->run(call.arguments, reinterpret_cast<Stream>(&call)).message(),
            "stream is given, but the plan's device is a CPU");
}

TEST(Plan, EnvironmentForcesKernels) {
  const Problem forward_problem = *Problem::parse("q64 d32"), backward_problem = *Problem::parse("bwd q64 d32");
  const std::vector<Candidate> all = Plan::candidates(forward_problem);
  for (const Candidate& candidate : all) {
    if (!candidate.refusal.empty()) continue;
    setenv("TILEWISE_KERNEL", candidate.name.c_str(), 1);
    EXPECT_EQ(Plan::make(forward_problem)->kernel(), candidate.name);
    for (const Candidate& other : Plan::candidates(forward_problem)) {
      EXPECT_EQ(other.refusal, other.name == candidate.name ? "" : "TILEWISE_KERNEL allows " + candidate.name + " only");
    }
    EXPECT_EQ(Plan::make(backward_problem).status().code(), StatusCode::kUnsupported);
  }
  const std::string both = std::string(all.back().name) + "," + Plan::candidates(backward_problem).front().name;
  unsetenv("TILEWISE_KERNEL");
  const std::string backward_kernel(Plan::make(backward_problem)->kernel());
  setenv("TILEWISE_KERNEL", (all.back().name + "," + backward_kernel).c_str(), 1);
  EXPECT_EQ(Plan::make(forward_problem)->kernel(), all.back().name);
  EXPECT_EQ(Plan::make(backward_problem)->kernel(), backward_kernel);
  unsetenv("TILEWISE_KERNEL");
}

// The sentence ends with what the environment forbids and why the kernels that it allows refuse; what others refuse is of no use.
TEST(Plan, ForcedKernelsThatRefuseSayWhy) {
  const auto error_with_kernel = [](const char* kernels, const char* problem) {
    setenv("TILEWISE_KERNEL", kernels, 1);
    const Status status = Plan::make(*Problem::parse(problem)).status();
    unsetenv("TILEWISE_KERNEL");
    EXPECT_EQ(status.code(), StatusCode::kUnsupported);
    return status.message().substr(status.message().find("): ") + 3);
  };
  const std::string forward_name = Plan::candidates(*Problem::parse("q64 d32")).back().name;
  const std::string backward_name = Plan::candidates(*Problem::parse("bwd q64 d32")).back().name, both = forward_name + "," + backward_name;
  EXPECT_EQ(error_with_kernel("foo", "q64 d32"), "TILEWISE_KERNEL foo is no kernel of this build");
  EXPECT_EQ(error_with_kernel("foo,forward_", "bwd q64 d513"), "TILEWISE_KERNEL foo,forward_ is no kernel of this build");
  EXPECT_EQ(error_with_kernel(backward_name.c_str(), "q64 d32"), "TILEWISE_KERNEL allows " + backward_name + " only");
  EXPECT_EQ(error_with_kernel(forward_name.c_str(), "q64 d513"),
            "TILEWISE_KERNEL allows " + forward_name + " only; " + forward_name + ": head_dim 513 is above 512");
  EXPECT_EQ(error_with_kernel(both.c_str(), "bwd q64 d513"),
            "TILEWISE_KERNEL allows " + both + " only; " + backward_name + ": head_dim 513 is above 512");
  setenv("TILEWISE_KERNEL", "foo", 1);
  for (const Candidate& candidate : Plan::candidates(*Problem::parse("q64 d32")))
    EXPECT_EQ(candidate.refusal, "TILEWISE_KERNEL foo is no kernel of this build");
  unsetenv("TILEWISE_KERNEL");
}

TEST(Device, AreListed) {
  const std::vector<Device> devices = Device::all();
  ASSERT_FALSE(devices.empty());
  EXPECT_EQ(devices[0].type, DeviceType::kCpu);
  EXPECT_GE(devices[0].units, 1);
  for (const Device& device : devices) EXPECT_GT(device.memory_bytes, 0) << device.name;
  const Result<Device> cuda = Device::cuda(1 << 20);
  EXPECT_EQ(cuda.status().code(), StatusCode::kUnavailable);
  EXPECT_EQ(cuda.status().message().find("CUDA device 1048576 is not there: "), 0u) << cuda.status().message();
  EXPECT_EQ(Device::cuda(-1).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(Device::cuda(-1).status().message(), "Device::cuda(-1): index -1 is negative");
}

TEST(Buffer, CopiesInsideItsBounds) {
  Buffer buffer = *Buffer::make(Device::cpu(), 10);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % 256, 0u);
  EXPECT_EQ(buffer.size(), 10u);
  const char text[] = "0123456789";
  char copy[11] = {};
  EXPECT_TRUE(buffer.copy_from_host(text, 10).ok());
  EXPECT_TRUE(buffer.copy_from_host("xy", 2, 3).ok());
  EXPECT_TRUE(buffer.copy_to_host(copy, 10).ok());
  EXPECT_STREQ(copy, "012xy56789");
  EXPECT_EQ(buffer.copy_from_host(text, 11).message(), "11 bytes at offset 0 do not lie in a buffer of 10 bytes");
  EXPECT_EQ(buffer.copy_to_host(copy, 2, 9).message(), "2 bytes at offset 9 do not lie in a buffer of 10 bytes");
  EXPECT_EQ(buffer.copy_to_host(copy, SIZE_MAX, 9).code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(Buffer::make(Device::cpu(), 0).ok());
  EXPECT_EQ(Buffer::make(Device::cpu(), SIZE_MAX / 4).status().code(), StatusCode::kUnavailable);
}

TEST(FreeBytes, LieWithinTheMemory) {
  for (const Device& device : Device::all()) {
    const int64_t free = free_bytes(device).value();
    EXPECT_GT(free, 0) << device.name;
    EXPECT_LT(free, device.memory_bytes) << device.name;
  }
}

// The one-call functions make the same problem that a plan would be made for.
TEST(OneCall, EqualsPlanAndRun) {
  Call forward_call("b2 q5 k7 h4/2 d8/16 causal softcap=3 scale=0.4 sink");
  const Arguments& a = forward_call.arguments;
  ASSERT_TRUE(forward_call.run().ok());
  const std::vector<float> o = forward_call.buffers[3], lse = forward_call.buffers[4];
  std::fill(forward_call.buffers[3].begin(), forward_call.buffers[3].end(), NAN);
  std::fill(forward_call.buffers[4].begin(), forward_call.buffers[4].end(), NAN);
  Options options;
  options.causal = true;
  options.softcap = 3;
  options.softmax_scale = 0.4f;
  options.sink = a.sink;
  const Status status = forward(a.q, a.k, a.v, a.o, a.lse, options);
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(forward_call.buffers[3], o);
  EXPECT_EQ(forward_call.buffers[4], lse);

  Call backward_call("bwd b2 q5 k7 h4/2 d8 window=2,1 topleft packed tq9 tk10 seqused alibi");
  const Arguments& b = backward_call.arguments;
  ASSERT_TRUE(backward_call.run().ok());
  const std::vector<std::vector<float>> expected = backward_call.buffers;
  for (const TensorView* output : {&b.dq, &b.dk, &b.dv}) static_cast<float*>(output->data)[3] = NAN;
  options = {};
  options.window_left = 2;
  options.window_right = 1;
  options.alignment = Alignment::kTopLeft;
  options.cu_seqlens_q = b.cu_seqlens_q;
  options.cu_seqlens_k = b.cu_seqlens_k;
  options.seqused_k = b.seqused_k;
  options.alibi_slopes = b.alibi_slopes;
  options.max_seqlen_q = 5;
  options.max_seqlen_k = 7;
  options.dlse = b.dlse;
  const Status backward_status = backward(b.do_, b.q, b.k, b.v, b.o, b.lse, b.dq, b.dk, b.dv, options);
  ASSERT_TRUE(backward_status.ok()) << backward_status.message();
  EXPECT_EQ(backward_call.buffers, expected);
  options.max_seqlen_q = options.max_seqlen_k = 0;  // then the packed rows bound every sequence
  EXPECT_TRUE(backward(b.do_, b.q, b.k, b.v, b.o, b.lse, b.dq, b.dk, b.dv, options).ok());
}

// What ring attention does: every part of the keys adds its share to dq, with the lse of all keys.
TEST(OneCall, PartsOfTheKeysAccumulateToTheWhole) {
  Call forward_call("b2 q6 k10 h4/2 d8");
  ASSERT_TRUE(forward_call.run().ok());
  Call call("bwd b2 q6 k10 h4/2 d8 accumulate");
  Arguments& a = call.arguments;
  a.o = forward_call.arguments.o, a.lse = forward_call.arguments.lse, a.dlse = {};
  for (size_t i : {size_t{7}, size_t{8}, size_t{9}}) std::fill(call.buffers[i].begin(), call.buffers[i].end(), 0.0f);
  ASSERT_EQ(a.dq.data, call.buffers[7].data());
  ASSERT_TRUE(call.run().ok());
  const std::vector<float> dq = call.buffers[7], dk = call.buffers[8], dv = call.buffers[9];
  for (size_t i : {size_t{7}, size_t{8}, size_t{9}}) std::fill(call.buffers[i].begin(), call.buffers[i].end(), 1.0f);
  const auto keys = [](TensorView view, int64_t begin, int64_t end) {
    view.data = static_cast<float*>(view.data) + begin * view.stride[1];
    view.shape[1] = end - begin;
    return view;
  };
  Options options;
  options.accumulate = true;
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 3}, {3, 10}}) {
    const Status status = backward(a.do_, a.q, keys(a.k, begin, end), keys(a.v, begin, end), a.o, a.lse, a.dq, keys(a.dk, begin, end),
                                   keys(a.dv, begin, end), options);
    ASSERT_TRUE(status.ok()) << status.message();
  }
  const auto expect_more = [](const std::vector<float>& got, const std::vector<float>& added) {
    for (size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i], 1 + added[i], 1e-6f);
  };
  expect_more(call.buffers[7], dq);
  expect_more(call.buffers[8], dk);
  expect_more(call.buffers[9], dv);
  EXPECT_EQ(error_with("bwd q3 k4 d8 bf16 accumulate", [](Arguments& x) { x.dq.dtype = DataType::kBFloat16; }),
            "dq has dtype bfloat16, but the problem needs float32");
  EXPECT_EQ(error_with("bwd q3 k4 d8 bf16", [](Arguments& x) { x.dv.dtype = DataType::kFloat32; }),
            "dv has dtype float32, but the problem needs bfloat16; float32 is for accumulate, which adds to what it holds");
}

TEST(Describe, IsTheProblemOfTheTensors) {
  const auto view = [](std::initializer_list<int64_t> shape, DataType dtype) { return TensorView::contiguous(nullptr, dtype, shape); };
  constexpr DataType bf16 = DataType::kBFloat16;
  Options options;
  options.causal = true;
  options.window_left = 7;
  options.softcap = 30;
  const TensorView q = view({2, 5, 8, 64}, bf16), k = view({2, 9, 2, 64}, bf16), v = view({2, 9, 2, 32}, bf16);
  EXPECT_EQ(describe(Pass::kBackward, q, k, v, options).value().to_string(), "bwd b2 q5 k9 h8/2 d64/32 bf16 window=7,0 softcap=30");

  const std::vector<int32_t> starts_q = {0, 3, 3, 10}, starts_k = {0, 4, 6, 11};  // a CPU may read the longest
  Options packed;
  packed.cu_seqlens_q = TensorView::contiguous(starts_q.data(), DataType::kInt32, {4});
  packed.cu_seqlens_k = TensorView::contiguous(starts_k.data(), DataType::kInt32, {4});
  const TensorView rows_q = view({10, 4, 16}, DataType::kFloat32), rows_k = view({11, 4, 16}, DataType::kFloat32);
  EXPECT_EQ(describe(Pass::kForward, rows_q, rows_k, rows_k, packed).value().to_string(), "fwd b3 q7 k5 h4 d16 fp32 packed tq10 tk11");
  const TensorView more_rows = view({40, 4, 16}, DataType::kFloat32);  // some in no sequence: the bound leaves room for all
  EXPECT_EQ(describe(Pass::kForward, rows_q, more_rows, more_rows, packed).value().seqlen_k, 14);
  const auto refusal = [&](auto change) {
    Options changed = packed;
    change(changed);
    return describe(Pass::kForward, rows_q, rows_k, rows_k, changed).status().message();
  };
  EXPECT_EQ(refusal([](Options& o) { o.max_seqlen_q = -3; }), "max_seqlen_q -3 is negative");
  EXPECT_EQ(refusal([](Options& o) { o.max_seqlen_k = int64_t{1} << 40; }), "max_seqlen_k 1099511627776 is more than 2^30 - 2");
  EXPECT_EQ(refusal([](Options& o) { o.cu_seqlens_q = {}; }), "cu_seqlens_q is missing: packed tensors (cu_seqlens_k is given) need it");
  EXPECT_EQ(refusal([](Options& o) { o.cu_seqlens_q.shape[0] = 0; }), "cu_seqlens_q has shape [0], but it has shape [batch + 1]");
  EXPECT_EQ(refusal([](Options& o) { o.max_seqlen_q = 6; }),  // 10 rows of 3 sequences: 4 would be room for them
            "cu_seqlens_q[3] is 10, the end of a sequence of 7 rows, which is longer than max_seqlen_q 6");
  EXPECT_EQ(refusal([](Options& o) { o.max_seqlen_k = 2; }),
            "cu_seqlens_k[1] is 4, the end of a sequence of 4 rows, which is longer than max_seqlen_k 2");
  EXPECT_EQ(refusal([](Options& o) { o.max_seqlen_q = 7, o.max_seqlen_k = 5; }), "");
  EXPECT_EQ(describe(Pass::kForward, view({2, 5, 8, 64}, DataType::kInt32), k, v).status().message(),
            "q has dtype int32, which is none of float32, bfloat16, float16");
  options.max_seqlen_k = 9;
  EXPECT_EQ(describe(Pass::kForward, q, k, v, options).status().message(),
            "max_seqlen_k 9 is given, but it is a bound of packed sequences, and no cu_seqlens is given");
  EXPECT_EQ(describe(Pass::kForward, q, rows_k, v).status().message(),
            "k has 3 dimensions, but tensors have 4 where no cu_seqlens is given");
}

TEST(OneCall, RefusesWhatIsNoProblem) {
  Call call("q5 d8");
  const Arguments& a = call.arguments;
  EXPECT_EQ(forward({}, a.k, a.v, a.o).message(), "q is missing");
  TensorView k = a.k;
  k.rank = 3;
  EXPECT_EQ(forward(a.q, k, a.v, a.o).message(), "k has 3 dimensions, but tensors have 4 where no cu_seqlens is given");
  Options options;
  options.cu_seqlens_k = a.lse;
  EXPECT_EQ(forward(a.q, a.k, a.v, a.o, {}, options).message(), "q has 4 dimensions, but packed tensors (cu_seqlens is given) have 3");
  TensorView q = a.q, v = a.v;
  q.rank = k.rank = v.rank = 3;
  EXPECT_EQ(forward(q, k, v, a.o, {}, options).message(), "cu_seqlens_q is missing: packed tensors (cu_seqlens_k is given) need it");
  options = {};
  options.causal = true;
  options.window_right = 3;
  EXPECT_EQ(forward(a.q, a.k, a.v, a.o, {}, options).message(), "window_right 3 contradicts causal, which is window_right 0");
  EXPECT_EQ(forward(a.q, a.k, a.v, {}).message(), "o is missing: the problem needs it");
}

}  // namespace
}  // namespace tilewise
