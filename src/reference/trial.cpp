// Every tensor lives twice: a host mirror with the same margins and gaps, which float64 and standard attention read, and
// the device's copy. Bytes that no element owns hold NaN in both and are compared after the run.
#include "reference/trial.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numbers>
#include <span>

#include "core/mask.h"
#include "core/sequence.h"
#include "reference/attention.h"
#include "reference/standard.h"

namespace tilewise::reference {
namespace {

constexpr int64_t kMarginBytes = 256;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Quiet NaNs that no arithmetic makes: what an output holds before it is written, and what surrounds every tensor.
constexpr uint32_t kUnwritten32 = 0x7fe5a5a5, kPoison32 = 0x7fd3b3b3;
constexpr uint16_t kUnwritten16 = 0x7fe5, kPoison16 = 0x7fd3;  // NaN as bfloat16 and as float16

// Random numbers by position, so that they do not depend on the order of drawing.
uint64_t hash(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}
double uniform(uint64_t seed, uint64_t index) { return static_cast<double>(hash(seed + hash(index)) >> 11) * 0x1p-53; }
float normal(uint64_t seed, uint64_t index) {
  const uint64_t bits = hash(seed + hash(index));
  const float radius = static_cast<float>((bits >> 40) + 1) * 0x1p-24f, angle = static_cast<float>(bits & 0xffffff) * 0x1p-24f;
  return std::sqrt(-2 * std::log(radius)) * std::cos(2 * std::numbers::pi_v<float> * angle);
}
// The same, drawn one after the other.
struct Random {
  uint64_t seed, count = 0;
  double next() { return uniform(seed, count++); }
  int64_t integer(int64_t low, int64_t high) { return low + static_cast<int64_t>(next() * static_cast<double>(high - low + 1)); }
  bool chance(double probability) { return next() < probability; }
};

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

int64_t count_of(const TensorView& view) {
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

struct Dims {
  int64_t batch, seqlen, heads, dim;
};

// Strides of [batch, seqlen, heads, dim] and the elements that all of it spans.
std::array<int64_t, 4> strides_of(Layout layout, const Dims& n, int64_t bytes, int64_t* extent) {
  std::array<int64_t, 4> stride{};
  const auto nest = [&](std::array<int, 3> order, std::array<int64_t, 3> gap, int64_t pitch) {  // innermost first
    for (int d = 0; d < 3; ++d) {
      stride[order[d]] = pitch;
      pitch = pitch * std::max<int64_t>(std::array{n.batch, n.seqlen, n.heads}[order[d]], 1) + gap[d];
    }
    stride[3] = 1;
    *extent = pitch;
  };
  const int64_t unit = 16 / bytes;
  switch (layout) {
    case Layout::kBshd:
      nest({2, 1, 0}, {0, 0, 0}, n.dim);
      break;
    case Layout::kBhsd:
      nest({1, 2, 0}, {0, 0, 0}, n.dim);
      break;
    case Layout::kGaps:
      nest({2, 1, 0}, {unit, unit, unit}, round_up(n.dim, unit) + unit);
      break;
    case Layout::kPermuted:
      nest({0, 1, 2}, {1, 3, 5}, n.dim + 1 + n.dim % 2 * 2);
      break;
  }
  return stride;
}

// Lengths of `batch` sequences, each at most `longest`, `total` together; with empty and full ones among them.
std::vector<int32_t> draw_lengths(Random* random, int64_t batch, int64_t longest, int64_t total) {
  std::vector<int32_t> lengths;
  for (int64_t left = batch; left > 0; --left) {
    const int64_t low = std::max<int64_t>(0, total - (left - 1) * longest), high = std::min(longest, total);
    const double kind = random->next();
    const int64_t length = kind < 0.2 ? low : kind < 0.4 ? high : random->integer(low, high);
    lengths.push_back(static_cast<int32_t>(length));
    total -= length;
  }
  return lengths;
}

// The bounds that trial.h states. The floor decides for short rows, where standard attention may be exact by chance (one key:
// p = 1); for long rows it is far below twice the standard error.
constexpr double kFloorMax = 16, kFloorMean = 6, kFloorMeanAlone = 8;
constexpr double kFrobenius32 = 2e-6, kModerateLse = 12;

double unit_roundoff(DataType dtype) { return dtype == DataType::kFloat32 ? 0x1p-24 : dtype == DataType::kBFloat16 ? 0x1p-8 : 0x1p-11; }

struct Errors {
  double max = 0, mean = 0, mean_signed = 0, rel_frobenius = 0;
  double noise_max = 0, noise_mean = 0;
  int64_t misplaced = -1, misplaced_count = 0;  // first element that is NaN or infinite where it should not be, or not where it should
};

// Elements that counted(index) leaves out are not judged.
template <class F>
Errors errors_of(const TensorView& got, const std::vector<double>& expected, const std::vector<double>& noise, const F& counted) {
  const int64_t count = count_of(got);
  std::vector<double> values(count);
  for_each_element(got, [&](int64_t index, int64_t at) { values[index] = read_element(got.data, got.dtype, at); });
  const double overflow = got.dtype == DataType::kFloat16 ? 65520 : std::ldexp(1.0, 128);
  Errors e;
  double squares = 0, squares_expected = 0;
  int64_t judged = 0;
  for (int64_t n = 0; n < count; ++n) {
    if (!counted(n)) continue;
    const double want = std::abs(expected[n]) >= overflow ? std::copysign(INFINITY, expected[n]) : expected[n];
    if (!std::isfinite(want) || !std::isfinite(values[n])) {
      const bool same = std::isnan(want) ? std::isnan(values[n]) : want == values[n];
      if (!same && e.misplaced_count++ == 0) e.misplaced = n;
      continue;
    }
    const double error = values[n] - want;
    e.max = std::max(e.max, std::abs(error));
    e.mean += std::abs(error);
    e.mean_signed += error;
    squares += error * error, squares_expected += want * want;
    e.noise_max = std::max(e.noise_max, noise[n]);
    e.noise_mean += noise[n];
    ++judged;
  }
  if (judged == 0) return e;
  e.mean /= judged, e.mean_signed /= judged, e.noise_mean /= judged;
  e.rel_frobenius = squares_expected > 0 ? std::sqrt(squares / squares_expected) : std::sqrt(squares);
  return e;
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g", value);
  return text;
}

}  // namespace

std::string_view layout_name(Layout layout) {
  switch (layout) {
    case Layout::kBshd:
      return "bshd";
    case Layout::kBhsd:
      return "bhsd";
    case Layout::kGaps:
      return "gaps";
    case Layout::kPermuted:
      return "permuted";
  }
  return "unknown";
}

Result<Layout> parse_layout(std::string_view name) {
  for (Layout layout : {Layout::kBshd, Layout::kBhsd, Layout::kGaps, Layout::kPermuted})
    if (name == layout_name(layout)) return layout;
  return invalid_argument("layout '" + std::string(name) + "' is none of bshd, bhsd, gaps and permuted");
}

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
  Sequence sequence(int64_t b, bool with_seqused = true) const {
    const Problem& p = problem();
    Sequence s =
        sequence_of(static_cast<int>(b), static_cast<int>(p.seqlen_q), static_cast<int>(p.seqlen_k),
                    static_cast<const int*>(host_arguments.cu_seqlens_q.data), static_cast<const int*>(host_arguments.cu_seqlens_k.data),
                    with_seqused ? static_cast<const int*>(host_arguments.seqused_k.data) : nullptr);
    if (!p.packed) s.q_row = b * p.seqlen_q, s.k_row = b * p.seqlen_k;
    return s;
  }

