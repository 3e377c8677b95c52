// The C99 ABI: every function copies its structures to their C++ nouns, calls the library and keeps the message of an error
// for its thread. No exception leaves this file.
#include <algorithm>
#include <cstring>
#include <new>

#include "tilewise/tilewise.h"
#include "tilewise/tilewise.hpp"

struct tw_plan {
  tilewise::Plan plan;
  std::string kernel;
};

namespace {

using namespace tilewise;

thread_local std::string last_error;

// Calls work() and turns its Status into a tw_status. An exception can only mean that memory ran out.
template <class Work>
tw_status guarded(Work work) {
  try {
    const Status status = work();
    if (!status.ok()) last_error = status.message();
    return static_cast<tw_status>(status.code());
  } catch (...) {
    last_error = "out of memory";  // short enough to need none
    return TW_UNAVAILABLE;
  }
}

// Writes no more than struct_size bytes, whatever version of the structure the caller was built with.
template <class T>
void init(T* target, size_t struct_size, T defaults) {
  if (!target || struct_size < sizeof(size_t)) return;
  defaults.struct_size = struct_size;
  std::memset(static_cast<void*>(target), 0, struct_size);
  std::memcpy(static_cast<void*>(target), &defaults, std::min(struct_size, sizeof(T)));
}

template <class T>
Status check_struct(const char* name, const T* given) {
  if (!given) return invalid_argument(std::string(name) + " is NULL");
  if (given->struct_size == sizeof(T)) return {};
  return invalid_argument(std::string(name) + ".struct_size is " + std::to_string(given->struct_size) + ", but this library needs " +
                          std::to_string(sizeof(T)) + ", which " + name + "_init() sets");
}

Status missing(const char* name) { return invalid_argument(std::string(name) + " is NULL"); }

Problem to_cpp(const tw_problem& c) {
  Problem p;
  p.pass = static_cast<Pass>(c.pass);
  p.dtype = static_cast<DataType>(c.dtype);
  p.batch = c.batch;
  p.seqlen_q = c.seqlen_q;
  p.seqlen_k = c.seqlen_k;
  p.num_heads_q = c.num_heads_q;
  p.num_heads_kv = c.num_heads_kv;
  p.head_dim = c.head_dim;
  p.head_dim_v = c.head_dim_v;
  if (c.has_softmax_scale) p.softmax_scale = c.softmax_scale;
  p.softcap = c.softcap;
  p.window_left = c.window_left;
  p.window_right = c.window_right;
  p.alignment = static_cast<Alignment>(c.alignment);
  p.packed = c.packed != 0;
  p.total_q = c.total_q;
  p.total_k = c.total_k;
  p.seqused_k = c.seqused_k != 0;
  p.alibi = c.alibi != 0;
  p.sink = c.sink != 0;
  p.deterministic = c.deterministic != 0;
  p.accumulate = c.accumulate != 0;
  return p;
}

tw_problem to_c(const Problem& p) {
  tw_problem c{};
  c.struct_size = sizeof(tw_problem);
  c.pass = static_cast<int32_t>(p.pass);
  c.dtype = static_cast<int32_t>(p.dtype);
  c.batch = p.batch;
  c.seqlen_q = p.seqlen_q;
  c.seqlen_k = p.seqlen_k;
  c.num_heads_q = p.num_heads_q;
  c.num_heads_kv = p.num_heads_kv;
  c.head_dim = p.head_dim;
  c.head_dim_v = p.head_dim_v;
  c.has_softmax_scale = p.softmax_scale.has_value();
  c.softmax_scale = p.softmax_scale.value_or(0.0f);
  c.softcap = p.softcap;
  c.window_left = p.window_left;
  c.window_right = p.window_right;
  c.alignment = static_cast<int32_t>(p.alignment);
  c.packed = p.packed;
  c.total_q = p.total_q;
  c.total_k = p.total_k;
  c.seqused_k = p.seqused_k;
  c.alibi = p.alibi;
  c.sink = p.sink;
  c.deterministic = p.deterministic;
  c.accumulate = p.accumulate;
  return c;
}

Result<Device> to_cpp(const tw_device* c) {
  if (!c) return Device::cpu();
  if (Status status = check_struct("tw_device", c); !status.ok()) return status;
  if (c->reserved != 0) return invalid_argument("tw_device.reserved is " + std::to_string(c->reserved) + ", but it must be 0");
  if (c->type != TW_CPU && c->type != TW_CUDA) {
    return invalid_argument("tw_device.type " + std::to_string(c->type) + " is neither TW_CPU nor TW_CUDA");
  }
  Device device;
  device.type = static_cast<DeviceType>(c->type);
  device.index = c->index;
  device.name.assign(c->name, strnlen(c->name, sizeof c->name));
  device.arch.assign(c->arch, strnlen(c->arch, sizeof c->arch));
  device.units = c->units;
  device.near_bytes = c->near_bytes;
  device.desk_bytes = c->desk_bytes;
  device.memory_bytes = c->memory_bytes;
  return device;
}

tw_device to_c(const Device& device) {
  tw_device c{};
  c.struct_size = sizeof(tw_device);
  c.type = static_cast<int32_t>(device.type);
  c.index = device.index;
  device.name.copy(c.name, sizeof c.name - 1);
  device.arch.copy(c.arch, sizeof c.arch - 1);
  c.units = device.units;
  c.near_bytes = device.near_bytes;
  c.desk_bytes = device.desk_bytes;
  c.memory_bytes = device.memory_bytes;
  return c;
}

TensorView to_cpp(const tw_tensor& c) {
  TensorView view;
  view.data = c.data;
  view.dtype = static_cast<DataType>(c.dtype);
  view.rank = c.rank;
  std::copy(c.shape, c.shape + 4, view.shape.begin());
  std::copy(c.stride, c.stride + 4, view.stride.begin());
  return view;
}
TensorView to_cpp(const tw_tensor* c) { return c ? to_cpp(*c) : TensorView(); }

Arguments to_cpp(const tw_arguments& c) {
  Arguments a;
  a.q = to_cpp(c.q);
  a.k = to_cpp(c.k);
  a.v = to_cpp(c.v);
  a.o = to_cpp(c.o);
  a.lse = to_cpp(c.lse);
  a.cu_seqlens_q = to_cpp(c.cu_seqlens_q);
  a.cu_seqlens_k = to_cpp(c.cu_seqlens_k);
  a.seqused_k = to_cpp(c.seqused_k);
  a.alibi_slopes = to_cpp(c.alibi_slopes);
  a.sink = to_cpp(c.sink);
  a.do_ = to_cpp(c.dout);
  a.dlse = to_cpp(c.dlse);
  a.dq = to_cpp(c.dq);
  a.dk = to_cpp(c.dk);
  a.dv = to_cpp(c.dv);
  a.dsink = to_cpp(c.dsink);
  a.workspace = c.workspace;
  return a;
}

Result<Options> to_cpp(const tw_options* c) {
  Options options;
  if (!c) return options;
  if (Status status = check_struct("tw_options", c); !status.ok()) return status;
  if (c->reserved != 0) return invalid_argument("tw_options.reserved is " + std::to_string(c->reserved) + ", but it must be 0");
  Result<Device> device = to_cpp(c->device);
  if (!device) return device.status();
  options.device = *device;
  if (c->has_softmax_scale) options.softmax_scale = c->softmax_scale;
  options.softcap = c->softcap;
  options.window_left = c->window_left;
  options.window_right = c->window_right;
  options.causal = c->causal != 0;
  options.alignment = static_cast<Alignment>(c->alignment);
  options.cu_seqlens_q = to_cpp(c->cu_seqlens_q);
  options.cu_seqlens_k = to_cpp(c->cu_seqlens_k);
  options.seqused_k = to_cpp(c->seqused_k);
  options.alibi_slopes = to_cpp(c->alibi_slopes);
  options.sink = to_cpp(c->sink);
  options.max_seqlen_q = c->max_seqlen_q;
  options.max_seqlen_k = c->max_seqlen_k;
  options.dlse = to_cpp(c->dlse);
  options.dsink = to_cpp(c->dsink);
  options.deterministic = c->deterministic != 0;
  options.accumulate = c->accumulate != 0;
  return options;
}

}  // namespace

