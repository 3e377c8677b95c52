// describe -> plan -> run. A plan is a problem, a device and the row of the kernel table that was chosen for them; running it
// is one check of the arguments and one launch.
#include <algorithm>

#include "api/arguments.h"
#include "core/config.h"
#include "registry/kernel.h"
#include "tilewise/memory.hpp"

namespace tilewise {

struct Plan::State {
  Problem problem;
  Device device;
  const Kernel* kernel = nullptr;
  size_t workspace_bytes = 0;
};

Result<Plan> Plan::make(const Problem& problem, const Device& device) {
  if (Status status = problem.validate(); !status.ok()) return status;
  Result<const Kernel*> kernel = select_kernel(problem, device);
  if (!kernel) return kernel.status();
  if ((*kernel)->prepare)
    if (Status status = (*kernel)->prepare(device); !status.ok()) return status;
  Plan plan;
  plan.state_ = std::make_shared<const State>(State{problem, device, *kernel, (*kernel)->workspace_bytes(problem, device)});
  return plan;
}

Status Plan::run(const Arguments& arguments, Stream stream) const {
  if (!state_) return invalid_argument("this plan is empty: Plan::make() makes one");
  if (stream && state_->device.type == DeviceType::kCpu) return invalid_argument("stream is given, but the plan's device is a CPU");
  if (Status status = check_arguments(state_->problem, state_->workspace_bytes, arguments); !status.ok()) return status;
  return state_->kernel->launch(state_->problem, state_->device, arguments, stream);
}

size_t Plan::workspace_bytes() const { return state_ ? state_->workspace_bytes : 0; }
std::string_view Plan::kernel() const { return state_ ? state_->kernel->name : std::string_view(); }

const Problem& Plan::problem() const {
  static const Problem kNone;
  return state_ ? state_->problem : kNone;
}

const Device& Plan::device() const {
  static const Device kNone;
  return state_ ? state_->device : kNone;
}

std::vector<Candidate> Plan::candidates(const Problem& problem, const Device& device) {
  const Status status = problem.validate();
  if (status.ok()) return list_candidates(problem, device);
  std::vector<Candidate> candidates;
  for (const Kernel& kernel : backend_of(device.type).kernels()) {
    if (kernel.pass == problem.pass) candidates.push_back({std::string(kernel.name), status.message()});
  }
  return candidates;
}

namespace {

// The starts of packed sequences where the host may read them, else null.
const int32_t* readable(const Options& options, const TensorView& cu_seqlens) {
  const bool can = options.device.type == DeviceType::kCpu && cu_seqlens.rank == 1 && cu_seqlens.dtype == DataType::kInt32;
  return can ? static_cast<const int32_t*>(cu_seqlens.data) : nullptr;
}

// The caller's bound is made larger below where rows need it, so that run() does not know it: what breaks it is said here.
Status check_bound(const Options& options, const char* name, const TensorView& cu_seqlens, const char* bound_name, int64_t bound) {
  const int32_t* starts = bound ? readable(options, cu_seqlens) : nullptr;
  for (int64_t b = 0; starts && b + 1 < cu_seqlens.shape[0]; ++b) {
    if (const int64_t rows = int64_t{starts[b + 1]} - starts[b]; rows > bound) {
      return invalid_argument(std::string(name) + "[" + std::to_string(b + 1) + "] is " + std::to_string(starts[b + 1]) +
                              ", the end of a sequence of " + std::to_string(rows) + " rows, which is longer than " + bound_name + ' ' +
                              std::to_string(bound));
    }
  }
  return {};
}

// The longest sequence where the host may read the lengths, else all rows. Lengths that make no sense are left to run().
int64_t longest(const Options& options, const TensorView& cu_seqlens, int64_t total) {
  const int32_t* starts = readable(options, cu_seqlens);
  if (!starts) return total;
  int64_t most = 0;
  for (int64_t b = 0; b + 1 < cu_seqlens.shape[0]; ++b) most = std::max<int64_t>(most, int64_t{starts[b + 1]} - starts[b]);
  return std::min(most, total);
}

// An upper bound of the lengths: the caller's or the longest, and as much as the problem's rows need, since some may be in no sequence.
int64_t bound(const Options& options, const TensorView& cu_seqlens, int64_t given, int64_t total, int64_t batch) {
  const int64_t most = given ? given : longest(options, cu_seqlens, total);
  return batch > 0 ? std::max(most, ceil_div(total, batch)) : most;
}

}  // namespace

// Only what is read here is checked here: plan.run() checks the rest.
Result<Problem> describe(Pass pass, const TensorView& q, const TensorView& k, const TensorView& v, const Options& options) {
  Problem p;
  p.packed = static_cast<bool>(options.cu_seqlens_q) || static_cast<bool>(options.cu_seqlens_k);
  const int rank = p.packed ? 3 : 4;
  struct Named {
    const char* name;
    const TensorView& view;
  };
  for (const Named& tensor : {Named{"q", q}, Named{"k", k}, Named{"v", v}}) {
    if (tensor.view.rank == 0 && !tensor.view.data) return invalid_argument(std::string(tensor.name) + " is missing");
    if (tensor.view.rank != rank) {
      return invalid_argument(std::string(tensor.name) + " has " + std::to_string(tensor.view.rank) + " dimensions, but " +
                              (p.packed ? "packed tensors (cu_seqlens is given) have 3" : "tensors have 4 where no cu_seqlens is given"));
    }
  }
  if (options.causal && options.window_right > 0) {
    return invalid_argument("window_right " + std::to_string(options.window_right) + " contradicts causal, which is window_right 0");
  }
  struct Length {
    const char* name;
    int64_t value;
  };
  for (const Length& length : {Length{"max_seqlen_q", options.max_seqlen_q}, Length{"max_seqlen_k", options.max_seqlen_k}}) {
    const char* rule = length.value < 0            ? " is negative"
                       : length.value > kMaxSeqlen ? " is more than 2^30 - 2"
                       : length.value && !p.packed ? " is given, but it is a bound of packed sequences, and no cu_seqlens is given"
                                                   : nullptr;
    if (rule) return invalid_argument(length.name + (' ' + std::to_string(length.value)) + rule);
  }
  if (q.dtype == DataType::kInt32) return invalid_argument("q has dtype int32, which is none of float32, bfloat16, float16");
  p.pass = pass;
  p.dtype = q.dtype;
  if (p.packed) {
    const TensorView& starts = options.cu_seqlens_q;
    if (!starts) return invalid_argument("cu_seqlens_q is missing: packed tensors (cu_seqlens_k is given) need it");
    if (starts.rank != 1) {
      return invalid_argument("cu_seqlens_q has " + std::to_string(starts.rank) + " dimensions, but it has shape [batch + 1]");
    }
    if (starts.shape[0] < 1) return invalid_argument("cu_seqlens_q has shape [0], but it has shape [batch + 1]");
    for (const Status& status : {check_bound(options, "cu_seqlens_q", starts, "max_seqlen_q", options.max_seqlen_q),
                                 check_bound(options, "cu_seqlens_k", options.cu_seqlens_k, "max_seqlen_k", options.max_seqlen_k)}) {
      if (!status.ok()) return status;
    }
    p.batch = options.cu_seqlens_q.shape[0] - 1;
    p.total_q = q.shape[0];
    p.total_k = k.shape[0];
    p.seqlen_q = bound(options, options.cu_seqlens_q, options.max_seqlen_q, p.total_q, p.batch);
    p.seqlen_k = bound(options, options.cu_seqlens_k, options.max_seqlen_k, p.total_k, p.batch);
  } else {
    p.batch = q.shape[0];
    p.seqlen_q = q.shape[1];
    p.seqlen_k = k.shape[1];
  }
  const auto last = static_cast<size_t>(rank) - 1;
  p.num_heads_q = q.shape[last - 1];
  p.num_heads_kv = k.shape[last - 1];
  p.head_dim = q.shape[last];
  p.head_dim_v = v.shape[last];
  p.softmax_scale = options.softmax_scale;
  p.softcap = options.softcap;
  p.window_left = options.window_left;
  p.window_right = options.causal ? 0 : options.window_right;
  p.alignment = options.alignment;
  p.seqused_k = static_cast<bool>(options.seqused_k);
  p.alibi = static_cast<bool>(options.alibi_slopes);
  p.sink = static_cast<bool>(options.sink);
  p.deterministic = options.deterministic;
  p.accumulate = options.accumulate;
  return p;
}

namespace {

Status plan_and_run(Pass pass, Arguments arguments, const Options& options) {
  const Result<Problem> problem = describe(pass, arguments.q, arguments.k, arguments.v, options);
  if (!problem) return problem.status();
  const Result<Plan> plan = Plan::make(*problem, options.device);
  if (!plan) return plan.status();
  const Result<Buffer> workspace = Buffer::make(options.device, plan->workspace_bytes());
  if (!workspace) return workspace.status();
  arguments.cu_seqlens_q = options.cu_seqlens_q;
  arguments.cu_seqlens_k = options.cu_seqlens_k;
  arguments.seqused_k = options.seqused_k;
  arguments.alibi_slopes = options.alibi_slopes;
  arguments.sink = options.sink;
  arguments.dlse = options.dlse;
  arguments.dsink = options.dsink;
  arguments.workspace = workspace->data();
  if (Status status = plan->run(arguments); !status.ok()) return status;
  return synchronize(options.device);
}

}  // namespace

Status forward(TensorView q, TensorView k, TensorView v, TensorView o, TensorView lse, const Options& options) {
  Arguments arguments;
  arguments.q = q, arguments.k = k, arguments.v = v, arguments.o = o, arguments.lse = lse;
  return plan_and_run(Pass::kForward, arguments, options);
}

Status backward(TensorView do_, TensorView q, TensorView k, TensorView v, TensorView o, TensorView lse, TensorView dq, TensorView dk,
                TensorView dv, const Options& options) {
  Arguments arguments;
  arguments.q = q, arguments.k = k, arguments.v = v, arguments.o = o, arguments.lse = lse;
  arguments.do_ = do_, arguments.dq = dq, arguments.dk = dk, arguments.dv = dv;
  return plan_and_run(Pass::kBackward, arguments, options);
}

}  // namespace tilewise