  // shape with its strides; margins and gaps poisoned. Elements are undefined.
  Status add(std::string name, TensorView Arguments::*member, bool output, DataType dtype, std::vector<int64_t> shape,
             std::vector<int64_t> stride, int64_t extent);
  Status add_rows(std::string name, TensorView Arguments::*member, bool output, bool keys, int64_t heads, int64_t dim);
  Status add_small(std::string name, TensorView Arguments::*member, bool output, DataType dtype, std::vector<int64_t> shape);
  void draw(std::string_view name, double scale = 1);
  void draw_sequences();
  std::vector<char> keys_in_use() const;              // per row of k and v: at least one query sees it
  std::vector<char> rows_in_use(bool of_keys) const;  // per row of q and o, or of k and v: it belongs to a sequence
  // f(tensor, index) of an element of a tensor of rows: whether it belongs to a sequence. True for all other tensors.
  auto ownership() const;
  void poison_unused_rows();
  Status make_forward_results();
  Result<Report> compare();
};

Status Trial::State::add(std::string name, TensorView Arguments::*member, bool output, DataType dtype, std::vector<int64_t> shape,
                         std::vector<int64_t> stride, int64_t extent) {
  Tensor t{std::move(name), member, output, {}, {}, {}};
  const int64_t bytes = element_bytes(dtype), start = kMarginBytes + (layout == Layout::kPermuted ? bytes : 0);
  t.mirror.resize(round_up<int64_t>(start + extent * bytes + kMarginBytes, 4));
  for (size_t at = 0; at < t.mirror.size(); at += 4) {
    const uint32_t pair = bytes == 4 ? kPoison32 : kPoison16 * 0x10001u;
    std::memcpy(&t.mirror[at], &pair, 4);
  }
  t.host = {t.mirror.data() + start, dtype, static_cast<int>(shape.size()), {}, {}};
  std::copy(shape.begin(), shape.end(), t.host.shape.begin());
  std::copy(stride.begin(), stride.end(), t.host.stride.begin());
  Result<Buffer> buffer = Buffer::make(plan.device(), t.mirror.size());
  if (!buffer) return buffer.status();
  t.buffer = *buffer;
  host_arguments.*member = device_arguments.*member = t.host;
  (device_arguments.*member).data = static_cast<std::byte*>(t.buffer.data()) + start;
  tensors.push_back(std::move(t));
  return {};
}

Status Trial::State::add_rows(std::string name, TensorView Arguments::*member, bool output, bool keys, int64_t heads, int64_t dim) {
  const Problem& p = problem();
  int64_t extent;
  if (p.packed) {
    const int64_t total = keys ? p.total_k : p.total_q;
    const std::array<int64_t, 4> s = strides_of(layout, {1, total, heads, dim}, element_bytes(p.dtype), &extent);
    return add(std::move(name), member, output, p.dtype, {total, heads, dim}, {s[1], s[2], s[3]}, extent);
  }
  const int64_t seqlen = keys ? p.seqlen_k : p.seqlen_q;
  const std::array<int64_t, 4> s = strides_of(layout, {p.batch, seqlen, heads, dim}, element_bytes(p.dtype), &extent);
  return add(std::move(name), member, output, p.dtype, {p.batch, seqlen, heads, dim}, {s[0], s[1], s[2], s[3]}, extent);
}

Status Trial::State::add_small(std::string name, TensorView Arguments::*member, bool output, DataType dtype, std::vector<int64_t> shape) {
  const int64_t gap = layout == Layout::kGaps ? 4 : layout == Layout::kPermuted ? 3 : 0;
  std::vector<int64_t> stride(shape.size());
  int64_t extent = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    stride[d] = extent;
    extent = extent * std::max<int64_t>(shape[d], 1) + gap;
  }
  return add(std::move(name), member, output, dtype, std::move(shape), std::move(stride), extent);
}

