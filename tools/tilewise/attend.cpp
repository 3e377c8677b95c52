// tilewise attend: q, k, v (and do, for gradients) from a safetensors file, attention into another one.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>
#include <optional>

#include "files.h"
#include "parts.h"
#include "safetensors.h"
#include "tilewise/memory.hpp"
#include "tool.h"

namespace tilewise::tool {
namespace {

using Shape = std::vector<int64_t>;

struct AttendOptions {
  std::string input, output;
  bool causal = false, top_left = false, deterministic = false;
  std::string window;
  std::optional<float> scale;
  float softcap = 0;
  DeviceOptions device;
};

std::string_view file_dtype(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat32:
      return "F32";
    case DataType::kBFloat16:
      return "BF16";
    case DataType::kFloat16:
      return "F16";
    case DataType::kInt32:
      return "I32";
  }
  return "";
}
size_t element_bytes(DataType dtype) { return dtype == DataType::kFloat32 || dtype == DataType::kInt32 ? 4 : 2; }

TensorView contiguous(void* data, DataType dtype, const Shape& shape) {
  TensorView view{.data = data, .dtype = dtype, .rank = static_cast<int>(shape.size())};
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0;) view.shape[d] = shape[d], view.stride[d] = stride, stride *= shape[d];
  return view;
}

// A tensor of the input or output and the device memory that holds it.
struct Tensor {
  std::string name;
  Shape shape;
  Buffer buffer;
  TensorView view;
};

class Input {
 public:
  Input(safetensors::File file, Device device) : file_(std::move(file)), device_(std::move(device)) {}

  const safetensors::Entry* find(const std::string& name) const {
    const auto found = file_.header().tensors.find(name);
    return found == file_.header().tensors.end() ? nullptr : &found->second;
  }
  const safetensors::Entry& need(const std::string& name) const {
    if (const auto* entry = find(name)) return *entry;
    throw Failure(kBadRequest, fmt::format("the input has no tensor \"{}\"", name));
  }
  // A tensor of this type and shape, on the device; an empty view where the file has none.
  TensorView load(const std::string& name, DataType dtype, const Shape& shape) {
    const auto* entry = find(name);
    if (!entry) return {};
    check(name, *entry, dtype, shape);
    return keep(name, dtype, shape);
  }
  // int32 values on the host.
  std::vector<int32_t> integers(const std::string& name, const Shape& shape) const {
    const auto& entry = need(name);
    check(name, entry, DataType::kInt32, shape);
    std::vector<int32_t> values(static_cast<size_t>(shape[0]));
    require(file_.read(entry, values.data()));
    return values;
  }
  void note_unused() const {
    std::vector<std::string> unused;
    for (const auto& [name, entry] : file_.header().tensors)
      if (std::find(names_.begin(), names_.end(), name) == names_.end()) unused.push_back(safetensors::printable(name));
    if (!unused.empty()) fmt::print(stderr, "tilewise: not used: {}\n", fmt::join(unused, ", "));
  }

 private:
  static void check(const std::string& name, const safetensors::Entry& entry, DataType dtype, const Shape& shape) {
    if (entry.dtype != file_dtype(dtype))
      throw Failure(kBadRequest, fmt::format("tensor \"{}\" is {}, it must be {}", name, entry.dtype, file_dtype(dtype)));
    if (entry.shape != shape)
      throw Failure(kBadRequest, fmt::format("tensor \"{}\" has shape {}, it must be {}", name, entry.shape, shape));
  }
  TensorView keep(const std::string& name, DataType dtype, const Shape& shape) {
    const auto& entry = *find(name);
    const size_t bytes = entry.end - entry.begin;
    Buffer& buffer = buffers_.emplace_back(require(Buffer::make(device_, bytes)));
    if (device_.type == DeviceType::kCpu) {
      require(file_.read(entry, buffer.data()));
    } else {
      std::vector<char> host(bytes);
      require(file_.read(entry, host.data()));
      require(buffer.copy_from_host(host.data(), bytes));
    }
    names_.push_back(name);
    return contiguous(buffer.data(), dtype, shape);
  }

  safetensors::File file_;
  Device device_;
  std::vector<Buffer> buffers_;
  std::vector<std::string> names_;
};