const char* tw_version(void) { return TILEWISE_VERSION; }
const char* tw_last_error(void) { return last_error.c_str(); }

void tw_problem_init(tw_problem* problem, size_t struct_size) { init(problem, struct_size, to_c(Problem())); }
void tw_device_init(tw_device* device, size_t struct_size) { init(device, struct_size, tw_device{}); }
void tw_arguments_init(tw_arguments* arguments, size_t struct_size) { init(arguments, struct_size, tw_arguments{}); }
void tw_options_init(tw_options* options, size_t struct_size) {
  tw_options defaults{};
  defaults.window_left = defaults.window_right = -1;
  init(options, struct_size, defaults);
}

tw_tensor tw_tensor_contiguous(void* data, int32_t dtype, int32_t rank, const int64_t* shape) {
  tw_tensor tensor{};
  tensor.data = data;
  tensor.dtype = dtype;
  if (rank < 1 || rank > 4 || !shape) return tensor;
  tensor.rank = rank;
  int64_t stride = 1;
  for (int32_t i = rank - 1; i >= 0; --i) {
    tensor.shape[i] = shape[i];
    tensor.stride[i] = stride;
    stride *= std::max<int64_t>(shape[i], 1);
  }
  return tensor;
}

tw_status tw_problem_parse(const char* text, tw_problem* problem) {
  return guarded([&]() -> Status {
    if (!text) return missing("text");
    if (Status status = check_struct("tw_problem", problem); !status.ok()) return status;
    const Result<Problem> parsed = Problem::parse(text);
    if (parsed) *problem = to_c(*parsed);
    return parsed.status();
  });
}