void Trial::State::draw(std::string_view name, double scale) {
  Tensor& t = tensor(name);
  uint64_t stream = hash(seed);
  for (char letter : name) stream = hash(stream + static_cast<uint64_t>(letter));
  for_each_element(t.host, [&](int64_t index, int64_t at) {
    write_element(t.host.data, t.host.dtype, at, static_cast<float>(scale) * normal(stream, index));
  });
}

void Trial::State::draw_sequences() {
  const Problem& p = problem();
  Random random{hash(seed ^ 0x5e9)};
  if (p.packed) {
    // Rows at both ends that belong to no sequence, for one seed of five.
    const auto draw_gaps = [&](int64_t total, int64_t* first) {
      if (seed % 5 != 1) return total;
      *first = random.integer(0, std::min<int64_t>(total, 7));
      return total - *first - random.integer(0, std::min<int64_t>(total - *first, 7));
    };
    lengths_q = draw_lengths(&random, p.batch, p.seqlen_q, draw_gaps(p.total_q, &first_q));
    lengths_k = draw_lengths(&random, p.batch, p.seqlen_k, draw_gaps(p.total_k, &first_k));
  } else {
    lengths_q.assign(p.batch, static_cast<int32_t>(p.seqlen_q));
    lengths_k.assign(p.batch, static_cast<int32_t>(p.seqlen_k));
  }
  used_k = lengths_k;
  if (!p.seqused_k) return;
  for (int32_t& used : used_k) {
    const double kind = random.next();
    used = kind < 0.15 ? 0 : kind < 0.3 ? used : static_cast<int32_t>(random.integer(0, used));
  }
}