DataType float_type(const std::string& name, const std::string& dtype) {
  for (const DataType type : {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16})
    if (dtype == file_dtype(type)) return type;
  throw Failure(kBadRequest, fmt::format("tensor \"{}\" is {}, it must be F32, BF16 or F16", name, dtype));
}

// Kernels trust cu_seqlens, a file is not to be trusted. Returns the longest sequence.
int64_t check_cu_seqlens(const std::string& name, const std::vector<int32_t>& values, int64_t rows) {
  if (values.front() != 0) throw Failure(kBadRequest, fmt::format("{}[0] is {}, it must be 0", name, values.front()));
  int64_t longest = 0;
  for (size_t b = 1; b < values.size(); ++b) {
    if (values[b] < values[b - 1])
      throw Failure(kBadRequest, fmt::format("{}[{}] is {}, less than the {} before it", name, b, values[b], values[b - 1]));
    longest = std::max<int64_t>(longest, values[b] - values[b - 1]);
  }
  if (values.back() != rows) throw Failure(kBadRequest, fmt::format("{} ends with {}, but there are {} rows", name, values.back(), rows));
  return longest;
}

Problem describe(const Input& input, const AttendOptions& options) {
  const auto &q = input.need("q"), &k = input.need("k"), &v = input.need("v");
  Problem problem;
  problem.dtype = float_type("q", q.dtype);
  problem.packed = input.find("cu_seqlens_q") || input.find("cu_seqlens_k");
  const size_t rank = problem.packed ? 3 : 4;
  for (const auto& [name, entry] : {std::pair("q", &q), {"k", &k}, {"v", &v}})
    if (entry->shape.size() != rank)
      throw Failure(kBadRequest, fmt::format("tensor \"{}\" has {} dimensions, it must have {}", name, entry->shape.size(),
                                             problem.packed ? "3 with cu_seqlens: [total, heads, dim]"
                                                            : "4: [batch, seqlen, heads, dim], or 3 with cu_seqlens_q and cu_seqlens_k"));
  if (problem.packed) {
    const auto& cu_seqlens = input.need("cu_seqlens_q");
    if (cu_seqlens.shape.size() != 1 || cu_seqlens.shape[0] < 2)
      throw Failure(kBadRequest, fmt::format("tensor \"cu_seqlens_q\" has shape {}, it must be [batch + 1]", cu_seqlens.shape));
    problem.batch = cu_seqlens.shape[0] - 1;
    problem.total_q = q.shape[0], problem.total_k = k.shape[0];
    const Shape shape{problem.batch + 1};
    problem.seqlen_q = check_cu_seqlens("cu_seqlens_q", input.integers("cu_seqlens_q", shape), problem.total_q);
    problem.seqlen_k = check_cu_seqlens("cu_seqlens_k", input.integers("cu_seqlens_k", shape), problem.total_k);
  } else {
    problem.batch = q.shape[0];
    problem.seqlen_q = q.shape[1], problem.seqlen_k = k.shape[1];
  }
  problem.num_heads_q = q.shape[rank - 2], problem.num_heads_kv = k.shape[rank - 2];
  problem.head_dim = q.shape[rank - 1], problem.head_dim_v = v.shape[rank - 1];
  problem.softmax_scale = options.scale;
  problem.softcap = options.softcap;
  if (!options.window.empty()) {  // as the problem grammar has it
    const Problem window = require(Problem::parse("q1 d1 window=" + options.window));
    problem.window_left = window.window_left, problem.window_right = window.window_right;
  }
  if (options.causal && problem.window_right > 0)
    throw Failure(kBadRequest, fmt::format("--window {} contradicts --causal", options.window));
  if (options.causal) problem.window_right = 0;
  problem.alignment = options.top_left ? Alignment::kTopLeft : Alignment::kBottomRight;
  problem.deterministic = options.deterministic;
  problem.seqused_k = input.find("seqused_k");
  problem.alibi = input.find("alibi_slopes");
  problem.sink = input.find("sink");
  require(problem.validate());
  return problem;
}

