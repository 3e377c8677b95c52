// tilewise._core: the public C++ API for Python. Python allocates outputs with the caller's own framework; here a tensor is an address
// with a shape, read from any DLPack exporter or from a plain tuple, and nothing is copied.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <iterator>
#include <memory>
#include <optional>
#include <string_view>

#include "tilewise/explain.hpp"
#include "tilewise/memory.hpp"
#include "tilewise/tilewise.h"
#include "tilewise/tilewise.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace tilewise {
namespace {

// The library's sentence as the exception that Python programmers expect.
void check(const Status& status) {
  switch (status.code()) {
    case StatusCode::kOk:
      return;
    case StatusCode::kInvalidArgument:
      throw nb::value_error(status.message().c_str());
    case StatusCode::kUnsupported:
      PyErr_SetString(PyExc_NotImplementedError, status.message().c_str());
      break;
    case StatusCode::kUnavailable:
      PyErr_SetString(PyExc_RuntimeError, status.message().c_str());
      break;
  }
  throw nb::python_error();
}

template <class T>
T value(Result<T> result) {
  check(result.status());
  return *std::move(result);
}

// DLPack's device types, and what they are to us: pinned memory is the host's, managed memory the GPU's.
constexpr int kDLCPU = 1, kDLCUDA = 2, kDLCUDAHost = 3, kDLCUDAManaged = 13;

struct Place {
  DeviceType type = DeviceType::kCpu;
  int index = 0;
  bool operator==(const Place&) const = default;
  std::string name() const { return type == DeviceType::kCpu ? "cpu" : "cuda:" + std::to_string(index); }
};

Place place_of(const char* name, int device_type, int index) {
  if (device_type == kDLCPU || device_type == kDLCUDAHost) return {};
  if (device_type == kDLCUDA || device_type == kDLCUDAManaged) return {DeviceType::kCuda, index};
  throw nb::value_error(
      (std::string(name) + " is on a device of DLPack type " + std::to_string(device_type) + ", which is neither a CPU nor CUDA").c_str());
}

[[noreturn]] void wrong_dtype(const char* name, const std::string& dtype) {
  const auto is_one_of = [&](std::initializer_list<std::string_view> names) { return std::ranges::find(names, name) != names.end(); };
  const char* rule = is_one_of({"cu_seqlens_q", "cu_seqlens_k", "seqused_k"}) ? ", but it must be int32"
                     : is_one_of({"sink", "alibi_slopes", "lse", "dlse"})     ? ", but it must be float32"
                                                                              : ", which is none of float32, bfloat16, float16";
  PyErr_SetString(PyExc_TypeError, (std::string(name) + " has dtype " + dtype + rule).c_str());
  throw nb::python_error();
}

std::optional<DataType> known_dtype(nb::dlpack::dtype dtype) {
  using Code = nb::dlpack::dtype_code;
  const auto is = [&](Code code, int bits) { return dtype.code == static_cast<uint8_t>(code) && dtype.bits == bits && dtype.lanes == 1; };
  if (is(Code::Float, 32)) return DataType::kFloat32;
  if (is(Code::Bfloat, 16)) return DataType::kBFloat16;
  if (is(Code::Float, 16)) return DataType::kFloat16;
  if (is(Code::Int, 32)) return DataType::kInt32;
  return {};
}

DataType dtype_of(const char* name, nb::dlpack::dtype dtype) {
  if (const auto known = known_dtype(dtype)) return *known;
  const char* kinds[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
  wrong_dtype(name, (dtype.code < std::size(kinds) ? kinds[dtype.code] : "type " + std::to_string(dtype.code) + " of ") +
                        std::to_string(dtype.bits));
}

// Numbers and flags: what is none gets a sentence like those of the library, not the binding's.
[[noreturn]] void wrong_type(const char* name, nb::handle value, const char* rule) {
  PyErr_Clear();
  const std::string text = std::string(name) + " " + nb::cast<std::string>(nb::repr(value)) + " is " + rule;
  PyErr_SetString(PyExc_TypeError, text.c_str());
  throw nb::python_error();
}

float real(const char* name, nb::handle value) {
  // A tensor's gradient would be lost, and reading one may wait for a device.
  const bool array = !PyFloat_Check(value.ptr()) && PyObject_HasAttrString(value.ptr(), "__dlpack__");
  const double number = array ? 0 : PyFloat_AsDouble(value.ptr());
  if (array || PyErr_Occurred()) wrong_type(name, value, "not a number of Python");
  return static_cast<float>(number);
}

int64_t whole(const char* name, nb::handle value) {
  const nb::object index = nb::steal(PyNumber_Index(value.ptr()));
  const int64_t number = index.is_valid() ? PyLong_AsLongLong(index.ptr()) : -1;
  if (PyErr_Occurred()) wrong_type(name, value, "not a whole number of 64 bits");
  return number;
}

bool flag(const char* name, nb::handle value) {
  if (!PyBool_Check(value.ptr())) wrong_type(name, value, "neither True nor False");
  return value.is(Py_True);
}

struct Tensor {
  TensorView view;
  Place place;
  nb::ndarray<nb::ro> owner;  // keeps what a DLPack exporter lent
};

void set_shape(const char* name, TensorView& view, size_t rank, auto&& shape, auto&& stride) {
  if (rank > view.shape.size())
    throw nb::value_error((std::string(name) + " has " + std::to_string(rank) + " dimensions, more than 4").c_str());
  view.rank = static_cast<int>(rank);
  for (size_t i = 0; i < rank; ++i) view.shape[i] = shape(i), view.stride[i] = stride(i);
}

void set_shape(const char* name, TensorView& view, const nb::tuple& shape, const nb::tuple& stride) {
  const auto of = [](const nb::tuple& tuple) { return [&](size_t i) { return nb::cast<int64_t>(tuple[i]); }; };
  set_shape(name, view, shape.size(), of(shape), of(stride));
}

// PyTorch's classes, told by tilewise.torch when it is imported, and the names of what is read: this module knows no framework by itself.
struct Torch {
  nb::object tensor_type;
  int (*read)(void* tensor, nb::dlpack::dltensor* out) = nullptr;  // lends what it writes; null where PyTorch is older than 2.10
  std::vector<std::pair<nb::object, DataType>> dtypes;
  nb::str dtype{"dtype"}, shape{"shape"}, stride{"stride"}, data_ptr{"data_ptr"}, get_device{"get_device"}, is_cpu{"is_cpu"},
      is_cuda{"is_cuda"};
};
Torch& torch() {
  static Torch& instance = *new Torch;  // never destroyed: the interpreter may go before this library
  return instance;
}

// What DLPack 1.2 calls its exchange interface: a type's functions for its tensors, without a trip through Python.
struct ExchangeApi {
  uint32_t major, minor;
  void *previous, *allocate, *export_owned, *import_owned;
  int (*read)(void* tensor, nb::dlpack::dltensor* out);
  void* current_stream;
};

void set_shape_of(const char* name, TensorView& view, size_t rank, const int64_t* shape, const int64_t* stride) {
  set_shape(
      name, view, rank, [&](size_t i) { return shape[i]; }, [&](size_t i) { return stride[i]; });
}

// A PyTorch tensor that has no memory to read, or none yet: of an old vmap, nested, a zero tensor. PyTorch's dispatcher may know more.
struct Unreadable : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Older PyTorch is read by attributes: its DLPack export for Python refuses tensors that require gradients, waits for streams, and takes
// microseconds. What the exchange interface refuses comes here too, for the sentence.
Tensor tensor_by_attributes(const char* name, nb::handle source) {
  Tensor tensor;
  const Torch& names = torch();
  const auto call = [&](const nb::str& method) { return source.attr(method)(); };
  const nb::object dtype = source.attr(names.dtype);
  const auto known = std::find_if(names.dtypes.begin(), names.dtypes.end(), [&](const auto& entry) { return entry.first.is(dtype); });
  if (known == names.dtypes.end()) wrong_dtype(name, nb::cast<std::string>(nb::str(dtype)));
  const int index = nb::cast<int>(call(names.get_device));
  if (!nb::cast<bool>(source.attr(index < 0 ? names.is_cpu : names.is_cuda))) {
    throw nb::value_error((std::string(name) + " is on device " + nb::cast<std::string>(nb::str(nb::object(source.attr("device")))) +
                           ", which is neither a CPU nor CUDA")
                              .c_str());
  }
  try {
    tensor.view.data = reinterpret_cast<void*>(nb::cast<uintptr_t>(call(names.data_ptr)));
    tensor.view.dtype = known->second;
    if (index >= 0) tensor.place = {DeviceType::kCuda, index};
    set_shape(name, tensor.view, nb::cast<nb::tuple>(source.attr(names.shape)), nb::cast<nb::tuple>(call(names.stride)));
  } catch (const nb::python_error& error) {
    throw Unreadable(std::string(name) + " has no memory that can be read: " + nb::cast<std::string>(nb::str(error.value())));
  }
  return tensor;
}

Tensor tensor_of_torch(const char* name, nb::handle source) {
  Tensor tensor;
  nb::dlpack::dltensor lent;
  if (const auto dtype = torch().read && torch().read(source.ptr(), &lent) == 0 ? known_dtype(lent.dtype) : std::nullopt) {
    tensor.view.data = static_cast<char*>(lent.data) + lent.byte_offset;
    tensor.view.dtype = *dtype;
    tensor.place = place_of(name, lent.device.device_type, lent.device.device_id);
    set_shape_of(name, tensor.view, static_cast<size_t>(lent.ndim), lent.shape, lent.strides);
  } else {
    PyErr_Clear();
    tensor = tensor_by_attributes(name, source);
  }
  const auto& shape = tensor.view.shape;
  if (!tensor.view.data && std::find(shape.begin(), shape.begin() + tensor.view.rank, 0) == shape.begin() + tensor.view.rank)
    throw Unreadable(std::string(name) + " has no memory that can be read");
  return tensor;
}

// A PyTorch tensor; (address, DataType, DLPack device type, device index, shape, strides in elements); or an object that speaks
// DLPack. The tuple is for NumPy, whose DLPack export knows neither read-only memory nor bfloat16.
Tensor tensor_of(const char* name, nb::handle source) {
  Tensor tensor;
  if (torch().tensor_type.is_valid() && PyObject_IsInstance(source.ptr(), torch().tensor_type.ptr()) == 1)
    return tensor_of_torch(name, source);
  if (nb::isinstance<nb::tuple>(source)) {
    const auto fields = nb::borrow<nb::tuple>(source);
    if (fields.size() != 6)
      throw nb::value_error((std::string(name) + " is a tuple of " + std::to_string(fields.size()) + " fields, not 6").c_str());
    tensor.view.data = reinterpret_cast<void*>(nb::cast<uintptr_t>(fields[0]));
    tensor.view.dtype = static_cast<DataType>(nb::cast<int32_t>(fields[1]));
    tensor.place = place_of(name, nb::cast<int>(fields[2]), nb::cast<int>(fields[3]));
    set_shape(name, tensor.view, nb::cast<nb::tuple>(fields[4]), nb::cast<nb::tuple>(fields[5]));
    return tensor;
  }
  if (!nb::try_cast(source, tensor.owner)) {
    PyErr_SetString(PyExc_TypeError, (std::string(name) + " is of type " + nb::cast<std::string>(source.type().attr("__name__")) +
                                      ", which is not read: NumPy's arrays, PyTorch's tensors and everything with __dlpack__ will do")
                                         .c_str());
    throw nb::python_error();
  }
  const auto& array = tensor.owner;
  tensor.view.data = const_cast<void*>(static_cast<const void*>(array.data()));
  tensor.view.dtype = dtype_of(name, array.dtype());
  tensor.place = place_of(name, array.device_type(), array.device_id());
  set_shape_of(name, tensor.view, array.ndim(), array.shape_ptr(), array.stride_ptr());
  return tensor;
}

// A fork copies no threads, and GNU's OpenMP, which PyTorch may share, waits for ever for those that are missing: where the parent had any
// beside the one that forks, the child computes with one.
std::atomic<bool> had_threads{false}, has_lost_threads{false};

std::ptrdiff_t threads_now() {
  std::error_code error;  // no /proc: as if there were some
  const std::filesystem::directory_iterator tasks("/proc/self/task", error);
  return error ? 2 : std::distance(tasks, std::filesystem::directory_iterator());
}

Device device_of(const Place& place, int threads) {
  if (place.type == DeviceType::kCuda) return value(Device::cuda(place.index));
  return Device::cpu(has_lost_threads ? 1 : threads);
}

// The plan of a problem, kept for the next layer or step: making one takes microseconds. Guarded by Python's lock.
Plan plan_for(const Problem& problem, const Device& device) {
  static std::vector<Plan>& kept = *new std::vector<Plan>;
  static size_t next = 0;
  constexpr size_t kMost = 16;
  const auto make = [&] { return value(Plan::make(problem, device)); };
  if (std::getenv("TILEWISE_KERNEL")) return make();
  for (const Plan& plan : kept) {
    const Device& its = plan.device();
    if (its.type == device.type && its.index == device.index && its.units == device.units && plan.problem() == problem) return plan;
  }
  if (kept.size() < kMost) return kept.emplace_back(make());
  return kept[next++ % kMost] = make();
}

// One attention: the plan for its inputs, waiting for its outputs. Python makes it, allocates what it asks for, and runs it.
class Call {
 public:
  // options: cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sink, softmax_scale, softcap, window_left, window_right, top_left,
  // max_seqlen_q, max_seqlen_k, deterministic. One tuple: it costs a call less than 13 arguments.
  Call(Pass pass, nb::handle q, nb::handle k, nb::handle v, const nb::tuple& given, int threads) {
    if (given.size() != 13) throw nb::value_error("options is not a tuple of 13 fields");
    Options options;
    inputs_.reserve(16);  // all tensors that there are
    arguments_.q = take("q", q);
    if (inputs_.empty()) throw nb::type_error("q is None, not an array");
    place_ = inputs_.front().place;
    arguments_.k = take("k", k);
    arguments_.v = take("v", v);
    if (inputs_.size() < 3) throw nb::type_error(k.is_none() ? "k is None, not an array" : "v is None, not an array");
    options.cu_seqlens_q = arguments_.cu_seqlens_q = take_option("cu_seqlens_q", given[0]);
    options.cu_seqlens_k = arguments_.cu_seqlens_k = take_option("cu_seqlens_k", given[1]);
    options.seqused_k = arguments_.seqused_k = take_option("seqused_k", given[2]);
    options.alibi_slopes = arguments_.alibi_slopes = take_option("alibi_slopes", given[3]);
    options.sink = arguments_.sink = take_option("sink", given[4]);
    options.device = device_of(place_, threads);
    if (!given[5].is_none()) options.softmax_scale = real("softmax_scale", given[5]);
    options.softcap = real("softcap", given[6]);
    options.window_left = whole("window left", given[7]);
    options.window_right = whole("window right", given[8]);
    options.alignment = flag("top_left", given[9]) ? Alignment::kTopLeft : Alignment::kBottomRight;
    options.max_seqlen_q = whole("max_seqlen_q", given[10]);
    options.max_seqlen_k = whole("max_seqlen_k", given[11]);
    options.deterministic = flag("deterministic", given[12]);
    plan_ = plan_for(value(describe(pass, arguments_.q, arguments_.k, arguments_.v, options)), options.device);
  }

  void run(uintptr_t stream, uintptr_t workspace, nb::handle o, nb::handle lse, nb::handle do_, nb::handle dlse, nb::handle dq,
           nb::handle dk, nb::handle dv, nb::handle dsink) {
    Arguments arguments = arguments_;
    arguments.o = take("o", o);
    arguments.lse = take("lse", lse);
    arguments.do_ = take("do", do_);
    arguments.dlse = take("dlse", dlse);
    arguments.dq = take("dq", dq);
    arguments.dk = take("dk", dk);
    arguments.dv = take("dv", dv);
    arguments.dsink = take("dsink", dsink);
    Buffer own;
    if (!workspace && plan_.workspace_bytes()) {
      own = value(Buffer::make(plan_.device(), plan_.workspace_bytes()));
      workspace = reinterpret_cast<uintptr_t>(own.data());
    }
    arguments.workspace = reinterpret_cast<void*>(workspace);
    Status status;
    {
      const nb::gil_scoped_release released;
      status = plan_.run(arguments, reinterpret_cast<Stream>(stream));
      if (own.data() && status.ok()) status = synchronize(plan_.device());  // before its memory goes
    }
    check(status);
  }

  const Plan& plan() const { return plan_; }

 private:
  TensorView take(const char* name, nb::handle source) {
    if (source.is_none()) return {};
    Tensor tensor = tensor_of(name, source);
    if (!inputs_.empty() && tensor.place != place_) {
      throw nb::value_error((std::string(name) + " is on " + tensor.place.name() + ", but q is on " + place_.name()).c_str());
    }
    inputs_.push_back(std::move(tensor));
    return inputs_.back().view;
  }

  // What is given and has no elements is not what is not given.
  TensorView take_option(const char* name, nb::handle source) {
    TensorView view = take(name, source);
    if (!source.is_none() && !view.data) view.data = &place_;
    return view;
  }

  Place place_;
  std::vector<Tensor> inputs_;
  Arguments arguments_;
  Plan plan_;
};

// Memory of a device as a DLPack exporter; filled where not every element will be written (with 0 where elements have 16 bits).
nb::ndarray<nb::array_api> empty(const std::vector<size_t>& shape, DataType dtype, int device_type, int device_index,
                                 std::optional<float> fill) {
  using Code = nb::dlpack::dtype_code;
  size_t elements = 1;
  for (const size_t extent : shape) elements *= extent;
  const uint8_t bits = dtype == DataType::kFloat32 ? 32 : 16;
  const Code code = dtype == DataType::kBFloat16 ? Code::Bfloat : Code::Float;
  const Device device = device_of(place_of("the result", device_type, device_index), 0);
  const size_t bytes = elements * bits / 8;
  auto buffer = std::make_unique<Buffer>(value(Buffer::make(device, bytes)));
  if (fill) {
    check(buffer->copy_from_host(std::vector<float>(bytes / sizeof(float) + 1, *fill).data(), bytes));
    check(synchronize(device));  // whichever stream writes next
  }
  void* const data = buffer->data();
  const nb::capsule owner(buffer.release(), [](void* p) noexcept { delete static_cast<Buffer*>(p); });
  return nb::ndarray<nb::array_api>(data, shape.size(), shape.data(), owner, nullptr, {static_cast<uint8_t>(code), bits, 1}, device_type,
                                    device_index);
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "Exact attention: the C++ API that the rest of the package is built on.";
  m.attr("__version__") = tw_version();
  pthread_atfork([] { had_threads = threads_now() > 1; }, nullptr, [] { has_lost_threads = has_lost_threads || had_threads; });

  nb::enum_<Pass>(m, "Pass").value("FORWARD", Pass::kForward).value("BACKWARD", Pass::kBackward);
  nb::enum_<DataType>(m, "DataType", nb::is_arithmetic())
      .value("FLOAT32", DataType::kFloat32)
      .value("BFLOAT16", DataType::kBFloat16)
      .value("FLOAT16", DataType::kFloat16)
      .value("INT32", DataType::kInt32);

  nb::class_<Device>(m, "Device", "A processor that attention can run on.")
      .def_static("cpu", &Device::cpu, "threads"_a = 0, "This machine's CPU; 0 threads: OMP_NUM_THREADS, or every core.")
      .def_static(
          "cuda", [](int index) { return value(Device::cuda(index)); }, "index"_a = 0, "An NVIDIA GPU; RuntimeError without one.")
      .def_prop_ro("type", [](const Device& d) { return d.type == DeviceType::kCpu ? "cpu" : "cuda"; })
      .def_ro("index", &Device::index)
      .def_ro("name", &Device::name)
      .def_ro("arch", &Device::arch, "The best instruction set: 'avx512', 'avx2', 'sse4', 'neon', 'sm_90'.")
      .def_ro("units", &Device::units, "Threads of a CPU, multiprocessors of a GPU.")
      .def_ro("desk_bytes", &Device::desk_bytes, "Fast memory of one unit: L2 cache of a core, shared memory of a multiprocessor.")
      .def_ro("memory_bytes", &Device::memory_bytes)
      .def("__repr__", [](const Device& d) {
        return "<Device " + std::string(d.type == DeviceType::kCpu ? "cpu" : "cuda:" + std::to_string(d.index)) + " " + d.name + ", " +
               d.arch + ", " + std::to_string(d.units) + (d.type == DeviceType::kCpu ? " threads>" : " multiprocessors>");
      });

  nb::class_<Candidate>(m, "Candidate", "A kernel that was considered.")
      .def_ro("name", &Candidate::name)
      .def_ro("refusal", &Candidate::refusal, "Why it cannot take the problem; empty where it can.")
      .def("__repr__", [](const Candidate& c) { return "<" + c.name + (c.refusal.empty() ? ">" : ": " + c.refusal + ">"); });

  nb::class_<Explanation>(m, "Explanation", "What a plan will do, counted from the mask, block by block.")
      .def_ro("kernel", &Explanation::kernel)
      .def_ro("candidates", &Explanation::candidates)
      .def_prop_ro(
          "block_m", [](const Explanation& e) { return e.tiles.block_m; }, "Query rows of a tile.")
      .def_prop_ro(
          "block_n", [](const Explanation& e) { return e.tiles.block_n; }, "Keys of a tile.")
      .def_ro("work_items", &Explanation::work_items)
      .def_ro("full_tiles", &Explanation::full_tiles)
      .def_ro("masked_tiles", &Explanation::masked_tiles)
      .def_ro("skipped_tiles", &Explanation::skipped_tiles)
      .def_ro("flops", &Explanation::flops, "Useful work: visible pairs of query and key only.")
      .def_ro("flash_bytes", &Explanation::flash_bytes, "Traffic with the machine's memory.")
      .def_ro("standard_bytes", &Explanation::standard_bytes, "What standard attention would move.")
      .def_ro("workspace_bytes", &Explanation::workspace_bytes)
      .def_ro("flash_extra_bytes", &Explanation::flash_extra_bytes, "Memory beyond the tensors.")
      .def_ro("standard_extra_bytes", &Explanation::standard_extra_bytes)
      .def_ro("intensity", &Explanation::intensity, "flops / flash_bytes.")
      .def("__repr__", [](const Explanation& e) {
        std::string text = "kernel " + e.kernel + ", tiles of " + std::to_string(e.tiles.block_m) + " x " +
                           std::to_string(e.tiles.block_n) + ": " + std::to_string(e.full_tiles) + " full, " +
                           std::to_string(e.masked_tiles) + " masked, " + std::to_string(e.skipped_tiles) + " skipped";
        for (const Candidate& c : e.candidates)
          if (!c.refusal.empty()) text += "\n  not " + c.name + ": " + c.refusal;
        return text;
      });

  nb::exception<Unreadable>(m, "Unreadable", PyExc_RuntimeError);
  nb::class_<Call>(m, "Call", "One attention: planned from its inputs, then run on outputs that the caller allocates.")
      .def(nb::init<Pass, nb::handle, nb::handle, nb::handle, const nb::tuple&, int>(), "pass_"_a, "q"_a.none(), "k"_a.none(), "v"_a.none(),
           "options"_a, "threads"_a)
      .def("run", &Call::run, "stream"_a, "workspace"_a, "o"_a.none(), "lse"_a.none(), "do"_a.none() = nb::none(),
           "dlse"_a.none() = nb::none(), "dq"_a.none() = nb::none(), "dk"_a.none() = nb::none(), "dv"_a.none() = nb::none(),
           "dsink"_a.none() = nb::none(), "workspace 0: memory of its own for the time of the call")
      .def_prop_ro("kernel", [](const Call& call) { return std::string(call.plan().kernel()); })
      .def_prop_ro("problem", [](const Call& call) { return call.plan().problem().to_string(); })
      .def_prop_ro("dtype", [](const Call& call) { return call.plan().problem().dtype; })
      .def_prop_ro("workspace_bytes", [](const Call& call) { return call.plan().workspace_bytes(); });

  m.def(
      "use_torch",
      [](nb::object tensor_type, nb::dict dtypes) {
        torch().tensor_type = std::move(tensor_type);
        if (nb::hasattr(torch().tensor_type, "__dlpack_c_exchange_api__")) {
          const nb::object capsule = torch().tensor_type.attr("__dlpack_c_exchange_api__");
          const auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
          if (!api) throw nb::python_error();
          if (api->major == 1) torch().read = api->read;
        }
        torch().dtypes.clear();
        for (auto [dtype, ours] : dtypes) torch().dtypes.emplace_back(nb::borrow(dtype), nb::cast<DataType>(ours));
      },
      "tensor_type"_a, "dtypes"_a, "Tells what PyTorch's tensors are: torch.Tensor, and DataType by torch.dtype.");
  m.def("refuse_dtype", &wrong_dtype, "name"_a, "dtype"_a, "Raises TypeError: the type is none that this argument may have.");
  m.def("empty", &empty, "shape"_a, "dtype"_a, "device_type"_a, "device_index"_a, "fill"_a.none(),
        "Memory of a device as an array that speaks DLPack.");
  m.def(
      "synchronize", [](int index) { check(synchronize(value(Device::cuda(index)))); }, "index"_a, "Waits for a CUDA device.");
  m.def("devices", &Device::all, "Every processor that attention can run on here: the CPU, then the NVIDIA GPUs.");
  m.def(
      "explain",
      [](const std::string& problem, const Device& device, std::vector<int32_t> lengths_q, std::vector<int32_t> lengths_k) {
        const Problem parsed = value(Problem::parse(problem));
        const nb::gil_scoped_release released;
        Result<Explanation> explanation = explain(parsed, device, {std::move(lengths_q), std::move(lengths_k)});
        const nb::gil_scoped_acquire acquired;
        return value(std::move(explanation));
      },
      "problem"_a, "device"_a, "lengths_q"_a, "lengths_k"_a);
}

}  // namespace tilewise