std::vector<char> Trial::State::keys_in_use() const {
  const Problem& p = problem();
  std::vector<char> used(p.packed ? p.total_k : p.batch * p.seqlen_k, 0);
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence(b);
    const Band band = make_band(s.seqlen_q, s.seqlen_k, p.window_left, p.window_right, p.alignment == Alignment::kTopLeft);
    for (int j = 0; j < s.seqlen_k; ++j) used[s.k_row + j] = first_query(band, j) < end_query(band, j);
  }
  return used;
}

std::vector<char> Trial::State::rows_in_use(bool of_keys) const {
  const Problem& p = problem();
  std::vector<char> used(p.packed ? (of_keys ? p.total_k : p.total_q) : p.batch * (of_keys ? p.seqlen_k : p.seqlen_q), 0);
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence(b, false);
    std::fill_n(used.begin() + (of_keys ? s.k_row : s.q_row), of_keys ? s.seqlen_k : s.seqlen_q, char{1});
  }
  return used;
}

auto Trial::State::ownership() const {
  return [packed = problem().packed, rows_q = rows_in_use(false), rows_k = rows_in_use(true)](const Tensor& t, int64_t index) {
    const auto is_one_of = [&](std::initializer_list<std::string_view> names) { return std::ranges::find(names, t.name) != names.end(); };
    if (!packed) return true;
    const int64_t per_row = t.host.shape[1] * t.host.shape[2];
    if (is_one_of({"q", "o", "do", "dq"})) return rows_q[index / per_row] != 0;
    if (is_one_of({"k", "v", "dk", "dv"})) return rows_k[index / per_row] != 0;
    if (is_one_of({"lse", "dlse"})) return rows_q[index % t.host.shape[1]] != 0;
    return true;
  };
}

void Trial::State::poison_unused_rows() {
  const std::vector<char> used = keys_in_use();
  const auto owned = ownership();
  for (Tensor& t : tensors) {
    const bool keys = t.name == "k" || t.name == "v";
    if (!keys && t.name != "q" && t.name != "do" && t.name != "dlse") continue;
    const int64_t per_row = t.host.shape[t.host.rank - 1] * t.host.shape[t.host.rank - 2];
    for_each_element(t.host, [&](int64_t index, int64_t at) {
      if (keys ? !used[index / per_row] : !owned(t, index)) write_element(t.host.data, t.host.dtype, at, NAN);
    });
  }
}

// o and lse, which backward reads: from the library's own forward pass, as in use; from float64 where no kernel may do it.
Status Trial::State::make_forward_results() {
  Problem forward = problem();
  forward.pass = Pass::kForward;
  const Result<Plan> forward_plan = Plan::make(forward, plan.device());
  if (!forward_plan) {
    const Outputs exact = attention(forward, host_arguments);
    for (std::string_view name : {"o", "lse"}) {
      Tensor& t = tensor(name);
      const std::vector<double>& values = name == "o" ? exact.o : exact.lse;
      for_each_element(t.host,
                       [&](int64_t index, int64_t at) { write_element(t.host.data, t.host.dtype, at, static_cast<float>(values[index])); });
      if (Status status = t.buffer.copy_from_host(t.mirror.data(), t.mirror.size()); !status.ok()) return status;
    }
    return {};
  }
  Arguments a = device_arguments;
  a.do_ = a.dlse = a.dq = a.dk = a.dv = a.dsink = {};
  const Result<Buffer> scratch = Buffer::make(plan.device(), std::max<size_t>(forward_plan->workspace_bytes(), 1));
  if (!scratch) return scratch.status();
  a.workspace = scratch->data();
  if (Status status = forward_plan->run(a); !status.ok()) return status;
  if (Status status = synchronize(plan.device()); !status.ok()) return status;
  for (std::string_view name : {"o", "lse"}) {
    Tensor& t = tensor(name);
    if (Status status = t.buffer.copy_to_host(t.mirror.data(), t.mirror.size()); !status.ok()) return status;
  }
  return {};
}

Trial::Trial(std::unique_ptr<State> state) : state_(std::move(state)) {}
Trial::Trial(Trial&&) noexcept = default;
Trial& Trial::operator=(Trial&&) noexcept = default;
Trial::~Trial() = default;

const Plan& Trial::plan() const { return state_->plan; }
const Arguments& Trial::arguments() const { return state_->device_arguments; }
const Arguments& Trial::host_arguments() const { return state_->host_arguments; }

