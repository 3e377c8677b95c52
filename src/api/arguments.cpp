// Checks arguments against a problem: one description per tensor, one function that compares.
#include "api/arguments.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <span>

namespace tilewise {
namespace {

constexpr uintptr_t kWorkspaceAlignment = 256;

struct Dimension {
  const char* name;
  int64_t extent;
};

struct Shape {
  int rank = 0;
  std::array<Dimension, 4> dims{};
  Shape(std::initializer_list<Dimension> list) {
    for (const Dimension& dim : list) dims[static_cast<size_t>(rank++)] = dim;
  }
  bool empty() const {
    for (int i = 0; i < rank; ++i) {
      if (dims[static_cast<size_t>(i)].extent == 0) return true;
    }
    return false;
  }
};

enum class Use { kRead, kWritten };

int64_t element_bytes(DataType dtype) { return dtype == DataType::kFloat32 || dtype == DataType::kInt32 ? 4 : 2; }

const char* name_of(DataType dtype) {
  switch (dtype) {
    case DataType::kFloat32:
      return "float32";
    case DataType::kBFloat16:
      return "bfloat16";
    case DataType::kFloat16:
      return "float16";
    case DataType::kInt32:
      return "int32";
  }
  return "unknown";
}

std::string listed(int rank, auto&& item) {
  std::string text = "[";
  for (int i = 0; i < rank; ++i) text.append(i ? ", " : "").append(item(static_cast<size_t>(i)));
  return text + "]";
}

Status wrong_shape(const char* name, const TensorView& view, const Shape& shape) {
  return invalid_argument(std::string(name) + " has shape " +
                          listed(std::min(view.rank, 4), [&](size_t i) { return std::to_string(view.shape[i]); }) +
                          (view.rank > 4 ? " and more dimensions" : "") + ", but the problem needs " + listed(shape.rank, [&](size_t i) {
                            const std::string dim = shape.dims[i].name;
                            return dim + (dim.find(' ') == dim.npos ? " " : " = ") + std::to_string(shape.dims[i].extent);
                          }));
}

bool has_shape(const TensorView& view, const Shape& shape) {
  if (view.rank != shape.rank) return false;
  for (size_t i = 0; i < static_cast<size_t>(shape.rank); ++i) {
    if (view.shape[i] != shape.dims[i].extent) return false;
  }
  return true;
}

// A tensor that is given: type, shape, alignment and strides.
Status check_given(const char* name, const TensorView& view, DataType dtype, const Shape& shape, Use use) {
  if (view.dtype != dtype) {
    return invalid_argument(std::string(name) + " has dtype " + name_of(view.dtype) + ", but the problem needs " + name_of(dtype));
  }
  if (!has_shape(view, shape)) return wrong_shape(name, view, shape);
  if (shape.empty()) return {};
  if (reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(element_bytes(dtype)) != 0) {
    return invalid_argument(std::string(name) + " lies at an address that is not a multiple of its element size " +
                            std::to_string(element_bytes(dtype)));
  }
  const size_t last = static_cast<size_t>(shape.rank) - 1;
  const auto stride_error = [&](size_t i, const std::string& rule) {
    return invalid_argument(std::string(name) + " has stride " + std::to_string(view.stride[i]) + " in its dimension " +
                            shape.dims[i].name + ", " + rule);
  };
  if (view.shape[last] > 1 && view.stride[last] != 1) return stride_error(last, "but the last dimension must be contiguous (stride 1)");
  for (size_t i = 0; i < last; ++i) {
    if (view.shape[i] == 1) continue;
    int64_t span = 0;
    if (__builtin_mul_overflow(view.stride[i], view.shape[i] * element_bytes(dtype), &span)) {
      return stride_error(i, "which times its extent " + std::to_string(view.shape[i]) + " does not fit in 64 bits");
    }
    if (use == Use::kWritten && std::abs(view.stride[i]) < view.shape[last]) {
      return stride_error(i, "so that elements of this output overlap");
    }
  }
  return {};
}

Status check_needed(const char* name, const TensorView& view, DataType dtype, const Shape& shape, Use use) {
  if (!view.data && shape.empty()) return {};
  if (!view.data) return invalid_argument(std::string(name) + " is missing: the problem needs it");
  return check_given(name, view, dtype, shape, use);
}

Status check_optional(const char* name, const TensorView& view, DataType dtype, const Shape& shape, Use use) {
  return view.data ? check_given(name, view, dtype, shape, use) : Status();
}

// Needed with the problem's flag, and a mistake without it.
Status check_flagged(bool flag, const char* flag_name, const char* name, const TensorView& view, DataType dtype, const Shape& shape) {
  if (flag) return check_needed(name, view, dtype, shape, Use::kRead);
  if (view.data) return invalid_argument(std::string(name) + " is given, but the problem is not made with " + flag_name);
  return {};
}

// Whether two views have a byte in common, exactly, since tensors may lie interleaved in one buffer (dq, dk and dv of one dqkv). Both
// are runs of bytes, and runs a and b meet iff  -length_a < start_a - start_b < length_b. The difference of the starts is a sum over
// dimensions, a stride times an index each; dimensions of both with one stride are one, of the indices' differences.
__extension__ typedef __int128 Int128;  // sums of strides times extents, each of 64 bits
class Overlap {
 public:
  Overlap(const TensorView& a, const TensorView& b) {
    const int64_t run_a = take(a, 1), run_b = take(b, -1);
    if (run_a == 0 || run_b == 0) return;
    const auto distance = static_cast<int64_t>(reinterpret_cast<uintptr_t>(a.data) - reinterpret_cast<uintptr_t>(b.data));
    Int128 low = 0, high = 0;
    for (size_t i = count_; i-- > 0;) {
      dims_[i].rest_low = low, dims_[i].rest_high = high;
      low += static_cast<Int128>(dims_[i].stride) * dims_[i].low;
      high += static_cast<Int128>(dims_[i].stride) * dims_[i].high;
    }
    const Int128 least = -static_cast<Int128>(run_a) + 1 - distance, most = static_cast<Int128>(run_b) - 1 - distance;
    found_ = low <= most && high >= least && search(0, least, most);
  }
  bool found() const { return found_; }

