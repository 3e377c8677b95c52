// The inside of a Trial: trial.cpp draws and places it, judge.cpp judges it. Every tensor lives twice: a host mirror with the
// same margins and gaps, which float64 and standard attention read, and the device's copy. Bytes that no element owns hold
// NaN in both and are compared after the run.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "reference/attention.h"
#include "reference/lookup.h"
#include "reference/trial.h"

namespace tilewise::reference {

inline constexpr int64_t kMarginBytes = 256;

// Quiet NaNs that no arithmetic makes: what an output holds before it is written, and what surrounds every tensor.
inline constexpr uint32_t kUnwritten32 = 0x7fe5a5a5, kPoison32 = 0x7fd3b3b3;
inline constexpr uint16_t kUnwritten16 = 0x7fe5, kPoison16 = 0x7fd3;  // NaN as bfloat16 and as float16

template <class F>  // f(index along the shape, element offset), rows of the last dimension in parallel
void for_each_element(const TensorView& view, const F& f) {
  int64_t rows = 1;
  for (int d = 0; d + 1 < view.rank; ++d) rows *= view.shape[d];
  const int64_t width = view.shape[view.rank - 1];
#pragma omp parallel for if (rows * width > 1 << 16)
  for (int64_t row = 0; row < rows; ++row) {
    int64_t offset = 0, rest = row;
    for (int d = view.rank - 2; d >= 0; --d) offset += rest % view.shape[d] * view.stride[d], rest /= view.shape[d];
    for (int64_t x = 0; x < width; ++x) f(row * width + x, offset + x);
  }
}

inline int64_t count_of(const TensorView& view) {
  int64_t count = 1;
  for (int d = 0; d < view.rank; ++d) count *= view.shape[d];
  return count;
}

// One tensor of the trial: where an Arguments keeps it, its mirror and the device's memory.
struct Tensor {
  std::string name;
  TensorView Arguments::*member;
  bool output;
  TensorView host;  // into mirror
  std::vector<std::byte> mirror;
  Buffer buffer;
  bool added_to = false;  // an output that holds numbers of its own before the run

  int64_t offset_bytes() const { return static_cast<std::byte*>(host.data) - mirror.data(); }
  void fill_elements(uint32_t bits32, uint16_t bits16) {
    for_each_element(host, [&](int64_t, int64_t at) {
      if (element_bytes(host.dtype) == 4)
        static_cast<uint32_t*>(host.data)[at] = bits32;
      else
        static_cast<uint16_t*>(host.data)[at] = bits16;
    });
  }
};

// Whether an element belongs to a row of some sequence; true for tensors that have no such rows.
struct Ownership {
  bool packed;
  std::vector<char> rows_q, rows_k;  // per row of q and o, of k and v
  bool operator()(const Tensor& t, int64_t index) const;
};

struct Exact {
  Outputs values, noise;
};
// The caller's tensors with standard attention's outputs.
struct StandardResults {
  Arguments arguments;
  std::vector<std::vector<std::byte>> memory;
};

struct Trial::State {
  Plan plan;
  uint64_t seed;
  Layout layout;
  std::vector<Tensor> tensors = {};
  Buffer workspace = {};
  Arguments device_arguments = {}, host_arguments = {};
  std::vector<int32_t> lengths_q = {}, lengths_k = {}, used_k = {};  // per sequence; used_k after seqused_k
  int64_t first_q = 0, first_k = 0;                                  // packed: row at which the sequences begin

  const Problem& problem() const { return plan.problem(); }
  Tensor& tensor(std::string_view name) {
    return *std::find_if(tensors.begin(), tensors.end(), [&](const Tensor& t) { return t.name == name; });
  }
  Sequence sequence(int64_t b, bool with_seqused = true) const { return sequence_at(problem(), host_arguments, b, with_seqused); }

  // shape with its strides; margins and gaps poisoned. Elements are undefined.
  Status add(std::string name, TensorView Arguments::*member, bool output, DataType dtype, std::vector<int64_t> shape,
             std::vector<int64_t> stride, int64_t extent);
  Status add_rows(std::string name, TensorView Arguments::*member, bool output, bool keys, int64_t heads, int64_t dim,
                  std::optional<DataType> dtype = {});  // the problem's where not given
  Status add_gradient(std::string name, TensorView Arguments::*member, bool keys, int64_t heads, int64_t dim);
  Status add_small(std::string name, TensorView Arguments::*member, bool output, DataType dtype, std::vector<int64_t> shape);
  void draw(std::string_view name, double scale = 1);
  void prepare_output(Tensor& t);  // what it holds before the run
  void draw_sequences();
  std::vector<char> keys_in_use() const;              // per row of k and v: at least one query sees it
  std::vector<char> rows_in_use(bool of_keys) const;  // per row of q and o, or of k and v: it belongs to a sequence
  Ownership ownership() const;
  void poison_unused_rows();
  Status make_forward_results();
  Status check_memory(const Ownership& owned, Report* report);
  Result<StandardResults> run_standard() const;
  // One output: fills in r and fails it where it breaks the bounds that trial.h states. standard: null where it could not run.
  void judge(const Exact& exact, const StandardResults* standard, const Ownership& owned, Report* report, TensorReport* r);
};

}  // namespace tilewise::reference