Lengths Trial::lengths() const {
  const Problem& p = state_->problem();
  return {p.packed ? state_->lengths_q : std::vector<int32_t>(), p.packed || p.seqused_k ? state_->used_k : std::vector<int32_t>()};
}

Result<Trial> Trial::make(const Problem& problem, const Device& device, uint64_t seed, Layout layout) {
  Result<Plan> plan = Plan::make(problem, device);
  if (!plan) return plan.status();
  auto state = std::make_unique<State>(State{*plan, seed, layout});
  State& s = *state;
  const Problem& p = problem;
  const bool backward = p.pass == Pass::kBackward, with_dlse = backward && hash(seed ^ 0xd15e) % 2;
  const std::vector<int64_t> lse_shape =
      p.packed ? std::vector<int64_t>{p.num_heads_q, p.total_q} : std::vector<int64_t>{p.batch, p.num_heads_q, p.seqlen_q};
  const bool slopes_per_batch = hash(seed ^ 0xa11b1) % 2;
  const std::vector<int64_t> slopes_shape =
      slopes_per_batch ? std::vector<int64_t>{p.batch, p.num_heads_q} : std::vector<int64_t>{p.num_heads_q};
  constexpr DataType f32 = DataType::kFloat32, i32 = DataType::kInt32;
  using A = Arguments;

  Status status;
  const auto add = [&](Status next) {
    if (status.ok()) status = std::move(next);
  };
  add(s.add_rows("q", &A::q, false, false, p.num_heads_q, p.head_dim));
  add(s.add_rows("k", &A::k, false, true, p.num_heads_kv, p.head_dim));
  add(s.add_rows("v", &A::v, false, true, p.num_heads_kv, p.head_dim_v));
  add(s.add_rows("o", &A::o, !backward, false, p.num_heads_q, p.head_dim_v));
  add(s.add_small("lse", &A::lse, !backward, f32, lse_shape));
  if (p.packed) add(s.add_small("cu_seqlens_q", &A::cu_seqlens_q, false, i32, {p.batch + 1}));
  if (p.packed) add(s.add_small("cu_seqlens_k", &A::cu_seqlens_k, false, i32, {p.batch + 1}));
  if (p.seqused_k) add(s.add_small("seqused_k", &A::seqused_k, false, i32, {p.batch}));
  if (p.alibi) add(s.add_small("alibi_slopes", &A::alibi_slopes, false, f32, slopes_shape));
  if (p.sink) add(s.add_small("sink", &A::sink, false, f32, {p.num_heads_q}));
  if (backward) {
    add(s.add_rows("do", &A::do_, false, false, p.num_heads_q, p.head_dim_v));
    if (with_dlse) add(s.add_small("dlse", &A::dlse, false, f32, lse_shape));
    add(s.add_rows("dq", &A::dq, true, false, p.num_heads_q, p.head_dim));
    add(s.add_rows("dk", &A::dk, true, true, p.num_heads_kv, p.head_dim));
    add(s.add_rows("dv", &A::dv, true, true, p.num_heads_kv, p.head_dim_v));
    if (p.sink) add(s.add_small("dsink", &A::dsink, true, f32, {p.num_heads_q}));
  }
  if (!status.ok()) return status;
  Result<Buffer> workspace = Buffer::make(device, plan->workspace_bytes() + 2 * kMarginBytes);
  if (!workspace) return workspace.status();
  s.workspace = *workspace;
  s.device_arguments.workspace = static_cast<std::byte*>(s.workspace.data()) + kMarginBytes;

  for (std::string_view name : {"q", "k", "v"}) s.draw(name);
  if (backward) s.draw("do");
  if (with_dlse) s.draw("dlse");
  if (p.sink) s.draw("sink");
  if (p.alibi) {
    Tensor& t = s.tensor("alibi_slopes");
    for_each_element(t.host, [&](int64_t index, int64_t at) {
      write_element(t.host.data, f32, at, static_cast<float>(std::exp2(-8 * uniform(hash(seed), index))));
    });
  }
  s.draw_sequences();
  const auto write_integers = [&](std::string_view name, const std::vector<int32_t>& values) {
    std::copy(values.begin(), values.end(), static_cast<int32_t*>(s.tensor(name).host.data));
  };
  const auto starts_of = [](int64_t first, const std::vector<int32_t>& lengths) {
    std::vector<int32_t> starts{static_cast<int32_t>(first)};
    for (int32_t length : lengths) starts.push_back(starts.back() + length);
    return starts;
  };
  if (p.packed) write_integers("cu_seqlens_q", starts_of(s.first_q, s.lengths_q));
  if (p.packed) write_integers("cu_seqlens_k", starts_of(s.first_k, s.lengths_k));
  if (p.seqused_k) write_integers("seqused_k", s.used_k);
  s.poison_unused_rows();
  for (std::string_view name : {"o", "lse"})
    if (backward) s.tensor(name).fill_elements(kUnwritten32, kUnwritten16);

  Trial trial(std::move(state));
  if (status = trial.upload(); !status.ok()) return status;
  if (backward)
    if (status = trial.state_->make_forward_results(); !status.ok()) return status;
  return trial;
}

