// Draws a problem's data and places it: layouts, lengths, margins and poison.
#include "reference/trial.h"

#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "core/mask.h"
#include "reference/random.h"
#include "reference/trial_state.h"

namespace tilewise::reference {
namespace {

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

Status Trial::State::add_rows(std::string name, TensorView Arguments::*member, bool output, bool keys, int64_t heads, int64_t dim,
                              std::optional<DataType> dtype) {
  const Problem& p = problem();
  const DataType type = dtype.value_or(p.dtype);
  int64_t extent;
  if (p.packed) {
    const int64_t total = keys ? p.total_k : p.total_q;
    const std::array<int64_t, 4> s = strides_of(layout, {1, total, heads, dim}, element_bytes(type), &extent);
    return add(std::move(name), member, output, type, {total, heads, dim}, {s[1], s[2], s[3]}, extent);
  }
  const int64_t seqlen = keys ? p.seqlen_k : p.seqlen_q;
  const std::array<int64_t, 4> s = strides_of(layout, {p.batch, seqlen, heads, dim}, element_bytes(type), &extent);
  return add(std::move(name), member, output, type, {p.batch, seqlen, heads, dim}, {s[0], s[1], s[2], s[3]}, extent);
}

Status Trial::State::add_gradient(std::string name, TensorView Arguments::*member, bool keys, int64_t heads, int64_t dim) {
  const bool accumulate = problem().accumulate;
  Status status = add_rows(std::move(name), member, true, keys, heads, dim, accumulate ? DataType::kFloat32 : problem().dtype);
  if (status.ok()) tensors.back().added_to = accumulate;
  return status;
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

void Trial::State::prepare_output(Tensor& t) {
  if (t.added_to)
    draw(t.name);
  else
    t.fill_elements(kUnwritten32, kUnwritten16);
}

void Trial::State::draw_sequences() {
  const Problem& p = problem();
  Random random{hash(seed ^ 0x5e9)};
  if (p.packed) {
    // Rows at both ends that belong to no sequence, for one seed of five; for one of ten whole tiles of them.
    const auto draw_gaps = [&](int64_t total, int64_t* first) {
      if (seed % 5 != 1) return total;
      const int64_t most = seed % 10 == 1 ? total / 4 : 7;
      *first = random.integer(0, std::min(total, most));
      return total - *first - random.integer(0, std::min(total - *first, most));
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

Ownership Trial::State::ownership() const { return {problem().packed, rows_in_use(false), rows_in_use(true)}; }

bool Ownership::operator()(const Tensor& t, int64_t index) const {
  const auto is_one_of = [&](std::initializer_list<std::string_view> names) { return std::ranges::find(names, t.name) != names.end(); };
  if (!packed) return true;
  const int64_t per_row = t.host.shape[1] * t.host.shape[2];
  if (is_one_of({"q", "o", "do", "dq"})) return rows_q[index / per_row] != 0;
  if (is_one_of({"k", "v", "dk", "dv"})) return rows_k[index / per_row] != 0;
  if (is_one_of({"lse", "dlse"})) return rows_q[index % t.host.shape[1]] != 0;
  return true;
}

void Trial::State::poison_unused_rows() {
  const std::vector<char> used = keys_in_use();
  const Ownership owned = ownership();
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
  forward.accumulate = false;
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
    add(s.add_gradient("dq", &A::dq, false, p.num_heads_q, p.head_dim));
    add(s.add_gradient("dk", &A::dk, true, p.num_heads_kv, p.head_dim));
    add(s.add_gradient("dv", &A::dv, true, p.num_heads_kv, p.head_dim_v));
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
    if (t.output) s.prepare_output(t);
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

}  // namespace tilewise::reference