tw_status tw_problem_format(const tw_problem* problem, char* buffer, size_t capacity, size_t* length) {
  return guarded([&]() -> Status {
    if (Status status = check_struct("tw_problem", problem); !status.ok()) return status;
    if (!buffer && capacity > 0) return missing("buffer");
    const std::string text = to_cpp(*problem).to_string();
    if (capacity > 0) buffer[text.copy(buffer, capacity - 1)] = '\0';
    if (length) *length = text.size();
    return {};
  });
}

tw_status tw_problem_validate(const tw_problem* problem) {
  return guarded([&]() -> Status {
    if (Status status = check_struct("tw_problem", problem); !status.ok()) return status;
    return to_cpp(*problem).validate();
  });
}

tw_status tw_device_cpu(int32_t threads, tw_device* device) {
  return guarded([&]() -> Status {
    if (Status status = check_struct("tw_device", device); !status.ok()) return status;
    if (threads < 0) return invalid_argument("threads " + std::to_string(threads) + " is negative");
    *device = to_c(Device::cpu(threads));
    return {};
  });
}

tw_status tw_device_cuda(int32_t index, tw_device* device) {
  return guarded([&]() -> Status {
    if (Status status = check_struct("tw_device", device); !status.ok()) return status;
    const Result<Device> found = Device::cuda(index);
    if (found) *device = to_c(*found);
    return found.status();
  });
}

tw_status tw_plan_create(const tw_problem* problem, const tw_device* device, tw_plan** plan) {
  return guarded([&]() -> Status {
    if (!plan) return missing("plan");
    *plan = nullptr;
    if (Status status = check_struct("tw_problem", problem); !status.ok()) return status;
    const Result<Device> on = to_cpp(device);
    if (!on) return on.status();
    const Result<Plan> made = Plan::make(to_cpp(*problem), *on);
    if (made) *plan = new tw_plan{*made, std::string(made->kernel())};
    return made.status();
  });
}

void tw_plan_destroy(tw_plan* plan) { delete plan; }

tw_status tw_plan_run(const tw_plan* plan, const tw_arguments* arguments, struct CUstream_st* stream) {
  return guarded([&]() -> Status {
    if (!plan) return missing("plan");
    if (Status status = check_struct("tw_arguments", arguments); !status.ok()) return status;
    return plan->plan.run(to_cpp(*arguments), stream);
  });
}

size_t tw_plan_workspace_bytes(const tw_plan* plan) { return plan ? plan->plan.workspace_bytes() : 0; }
const char* tw_plan_kernel(const tw_plan* plan) { return plan ? plan->kernel.c_str() : ""; }

tw_status tw_forward(const tw_tensor* q, const tw_tensor* k, const tw_tensor* v, const tw_tensor* o, const tw_tensor* lse,
                     const tw_options* options) {
  return guarded([&]() -> Status {
    const Result<Options> given = to_cpp(options);
    if (!given) return given.status();
    return forward(to_cpp(q), to_cpp(k), to_cpp(v), to_cpp(o), to_cpp(lse), *given);
  });
}

tw_status tw_backward(const tw_tensor* dout, const tw_tensor* q, const tw_tensor* k, const tw_tensor* v, const tw_tensor* o,
                      const tw_tensor* lse, const tw_tensor* dq, const tw_tensor* dk, const tw_tensor* dv, const tw_options* options) {
  return guarded([&]() -> Status {
    const Result<Options> given = to_cpp(options);
    if (!given) return given.status();
    return backward(to_cpp(dout), to_cpp(q), to_cpp(k), to_cpp(v), to_cpp(o), to_cpp(lse), to_cpp(dq), to_cpp(dk), to_cpp(dv), *given);
  });
}