Status Trial::upload() {
  State& s = *state_;
  for (Tensor& t : s.tensors) {
    if (t.output) t.fill_elements(kUnwritten32, kUnwritten16);
    if (Status status = t.buffer.copy_from_host(t.mirror.data(), t.mirror.size()); !status.ok()) return status;
  }
  const std::vector<std::byte> poison(s.workspace.size(), std::byte{0xff});
  return s.workspace.copy_from_host(poison.data(), poison.size());
}

Status Trial::run() {
  if (Status status = state_->plan.run(state_->device_arguments); !status.ok()) return status;
  return synchronize(state_->plan.device());
}

Status Trial::download() {
  for (Tensor& t : state_->tensors)
    if (t.output)
      if (Status status = t.buffer.copy_to_host(t.mirror.data(), t.mirror.size()); !status.ok()) return status;
  return {};
}

Result<Report> Trial::compare() { return state_->compare(); }

Result<Report> Trial::State::compare() {
  const Problem& p = problem();
  Report report;
  const auto fail = [&](TensorReport* tensor, std::string reason) {
    tensor->pass = report.pass = false;
    if (tensor->reason.empty()) tensor->reason = reason;
    if (report.first_failure.empty()) report.first_failure = tensor->name + ": " + reason;
  };

  // What the device holds now; bytes that it should not have touched.
  const auto owned = ownership();
  for (Tensor& t : tensors) {
    std::vector<std::byte> now(t.mirror.size());
    if (Status status = t.buffer.copy_to_host(now.data(), now.size()); !status.ok()) return status;
    TensorReport tensor_report;
    tensor_report.name = t.name;
    if (t.output) {
      TensorView written = t.host;
      written.data = now.data() + t.offset_bytes();
      std::vector<std::byte> kept = now;
      const int64_t bytes = element_bytes(t.host.dtype);
      int64_t unwritten = 0, strayed = 0;
      t.fill_elements(kUnwritten32, kUnwritten16);
      for_each_element(written, [&](int64_t index, int64_t at) {
        std::byte* element = static_cast<std::byte*>(written.data) + at * bytes;
        const std::byte* before = static_cast<std::byte*>(t.host.data) + at * bytes;
        const bool kept_value = std::memcmp(element, before, bytes) == 0, must_be_written = owned(t, index);
        if (kept_value == must_be_written) {
          int64_t& count = kept_value ? unwritten : strayed;
#pragma omp atomic
          ++count;
        }
        std::memcpy(element, before, bytes);
      });
      if (unwritten)
        fail(&tensor_report, std::to_string(unwritten) + " of " + std::to_string(count_of(t.host)) + " elements are not written");
      if (strayed) fail(&tensor_report, std::to_string(strayed) + " elements of rows that belong to no sequence are written");
      if (now != t.mirror) fail(&tensor_report, "memory around it is written");
      t.mirror = std::move(kept);
      t.host.data = t.mirror.data() + (static_cast<std::byte*>(written.data) - now.data());
      host_arguments.*t.member = t.host;
      report.tensors.push_back(std::move(tensor_report));
    } else if (now != t.mirror) {
      fail(&tensor_report, "an input is written");
    }
  }
  std::vector<std::byte> margins(workspace.size());
  if (Status status = workspace.copy_to_host(margins.data(), margins.size()); !status.ok()) return status;
  const auto intact = [](std::span<const std::byte> bytes) {
    return std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == std::byte{0xff}; });
  };
  if (!intact({margins.data(), kMarginBytes}) || !intact({margins.data() + margins.size() - kMarginBytes, kMarginBytes})) {
    TensorReport tensor_report;
    tensor_report.name = "workspace";
    fail(&tensor_report, "memory around it is written");
  }

  Outputs noise;
  const Outputs exact = attention(p, host_arguments, &noise);

  // Standard attention multiplies unseen keys by 0: it gets copies in which they are 0.
  std::vector<std::vector<std::byte>> copies;
  const auto contiguous_copy = [&](const Tensor& t) {
    copies.emplace_back(std::max<int64_t>(count_of(t.host) * element_bytes(t.host.dtype), 1));
    TensorView copy = t.host;
    copy.data = copies.back().data();
    int64_t pitch = 1;
    for (int d = copy.rank - 1; d >= 0; --d) copy.stride[d] = pitch, pitch *= copy.shape[d];
    return copy;
  };
  Arguments standard_arguments = host_arguments;
  const std::vector<char> keys = keys_in_use();
  for (Tensor& t : tensors) {
    if (t.name == "k" || t.name == "v") {
      const TensorView copy = contiguous_copy(t);
      const int64_t per_row = count_of(copy) / std::max<int64_t>(static_cast<int64_t>(keys.size()), 1);
      for_each_element(t.host, [&](int64_t index, int64_t at) {
        write_element(copy.data, copy.dtype, index, keys[index / per_row] ? read_element(t.host.data, t.host.dtype, at) : 0.0f);
      });
      standard_arguments.*t.member = copy;
    } else if (t.output || t.name == "o" || t.name == "lse") {
      standard_arguments.*t.member = contiguous_copy(t);
    }
  }
  Result<Standard> standard = Standard::make(p);
  const bool has_standard = standard.ok();
  if (has_standard) {
    if (Status status = standard->forward(standard_arguments); !status.ok()) return status;
    if (p.pass == Pass::kBackward)
      if (Status status = standard->backward(standard_arguments); !status.ok()) return status;
  }

  const auto values_of = [](const Outputs& outputs, std::string_view name) -> const std::vector<double>& {
    return name == "o"     ? outputs.o
           : name == "lse" ? outputs.lse
           : name == "dq"  ? outputs.dq
           : name == "dk"  ? outputs.dk
           : name == "dv"  ? outputs.dv
                           : outputs.dsink;
  };
  const bool moderate = std::ranges::all_of(exact.lse, [](double lse) { return !std::isfinite(lse) || std::abs(lse) <= kModerateLse; });
  for (TensorReport& r : report.tensors) {
    const Tensor& t = tensor(r.name);
    const auto counted = [&](int64_t index) { return owned(t, index); };
    const std::vector<double>&expected = values_of(exact, r.name), &noises = values_of(noise, r.name);
    const Errors e = errors_of(t.host, expected, noises, counted);
    r.max = e.max, r.mean = e.mean, r.mean_signed = e.mean_signed, r.rel_frobenius = e.rel_frobenius;
    r.standard_max = r.standard_mean = kNaN;
    if (e.misplaced_count > 0)
      fail(&r, std::to_string(e.misplaced_count) + " elements are not finite or should not be, the first at " +
                   std::to_string(e.misplaced) + " where float64 has " + number(expected[e.misplaced]));
    const double floor = unit_roundoff(r.name == "lse" ? DataType::kFloat32 : p.dtype);
    if (has_standard) {
      const Errors standard_errors = errors_of(standard_arguments.*t.member, expected, noises, counted);
      r.standard_max = standard_errors.max, r.standard_mean = standard_errors.mean;
      const double max_bound = 2 * r.standard_max + kFloorMax * floor * e.noise_max;
      const double mean_bound = 2 * r.standard_mean + kFloorMean * floor * e.noise_mean;
      if (!(e.max <= max_bound)) fail(&r, "max error " + number(e.max) + " is above " + number(max_bound));
      if (!(e.mean <= mean_bound)) fail(&r, "mean error " + number(e.mean) + " is above " + number(mean_bound));
    } else {
      const double bound = kFloorMeanAlone * floor * e.noise_mean;
      if (!(e.mean <= bound)) fail(&r, "mean error " + number(e.mean) + " is above " + number(bound));
    }
    if (p.dtype == DataType::kFloat32 && moderate && (r.name == "o" || r.name == "dv") && !(e.rel_frobenius < kFrobenius32))
      fail(&r, "relative Frobenius error " + number(e.rel_frobenius) + " is not below " + number(kFrobenius32));
  }
  return report;
}