 private:
  struct Dim {
    int64_t stride, low, high;   // in bytes, not negative; the index or difference of indices
    Int128 rest_low, rest_high;  // of the sum over the dimensions after this one
  };

  // Adds the dimensions of a view, large strides first; gives the bytes of a run, 0 where the view is empty.
  int64_t take(const TensorView& view, int64_t sign) {
    const int64_t bytes = element_bytes(view.dtype);
    for (int d = 0; d < view.rank; ++d)
      if (view.shape[static_cast<size_t>(d)] == 0) return 0;
    for (int d = 0; d + 1 < view.rank; ++d) {
      const auto i = static_cast<size_t>(d);
      if (view.shape[i] == 1 || view.stride[i] == 0) continue;
      int64_t stride = sign * view.stride[i] * bytes, low = 0, high = view.shape[i] - 1;
      if (stride < 0) stride = -stride, std::swap(low, high), low = -low;
      size_t at = 0;
      while (at < count_ && dims_[at].stride > stride) ++at;
      if (at < count_ && dims_[at].stride == stride) {
        dims_[at].low += low, dims_[at].high += high;
        continue;
      }
      for (size_t after = count_++; after > at; --after) dims_[after] = dims_[after - 1];
      dims_[at] = {stride, low, high, 0, 0};
    }
    return view.rank == 0 ? 0 : view.shape[static_cast<size_t>(view.rank) - 1] * bytes;
  }