// Runs the problem. Long work on a CPU that somebody watches is cut into parts. Returns the kernel's name.
std::string run(const Problem& problem, const Device& device, const Arguments& arguments, const char* what) {
  constexpr double kPartFlops = 1e9;  // of a thread: less is not worth a start and an end
  Progress progress;
  int64_t count = 1;
  if (progress.visible() && device.type == DeviceType::kCpu)
    count = static_cast<int64_t>(std::clamp(require(explain(problem, device)).flops / (kPartFlops * device.units), 1.0, 100.0));
  const std::vector<Part> parts = cut(problem, arguments, count);
  std::vector<double> flops;
  double all = 0, done = 0;
  for (const Part& part : parts) all += flops.emplace_back(parts.size() == 1 ? 1 : require(explain(part.problem, device)).flops);
  Buffer workspace;
  std::string kernel;
  for (size_t n = 0; n < parts.size(); ++n) {
    const Plan plan = require(Plan::make(parts[n].problem, device));
    if (workspace.size() < plan.workspace_bytes()) workspace = require(Buffer::make(device, plan.workspace_bytes()));
    Arguments part_arguments = parts[n].arguments;
    part_arguments.workspace = workspace.data();
    progress.show(what, done / std::max(all, 1.0));
    require(plan.run(part_arguments));
    done += flops[n];
    kernel = plan.kernel();
  }
  require(synchronize(device));
  return kernel;
}

// Of a GPU's tensors no more than the inputs or the outputs, about half of all, are on the host at a time; its own memory
// refuses by itself.
void check_memory(const std::string& name, Problem problem, const Device& device, bool gradients) {
  auto workspace = static_cast<double>(require(Plan::make(problem, device)).workspace_bytes());
  if (gradients) {
    problem.pass = Pass::kBackward;
    workspace = std::max(workspace, static_cast<double>(require(Plan::make(problem, device)).workspace_bytes()));
  }
  require_memory(name, device.type == DeviceType::kCpu ? tensor_bytes(problem) + workspace : tensor_bytes(problem) / 2);
}