Result<Report> verify(const Problem& problem, const Device& device, uint64_t seed, Layout layout) {
  Result<Trial> trial = Trial::make(problem, device, seed, layout);
  if (!trial) return trial.status();
  if (Status status = trial->run(); !status.ok()) return status;
  return trial->compare();
}

std::string verify_line(const Problem& problem, uint64_t seed, Layout layout) {
  const char* kernel = std::getenv("TILEWISE_KERNEL");
  return (kernel ? "TILEWISE_KERNEL=" + std::string(kernel) + " " : "") + "tilewise verify \"" + problem.to_string() + "\" --seed " +
         std::to_string(seed) + " --layout " + std::string(layout_name(layout));
}

Layout random_layout(uint64_t seed) { return static_cast<Layout>(hash(seed ^ 0x1a1) % 4); }

Problem random_problem(uint64_t seed, const FuzzLimits& limits) {
  Random random{hash(seed ^ 0xf022)};
  const auto small = [&](int64_t low, int64_t high, double power) {  // weighted to the low end
    return low + static_cast<int64_t>(std::pow(random.next(), power) * static_cast<double>(high - low + 1));
  };
  Problem p;
  p.pass = limits.backward && random.chance(0.5) ? Pass::kBackward : Pass::kForward;
  p.dtype = std::array{DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16}[random.integer(0, 2)];
  constexpr std::array<int64_t, 7> kUsualDims{16, 32, 64, 80, 96, 128, 256};
  const auto draw_dim = [&] {
    const int64_t dim = random.chance(0.4) ? kUsualDims[random.integer(0, 6)] : small(1, limits.max_head_dim, 3);
    return std::min(dim, limits.max_head_dim);
  };
  p.head_dim = draw_dim();
  p.head_dim_v = random.chance(0.7) ? p.head_dim : draw_dim();
  p.num_heads_kv = small(1, 3, 2);
  p.num_heads_q = p.num_heads_kv * (random.chance(0.5) ? 1 : small(1, 6, 1.5));
  p.batch = small(1, 4, 2);
  const double pairs = limits.max_products / static_cast<double>(p.batch * p.num_heads_q * std::max(p.head_dim, p.head_dim_v));
  const double side = std::sqrt(std::max(pairs, 1.0)), aspect = random.chance(0.4) ? 1 : std::exp2(8 * random.next() - 4);
  const auto draw_seqlen = [&](double bound) {
    const int64_t high = std::clamp<int64_t>(static_cast<int64_t>(bound), 1, limits.max_seqlen);
    return random.chance(0.3) ? high : random.integer(1, high);
  };
  if (random.chance(0.3)) {
    p.seqlen_q = p.seqlen_k = draw_seqlen(side);
  } else {
    p.seqlen_q = draw_seqlen(side * aspect);
    p.seqlen_k = draw_seqlen(side / aspect);
  }
  if (random.chance(0.02)) p.seqlen_k = 0;

  const double mask = random.next();
  if (mask < 0.35) p.window_right = 0;
  if (mask >= 0.3 && mask < 0.6) {
    const int64_t reach = std::max(p.seqlen_q, p.seqlen_k);
    if (random.chance(0.8)) p.window_left = small(0, reach, 2);
    if (mask >= 0.35 && random.chance(0.8)) p.window_right = small(0, reach, 2);
  }
  if (random.chance(0.4)) p.alignment = Alignment::kTopLeft;
  if (random.chance(0.35)) {
    p.packed = true;
    const int64_t most_q = p.batch * p.seqlen_q, most_k = p.batch * p.seqlen_k;
    if (random.chance(0.5)) p.batch = random.integer(p.batch, 12);
    p.total_q = random.chance(0.1) ? most_q : random.integer(0, most_q);
    p.total_k = random.chance(0.1) ? most_k : random.integer(0, most_k);
  }
  p.seqused_k = random.chance(0.2);
  if (random.chance(0.15)) p.softmax_scale = static_cast<float>(2 * random.next() - 1) / std::sqrt(static_cast<float>(p.head_dim));
  if (random.chance(0.15)) p.softcap = static_cast<float>(std::exp2(8 * random.next() - 2));
  p.alibi = random.chance(0.15);
  p.sink = random.chance(0.15);
  p.deterministic = random.chance(0.1);
  return p;
}

}  // namespace tilewise::reference