  // Whether indices of the dimensions from `at` on make a sum in [least, most]. Large strides first: of the strides of tensors, few
  // indices come into question each. Strides that are made to be hard end the search, and pass.
  bool search(size_t at, Int128 least, Int128 most) {
    if (at == count_) return least <= 0 && 0 <= most;
    if (--steps_left_ < 0) return false;
    const Dim& dim = dims_[at];
    const auto floor_div = [&](Int128 x) { return x >= 0 ? x / dim.stride : -((-x + dim.stride - 1) / dim.stride); };
    const Int128 first = std::max<Int128>(dim.low, -floor_div(-(least - dim.rest_high)));
    const Int128 last = std::min<Int128>(dim.high, floor_div(most - dim.rest_low));
    for (Int128 index = first; index <= last && steps_left_ >= 0; ++index)
      if (search(at + 1, least - index * dim.stride, most - index * dim.stride)) return true;
    return false;
  }

  std::array<Dim, 6> dims_{};
  size_t count_ = 0;
  int steps_left_ = 1 << 12;
  bool found_ = false;
};

struct Named {
  const char* name;
  const TensorView* view;
};

Status check_distinct(std::initializer_list<Named> outputs, std::span<const Named> inputs) {
  for (const Named* output = outputs.begin(); output != outputs.end(); ++output) {
    const auto meets = [&](const Named& other) {
      return output->view->data && other.view->data && Overlap(*output->view, *other.view).found();
    };
    const auto refuse = [&](const Named& other) {
      return invalid_argument(std::string(output->name) + " shares memory with " + other.name);
    };
    for (const Named& input : inputs) {
      if (meets(input)) return refuse(input);
    }
    for (const Named* other = outputs.begin(); other != output; ++other) {
      if (meets(*other)) return refuse(*other);
    }
  }
  return {};
}

}  // namespace

// The first check that fails is the answer.
#define TW_RETURN_IF_ERROR(expression) \
  if (Status status = (expression); !status.ok()) return status

Status check_arguments(const Problem& p, size_t workspace_bytes, const Arguments& a) {
  const auto rows = [&](const char* total_name, int64_t total, const char* seqlen_name, int64_t seqlen, Dimension heads, Dimension dim) {
    if (p.packed) return Shape{{total_name, total}, heads, dim};
    return Shape{{"batch", p.batch}, {seqlen_name, seqlen}, heads, dim};
  };
  const Dimension heads_q{"num_heads_q", p.num_heads_q}, heads_kv{"num_heads_kv", p.num_heads_kv};
  const Dimension dim{"head_dim", p.head_dim}, dim_v{"head_dim_v", p.head_dim_v};
  const Shape q = rows("total_q", p.total_q, "seqlen_q", p.seqlen_q, heads_q, dim);
  const Shape o = rows("total_q", p.total_q, "seqlen_q", p.seqlen_q, heads_q, dim_v);
  const Shape k = rows("total_k", p.total_k, "seqlen_k", p.seqlen_k, heads_kv, dim);
  const Shape v = rows("total_k", p.total_k, "seqlen_k", p.seqlen_k, heads_kv, dim_v);
  const Shape lse = p.packed ? Shape{heads_q, {"total_q", p.total_q}} : Shape{{"batch", p.batch}, heads_q, {"seqlen_q", p.seqlen_q}};
  const Shape starts{{"batch + 1", p.batch + 1}}, per_head{heads_q};
  const Shape slopes = a.alibi_slopes.rank == 2 ? Shape{{"batch", p.batch}, heads_q} : per_head;
  constexpr DataType f32 = DataType::kFloat32, i32 = DataType::kInt32;
  const bool forward = p.pass == Pass::kForward;
  const std::array<Named, 12> inputs{{{"o", &a.o},  // the first four are read by backward only
                                      {"lse", &a.lse},
                                      {"do", &a.do_},
                                      {"dlse", &a.dlse},
                                      {"q", &a.q},
                                      {"k", &a.k},
                                      {"v", &a.v},
                                      {"cu_seqlens_q", &a.cu_seqlens_q},
                                      {"cu_seqlens_k", &a.cu_seqlens_k},
                                      {"seqused_k", &a.seqused_k},
                                      {"alibi_slopes", &a.alibi_slopes},
                                      {"sink", &a.sink}}};
  const std::span<const Named> read = std::span(inputs).subspan(forward ? 4 : 0);

  TW_RETURN_IF_ERROR(check_needed("q", a.q, p.dtype, q, Use::kRead));
  TW_RETURN_IF_ERROR(check_needed("k", a.k, p.dtype, k, Use::kRead));
  TW_RETURN_IF_ERROR(check_needed("v", a.v, p.dtype, v, Use::kRead));
  TW_RETURN_IF_ERROR(check_needed("o", a.o, p.dtype, o, forward ? Use::kWritten : Use::kRead));
  TW_RETURN_IF_ERROR(check_flagged(p.packed, "packed", "cu_seqlens_q", a.cu_seqlens_q, i32, starts));
  TW_RETURN_IF_ERROR(check_flagged(p.packed, "packed", "cu_seqlens_k", a.cu_seqlens_k, i32, starts));
  TW_RETURN_IF_ERROR(check_flagged(p.seqused_k, "seqused_k", "seqused_k", a.seqused_k, i32, Shape{{"batch", p.batch}}));
  TW_RETURN_IF_ERROR(check_flagged(p.alibi, "alibi", "alibi_slopes", a.alibi_slopes, f32, slopes));
  TW_RETURN_IF_ERROR(check_flagged(p.sink, "sink", "sink", a.sink, f32, per_head));
  if (forward) {
    TW_RETURN_IF_ERROR(check_optional("lse", a.lse, f32, lse, Use::kWritten));
    TW_RETURN_IF_ERROR(check_distinct({{"o", &a.o}, {"lse", &a.lse}}, read));
  } else {
    TW_RETURN_IF_ERROR(check_needed("lse", a.lse, f32, lse, Use::kRead));
    TW_RETURN_IF_ERROR(check_needed("do", a.do_, p.dtype, o, Use::kRead));
    TW_RETURN_IF_ERROR(check_optional("dlse", a.dlse, f32, lse, Use::kRead));
    const DataType gradient = p.accumulate ? f32 : p.dtype;
    const auto check_gradient = [&](const char* name, const TensorView& view, const Shape& shape) {
      Status status = check_needed(name, view, gradient, shape, Use::kWritten);
      const bool wide = view.data && view.dtype == f32 && gradient != f32;
      return wide ? invalid_argument(status.message() + "; float32 is for accumulate, which adds to what it holds") : status;
    };
    TW_RETURN_IF_ERROR(check_gradient("dq", a.dq, q));
    TW_RETURN_IF_ERROR(check_gradient("dk", a.dk, k));
    TW_RETURN_IF_ERROR(check_gradient("dv", a.dv, v));
    if (a.dsink.data && !p.sink) return invalid_argument("dsink is given, but the problem is not made with sink");
    TW_RETURN_IF_ERROR(check_optional("dsink", a.dsink, f32, per_head, Use::kWritten));
    TW_RETURN_IF_ERROR(check_distinct({{"dq", &a.dq}, {"dk", &a.dk}, {"dv", &a.dv}, {"dsink", &a.dsink}}, read));
  }
  if (workspace_bytes > 0) {
    if (!a.workspace) return invalid_argument("workspace is missing: the plan needs " + std::to_string(workspace_bytes) + " bytes");
    if (reinterpret_cast<uintptr_t>(a.workspace) % kWorkspaceAlignment != 0) {
      return invalid_argument("workspace lies at an address that is not a multiple of " + std::to_string(kWorkspaceAlignment));
    }
  }
  return {};
}

#undef TW_RETURN_IF_ERROR

}  // namespace tilewise