void attend(const AttendOptions& options) {
  std::error_code unknown;
  if (std::filesystem::equivalent(options.input, options.output, unknown))
    throw Failure(kBadRequest, fmt::format("output '{}' is the input file, which would be lost", options.output));
  require(files::check_writable(options.output));
  const Device device = options.device.open();
  Input input(require(safetensors::File::open(options.input)), device);
  Problem problem = describe(input, options);
  check_memory(options.input, problem, device, input.find("do"));

  const Shape rows_q = problem.packed ? Shape{problem.total_q} : Shape{problem.batch, problem.seqlen_q};
  const Shape rows_k = problem.packed ? Shape{problem.total_k} : Shape{problem.batch, problem.seqlen_k};
  const auto with = [](Shape shape, int64_t heads, int64_t dim) { return shape.push_back(heads), shape.push_back(dim), shape; };
  const Shape q_shape = with(rows_q, problem.num_heads_q, problem.head_dim),
              o_shape = with(rows_q, problem.num_heads_q, problem.head_dim_v);
  const Shape k_shape = with(rows_k, problem.num_heads_kv, problem.head_dim),
              v_shape = with(rows_k, problem.num_heads_kv, problem.head_dim_v);
  const Shape lse_shape =
      problem.packed ? Shape{problem.num_heads_q, problem.total_q} : Shape{problem.batch, problem.num_heads_q, problem.seqlen_q};
  const bool slopes_per_sequence = problem.alibi && input.need("alibi_slopes").shape.size() == 2;

  Arguments arguments;
  arguments.q = input.load("q", problem.dtype, q_shape);
  arguments.k = input.load("k", problem.dtype, k_shape);
  arguments.v = input.load("v", problem.dtype, v_shape);
  arguments.cu_seqlens_q = input.load("cu_seqlens_q", DataType::kInt32, {problem.batch + 1});
  arguments.cu_seqlens_k = input.load("cu_seqlens_k", DataType::kInt32, {problem.batch + 1});
  arguments.seqused_k = input.load("seqused_k", DataType::kInt32, {problem.batch});
  arguments.alibi_slopes = input.load("alibi_slopes", DataType::kFloat32,
                                      slopes_per_sequence ? Shape{problem.batch, problem.num_heads_q} : Shape{problem.num_heads_q});
  arguments.sink = input.load("sink", DataType::kFloat32, {problem.num_heads_q});
  arguments.do_ = input.load("do", problem.dtype, o_shape);
  if (arguments.do_) arguments.dlse = input.load("dlse", DataType::kFloat32, lse_shape);
  input.note_unused();

  std::vector<Tensor> outputs;
  const auto output = [&](const char* name, DataType dtype, const Shape& shape) {
    size_t bytes = element_bytes(dtype);
    for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
    Tensor& tensor = outputs.emplace_back(Tensor{name, shape, require(Buffer::make(device, bytes)), {}});
    return tensor.view = contiguous(tensor.buffer.data(), dtype, shape);
  };
  arguments.o = output("o", problem.dtype, o_shape);
  arguments.lse = output("lse", DataType::kFloat32, lse_shape);

  const double start = now();
  safetensors::Metadata metadata{{"tilewise", TILEWISE_VERSION}, {"device", device_text(device)}, {"problem", problem.to_string()}};
  metadata["kernel"] = run(problem, device, arguments, "forward");
  if (arguments.do_) {
    problem.pass = Pass::kBackward;
    arguments.dq = output("dq", problem.dtype, q_shape);
    arguments.dk = output("dk", problem.dtype, k_shape);
    arguments.dv = output("dv", problem.dtype, v_shape);
    if (problem.sink) arguments.dsink = output("dsink", DataType::kFloat32, {problem.num_heads_q});
    metadata["problem"] = problem.to_string();
    metadata["kernel_backward"] = run(problem, device, arguments, "backward");
  }
  const double seconds = now() - start;

  std::vector<std::vector<char>> copies;
  std::vector<safetensors::Output> written;
  std::vector<std::string> names;
  for (const Tensor& tensor : outputs) {
    const void* data = tensor.buffer.data();
    if (device.type != DeviceType::kCpu) {
      auto& copy = copies.emplace_back(tensor.buffer.size());
      require(tensor.buffer.copy_to_host(copy.data(), copy.size()));
      data = copy.data();
    }
    written.push_back({tensor.name, std::string(file_dtype(tensor.view.dtype)), tensor.shape, data, tensor.buffer.size()});
    names.push_back(tensor.name);
  }
  require(safetensors::write(options.output, written, metadata));
  fmt::print("{}\n{} on {}: {}\nwrote {}: {}\n", problem.to_string(),
             arguments.do_ ? metadata["kernel"] + " and " + metadata["kernel_backward"] : metadata["kernel"], device_text(device),
             seconds_text(seconds), options.output, fmt::join(names, " "));
}

}  // namespace

void add_attend(CLI::App* app) {
  auto* command = app->add_subcommand("attend", "Attention over q, k, v of a safetensors file; gradients where it holds do");
  auto options = std::make_shared<AttendOptions>();
  command->add_option("input", options->input, "q, k, v: [batch, seqlen, heads, head_dim], F32, BF16 or F16")
      ->type_name("FILE")
      ->required();
  command->add_option("-o,--output", options->output, "o, lse, and with do: dq, dk, dv, dsink; written whole or not at all")
      ->type_name("FILE")
      ->required();
  command->add_flag("--causal", options->causal, "query i sees no key after its own position");
  command->add_option("--window", options->window, "keys visible left and right of the diagonal; -1: all")->type_name("L,R");
  command->add_flag("--top-left", options->top_left, "the diagonal starts at the first key; otherwise it ends at the last");
  command->add_option("--scale", options->scale, "softmax scale instead of 1/sqrt(head_dim)")->type_name("X");
  command->add_option("--softcap", options->softcap, "scores become softcap * tanh(score / softcap)")->type_name("X");
  command->add_flag("--deterministic", options->deterministic, "bitwise repeatable gradients on a GPU; a CPU's always are");
  options->device.add_to(command);
  command->footer(
      "Packed sequences: q, k, v are [total, heads, head_dim], with int32 cu_seqlens_q and cu_seqlens_k [batch + 1].\n"
      "Optional inputs: seqused_k, alibi_slopes, sink; do and dlse for gradients. Other tensors are not used.\n"
      "\nExample: tilewise attend in.safetensors -o out.safetensors --causal");
  command->callback([options] { attend(*options); });
}

}  // namespace tilewise::tool
