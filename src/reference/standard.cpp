// Whole passes over the matrices, one (batch, head) per thread where there are enough of them and runs of its rows
// otherwise; OpenBLAS multiplies, single-threaded inside each. Sequences of a packed batch fill the corner of their matrix.
#include "reference/standard.h"

#include <cblas.h>
#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <vector>

#include "core/mask.h"
#include "reference/attention.h"
#include "reference/lookup.h"

namespace tilewise::reference {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Calls f, compiled for the best vectors this processor has. f and all that it calls must be TW_INLINE.
#define TW_INLINE __attribute__((always_inline))
#if defined(__x86_64__)
template <class F>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void with_avx512(const F& f) {
  f();
}
template <class F>
__attribute__((target("avx2,fma"))) void with_avx2(const F& f) {
  f();
}
template <class F>
void with_vectors(const F& f) {
  static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512)
    with_avx512(f);
  else if (avx2)
    with_avx2(f);
  else
    f();
}
#else
template <class F>
void with_vectors(const F& f) {
  f();
}
#endif

// One stored element: its bits and the float it stands for.
struct Float32 {
  using Bits = float;
  TW_INLINE static float load(Bits bits) { return bits; }
  TW_INLINE static Bits store(float value) { return value; }
};
struct BFloat16 {
  using Bits = uint16_t;
  TW_INLINE static float load(Bits bits) { return from_bfloat16(bits); }
  TW_INLINE static Bits store(float value) { return to_bfloat16(value); }
};
struct Float16 {
  using Bits = uint16_t;
  TW_INLINE static float load(Bits bits) { return from_float16(bits); }
  TW_INLINE static Bits store(float value) { return to_float16(value); }
};

// e^x for x <= 0, NaN kept: 2^n times a polynomial on [-ln2/2, ln2/2]; 0 where the result would be subnormal.
TW_INLINE inline float exp_of_nonpositive(float x) {
  constexpr float kLowest = -87.33654f, kRound = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer in the low bits
  const float clamped = x < kLowest ? kLowest : x;
  const float shifted = clamped * kLog2e + kRound, n = shifted - kRound;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.0f / 5040;
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound) + 127;
  const float power = std::bit_cast<float>(exponent << 23);
  return x < kLowest ? 0.0f : y * power;
}

// Reductions lane by lane, which every compiler turns into vectors and which round less than one long sum.
constexpr int kLanes = 32;
struct Lanes {
  float values[kLanes];
};
// f(j, lane) for every j < count.
template <class F>
TW_INLINE inline void for_lanes(int64_t count, Lanes* lanes, const F& f) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes)
    for (int l = 0; l < kLanes; ++l) f(j + l, lanes->values[l]);
  for (int l = 0; j + l < count; ++l) f(j + l, lanes->values[l]);
}
TW_INLINE inline float sum_of(const Lanes& lanes) {
  float sum = 0;
  for (float lane : lanes.values) sum += lane;
  return sum;
}

// NaN does not count.
template <class E>
TW_INLINE inline float maximum_of(const typename E::Bits* values, int64_t count) {
  Lanes lanes;
  for (float& lane : lanes.values) lane = -kInfinity;
  for_lanes(count, &lanes, [&](int64_t j, float& lane) TW_INLINE { lane = E::load(values[j]) > lane ? E::load(values[j]) : lane; });
  float maximum = -kInfinity;
  for (float lane : lanes.values) maximum = lane > maximum ? lane : maximum;
  return maximum;
}

// exps[j] = exp(scores[j] - maximum); returns their sum.
template <class E>
TW_INLINE inline float exponentials(const typename E::Bits* scores, int64_t count, float maximum, float* exps) {
  Lanes lanes{};
  for_lanes(count, &lanes, [&](int64_t j, float& lane) TW_INLINE {
    exps[j] = exp_of_nonpositive(E::load(scores[j]) - maximum);
    lane += exps[j];
  });
  return sum_of(lanes);
}

template <class E>
TW_INLINE inline float dot(const typename E::Bits* a, const typename E::Bits* b, int64_t count) {
  Lanes lanes{};
  for_lanes(count, &lanes, [&](int64_t j, float& lane) TW_INLINE { lane += E::load(a[j]) * E::load(b[j]); });
  return sum_of(lanes);
}

// A matrix of floats with rows `stride` apart.
struct Rows {
  float* data;
  int64_t stride;
  float* row(int64_t r) const { return data + r * stride; }
};

int leading(int64_t stride) { return static_cast<int>(std::max<int64_t>(stride, 1)); }

// c = alpha * op(a) * op(b) + beta * c, with c of m x n and an inner dimension of length inner.
void multiply(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t inner, float alpha, Rows a, Rows b, float beta, Rows c) {
  if (m == 0 || n == 0) return;
  if (inner == 0) {
    for (int64_t r = 0; beta == 0 && r < m; ++r) std::fill_n(c.row(r), n, 0.0f);
    return;
  }
  cblas_sgemm(CblasRowMajor, transpose_a ? CblasTrans : CblasNoTrans, transpose_b ? CblasTrans : CblasNoTrans, static_cast<int>(m),
              static_cast<int>(n), static_cast<int>(inner), alpha, a.data, leading(a.stride), b.data, leading(b.stride), beta, c.data,
              leading(c.stride));
}

// A tensor of the caller by (batch, head): in place where BLAS can take it, else through a float copy of the same shape.
struct Operand {
  TensorView view;
  bool in_place = true, add = false;  // add: what it holds is added to
  std::vector<float> copy;

  void attach(const TensorView& tensor, bool added = false) {
    view = tensor;
    add = added;
    const int64_t dim = view.shape[view.rank - 1], row_stride = view.stride[view.rank - 3];
    in_place = !add && view.dtype == DataType::kFloat32 && row_stride >= dim && row_stride <= std::numeric_limits<int>::max();
    if (!in_place) copy.resize(static_cast<size_t>(rows() * heads() * dim));
  }
  int64_t rows() const { return view.rank == 4 ? view.shape[0] * view.shape[1] : view.shape[0]; }
  int64_t heads() const { return view.shape[view.rank - 2]; }
  int64_t dim() const { return view.shape[view.rank - 1]; }
  // Element offset of a row, counted over batch and sequence.
  int64_t offset(int64_t row, int64_t head) const {
    if (view.rank == 3) return row * view.stride[0] + head * view.stride[1];
    const int64_t seqlen = std::max<int64_t>(view.shape[1], 1);
    return row / seqlen * view.stride[0] + row % seqlen * view.stride[1] + head * view.stride[2];
  }
  // Rows of one sequence and head, from row on.
  Rows at(int64_t row, int64_t head) {
    if (in_place) return {static_cast<float*>(view.data) + offset(row, head), view.stride[view.rank - 3]};
    return {copy.data() + (row * heads() + head) * dim(), heads() * dim()};
  }
  void load(int threads) {
    if (in_place) return;
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows(); ++row)
      for (int64_t head = 0; head < heads(); ++head)
        for (int64_t x = 0; x < dim(); ++x)
          copy[(row * heads() + head) * dim() + x] = read_element(view.data, view.dtype, offset(row, head) + x);
  }
  void store(int threads) {
    if (in_place) return;
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < rows(); ++row)
      for (int64_t head = 0; head < heads(); ++head)
        for (int64_t x = 0; x < dim(); ++x) {
          const int64_t at = offset(row, head) + x;
          const float before = add ? read_element(view.data, view.dtype, at) : 0;
          write_element(view.data, view.dtype, at, before + copy[(row * heads() + head) * dim() + x]);
        }
  }
  void clear() {
    for (int64_t row = 0; row < rows(); ++row)
      for (int64_t head = 0; head < heads(); ++head) std::fill_n(at(row, head).data, dim(), 0.0f);
  }
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;

// Rows of 16-bit elements that are floats at the same time, for BLAS.
constexpr int64_t kBlockRows = 128;
// Fewer rows than this are not worth a thread of their own.
constexpr int64_t kLeastRows = 64;

int64_t longest(int64_t seqlen, bool packed, int64_t total) { return packed ? std::min(seqlen, total) : seqlen; }
int64_t matrix_elements(const Problem& p) {
  return p.batch * p.num_heads_q * longest(p.seqlen_q, p.packed, p.total_q) * longest(p.seqlen_k, p.packed, p.total_k);
}

}  // namespace

int64_t available_bytes() {
  int64_t available = static_cast<int64_t>(sysconf(_SC_AVPHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  std::ifstream meminfo("/proc/meminfo");
  for (std::string key, line; meminfo >> key; std::getline(meminfo, line))
    if (int64_t kib; key == "MemAvailable:" && meminfo >> kib) available = kib * 1024;
  int64_t limit, used;
  if (std::ifstream("/sys/fs/cgroup/memory.max") >> limit && std::ifstream("/sys/fs/cgroup/memory.current") >> used)
    available = std::min(available, limit - used);
  return available;
}

int64_t standard_bytes(const Problem& problem) {
  const int matrices = problem.pass == Pass::kForward ? 1 : problem.softcap > 0 ? 3 : 2;  // P; dP; tanh
  return matrices * matrix_elements(problem) * element_bytes(problem.dtype);
}

struct Standard::State {
  Problem problem;
  int threads;
  Memory p, dp, tanh;  // [batch, heads, seqlen_q, seqlen_k] of the element type
  Operand q, k, v, o, do_, dq, dk, dv;
  std::vector<std::vector<float>> scratch = {};  // per thread

  int64_t heads() const { return problem.num_heads_q; }
  int64_t group() const { return problem.num_heads_q / problem.num_heads_kv; }

  // One (batch, head) and a run of its queries, or of the keys of a (batch, key/value head).
  struct Item {
    int64_t b, head, begin, end;
    Sequence s;
    Band band;
  };
  Item item(const Arguments& a, int64_t index, int64_t heads_of_items, int64_t runs, bool of_keys) const {
    const int64_t b = index / runs / heads_of_items, head = index / runs % heads_of_items, run = index % runs;
    const Sequence s = sequence_at(problem, a, b);
    const Band band =
        make_band(s.seqlen_q, s.seqlen_k, problem.window_left, problem.window_right, problem.alignment == Alignment::kTopLeft);
    const int64_t rows = of_keys ? s.seqlen_k : s.seqlen_q;
    return {b, head, rows * run / runs, rows * (run + 1) / runs, s, band};
  }
  int team() const { return matrix_elements(problem) > 1 << 14 ? threads : 1; }  // for less, threads cost more than they bring
  int64_t runs(int64_t pairs, int64_t seqlen) const {
    if (pairs >= 2 * threads) return 1;
    return std::max<int64_t>(1, std::min(ceil_div<int64_t>(2 * threads, std::max<int64_t>(pairs, 1)), seqlen / kLeastRows));
  }
  int64_t matrix_offset(const Item& it, int64_t head) const {
    return (it.b * heads() + head) * longest(problem.seqlen_q, problem.packed, problem.total_q) *
           longest(problem.seqlen_k, problem.packed, problem.total_k);
  }
  float* scratch_floats(int64_t count) {
    std::vector<float>& mine = scratch[omp_get_thread_num()];
    if (static_cast<int64_t>(mine.size()) < count) mine.resize(count);
    return mine.data();
  }

  template <class E>
  void forward_item(const Arguments& a, const Item& it);
  template <class E>
  void backward_queries(const Arguments& a, const Item& it, float* dsink);
  template <class E>
  void backward_keys(const Item& it);
  // Floats of rows [begin, end) and columns [left, left + width) of a stored matrix: itself, or a converted copy.
  template <class E>
  Rows floats_of(void* matrix, int64_t offset, int64_t stride, int64_t begin, int64_t end, int64_t left, int64_t width);

  // Calls f(E{}) for the element type.
  template <class F>
  void with_type(const F& f) {
    if (problem.dtype == DataType::kFloat32)
      f(Float32{});
    else if (problem.dtype == DataType::kBFloat16)
      f(BFloat16{});
    else
      f(Float16{});
  }
};

template <class E>
Rows Standard::State::floats_of(void* matrix, int64_t offset, int64_t stride, int64_t begin, int64_t end, int64_t left, int64_t width) {
  auto* stored = static_cast<typename E::Bits*>(matrix) + offset;
  if constexpr (std::is_same_v<E, Float32>) {
    return {stored + begin * stride + left, stride};
  } else {
    float* copy = scratch_floats(kBlockRows * width);
    with_vectors([&]() TW_INLINE {
      for (int64_t r = begin; r < end; ++r) {
        const typename E::Bits* from = stored + r * stride + left;
        float* to = copy + (r - begin) * width;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) to[j] = E::load(from[j]);
      }
    });
    return {copy, width};
  }
}

template <class E>
void Standard::State::forward_item(const Arguments& a, const Item& it) {
  using Bits = typename E::Bits;
  constexpr bool kDirect = std::is_same_v<E, Float32>;
  const int64_t keys = it.s.seqlen_k, offset = matrix_offset(it, it.head), block = kDirect ? it.end - it.begin : kBlockRows;
  const float softcap = problem.softcap, slope = alibi_slope(a, it.b, it.head);
  const int64_t kv_head = it.head / group();
  Bits* matrix = static_cast<Bits*>(p.get()) + offset;
  Bits* kept_tanh = tanh ? static_cast<Bits*>(tanh.get()) + offset : nullptr;

  // S = softmax_scale * Q K^T, softcap, ALiBi.
  for (int64_t begin = it.begin; begin < it.end; begin += block) {
    const int64_t end = std::min(begin + block, it.end);
    Rows s = {nullptr, keys};
    if constexpr (kDirect)
      s.data = matrix + begin * keys;
    else
      s.data = scratch_floats(kBlockRows * keys);
    multiply(false, true, end - begin, keys, problem.head_dim, problem.scale(), q.at(it.s.q_row + begin, it.head),
             k.at(it.s.k_row, kv_head), 0, s);
    if (kDirect && softcap == 0 && !problem.alibi) continue;
    for (int64_t i = begin; i < end; ++i) {
      float* row = s.row(i - begin);
      if (softcap > 0)
        for (int64_t j = 0; j < keys; ++j) {
          const float t = std::tanh(row[j] / softcap);
          if (kept_tanh) kept_tanh[i * keys + j] = E::store(t);
          row[j] = softcap * t;
        }
      with_vectors([&]() TW_INLINE {
        const float position = static_cast<float>(i + it.band.offset);
        if (problem.alibi) {
#pragma omp simd
          for (int64_t j = 0; j < keys; ++j) row[j] -= slope * std::abs(position - static_cast<float>(static_cast<int32_t>(j)));
        }
        Bits* stored = matrix + i * keys;
#pragma omp simd
        for (int64_t j = 0; j < keys; ++j) stored[j] = E::store(row[j]);
      });
    }
  }

  // P = softmax(S) in place; what is not visible becomes 0.
  for (int64_t i = it.begin; i < it.end; ++i) {
    Bits* row = matrix + i * keys;
    const int64_t first = first_key(it.band, static_cast<int>(i)), last = std::max<int64_t>(end_key(it.band, static_cast<int>(i)), first);
    const float logit = a.sink ? static_cast<const float*>(a.sink.data)[it.head * a.sink.stride[0]] : -kInfinity;
    float* floats = kDirect ? nullptr : scratch_floats(keys);
    float maximum = -kInfinity, sum = 0;
    with_vectors([&]() TW_INLINE { maximum = maximum_of<E>(row + first, last - first); });
    bool sees_nothing = maximum == -kInfinity;
    for (int64_t j = first; sees_nothing && j < last; ++j) sees_nothing = E::load(row[j]) == -kInfinity;  // or NaN
    maximum = logit > maximum ? logit : maximum;
    if (float* lse = lse_at(a.lse, it.s, it.b, it.head, i); lse && sees_nothing) *lse = maximum;
    std::fill(row, row + first, Bits{0});
    std::fill(row + last, row + keys, Bits{0});
    if (sees_nothing) {
      std::fill(row + first, row + last, Bits{0});
      continue;
    }
    with_vectors([&]() TW_INLINE {
      float* e;
      if constexpr (kDirect)
        e = row;
      else
        e = floats;
      sum =
          exponentials<E>(row + first, last - first, maximum, e + first) + (logit == -kInfinity ? 0 : exp_of_nonpositive(logit - maximum));
      const float inverse = 1 / sum;
#pragma omp simd
      for (int64_t j = first; j < last; ++j) row[j] = E::store(e[j] * inverse);
    });
    if (float* lse = lse_at(a.lse, it.s, it.b, it.head, i)) *lse = maximum + std::log(sum);
  }

  // O = P V.
  for (int64_t begin = it.begin; begin < it.end; begin += block) {
    const int64_t end = std::min(begin + block, it.end);
    multiply(false, false, end - begin, problem.head_dim_v, keys, 1, floats_of<E>(p.get(), offset, keys, begin, end, 0, keys),
             v.at(it.s.k_row, kv_head), 0, o.at(it.s.q_row + begin, it.head));
  }
}

// dP = dO V^T, dS = P * (dP - sum(P * dP) + dlse) in its place, dQ = softmax_scale * dS K.
template <class E>
void Standard::State::backward_queries(const Arguments& a, const Item& it, float* dsink) {
  using Bits = typename E::Bits;
  constexpr bool kDirect = std::is_same_v<E, Float32>;
  const int64_t keys = it.s.seqlen_k, offset = matrix_offset(it, it.head), block = kDirect ? it.end - it.begin : kBlockRows;
  const int64_t kv_head = it.head / group();
  const Bits* probabilities = static_cast<const Bits*>(p.get()) + offset;
  const Bits* tanhs = tanh ? static_cast<const Bits*>(tanh.get()) + offset : nullptr;
  Bits* matrix = static_cast<Bits*>(dp.get()) + offset;
  for (int64_t begin = it.begin; begin < it.end; begin += block) {
    const int64_t end = std::min(begin + block, it.end);
    Rows s = {nullptr, keys};
    if constexpr (kDirect)
      s.data = matrix + begin * keys;
    else
      s.data = scratch_floats(kBlockRows * keys);
    multiply(false, true, end - begin, keys, problem.head_dim_v, 1, do_.at(it.s.q_row + begin, it.head), v.at(it.s.k_row, kv_head), 0, s);
    if constexpr (!kDirect)
      with_vectors([&]() TW_INLINE {
        const float* from = s.data;
        Bits* to = matrix + begin * keys;
#pragma omp simd
        for (int64_t n = 0; n < (end - begin) * keys; ++n) to[n] = E::store(from[n]);
      });
  }
  for (int64_t i = it.begin; i < it.end; ++i) {
    const Bits* pr = probabilities + i * keys;
    const Bits* th = tanhs ? tanhs + i * keys : nullptr;
    Bits* row = matrix + i * keys;
    float delta = 0;
    const float* dlse = lse_at(a.dlse, it.s, it.b, it.head, i);
    with_vectors([&]() TW_INLINE {
      delta = dot<E>(pr, row, keys) - (dlse ? *dlse : 0);
      if (th) {
#pragma omp simd
        for (int64_t j = 0; j < keys; ++j)
          row[j] = E::store(E::load(pr[j]) * (E::load(row[j]) - delta) * (1 - E::load(th[j]) * E::load(th[j])));
      } else {
#pragma omp simd
        for (int64_t j = 0; j < keys; ++j) row[j] = E::store(E::load(pr[j]) * (E::load(row[j]) - delta));
      }
    });
    if (dsink) {
      // The sink's probability is what the keys leave of 1; where lse was kept it is exact, else from the row itself.
      float seen = 0;
      for (int64_t j = 0; j < keys; ++j) seen += E::load(pr[j]);
      const float* lse = lse_at(a.lse, it.s, it.b, it.head, i);
      const float logit = static_cast<const float*>(a.sink.data)[it.head * a.sink.stride[0]];
      const float probability = lse ? (*lse == -kInfinity ? 0 : std::exp(logit - *lse)) : 1 - seen;
      dsink[it.head] -= probability * delta;
    }
  }
  for (int64_t begin = it.begin; begin < it.end; begin += block) {
    const int64_t end = std::min(begin + block, it.end);
    multiply(false, false, end - begin, problem.head_dim, keys, problem.scale(), floats_of<E>(dp.get(), offset, keys, begin, end, 0, keys),
             k.at(it.s.k_row, kv_head), 0, dq.at(it.s.q_row + begin, it.head));
  }
}

// dV = P^T dO and dK = softmax_scale * dS^T Q over the heads of one group, for a run of keys.
template <class E>
void Standard::State::backward_keys(const Item& it) {
  const int64_t keys = it.s.seqlen_k, width = it.end - it.begin, rows = it.s.seqlen_q;
  const int64_t block = std::is_same_v<E, Float32> ? std::max<int64_t>(rows, 1) : kBlockRows;
  const Rows dk_rows = dk.at(it.s.k_row + it.begin, it.head), dv_rows = dv.at(it.s.k_row + it.begin, it.head);
  float beta = 0;
  if (rows == 0) {
    multiply(true, false, width, problem.head_dim, 0, 1, {}, {}, 0, dk_rows);
    multiply(true, false, width, problem.head_dim_v, 0, 1, {}, {}, 0, dv_rows);
  }
  for (int64_t head = it.head * group(); head < (it.head + 1) * group(); ++head)
    for (int64_t begin = 0; begin < rows; begin += block, beta = 1) {
      const int64_t end = std::min(begin + block, rows), offset = matrix_offset(it, head);
      multiply(true, false, width, problem.head_dim_v, end - begin, 1, floats_of<E>(p.get(), offset, keys, begin, end, it.begin, width),
               do_.at(it.s.q_row + begin, head), beta, dv_rows);
      multiply(true, false, width, problem.head_dim, end - begin, problem.scale(),
               floats_of<E>(dp.get(), offset, keys, begin, end, it.begin, width), q.at(it.s.q_row + begin, head), beta, dk_rows);
    }
}

Standard::Standard(std::unique_ptr<State> state) : state_(std::move(state)) {}
Standard::Standard(Standard&&) noexcept = default;
Standard& Standard::operator=(Standard&&) noexcept = default;
Standard::~Standard() = default;

Result<Standard> Standard::make(const Problem& problem, int threads) {
  if (Status status = problem.validate(); !status.ok()) return status;
  const int64_t needed = standard_bytes(problem), available = available_bytes();
  const auto refuse = [&] {
    char message[160];
    std::snprintf(message, sizeof message, "standard attention needs %.1f GB for its matrices and %.1f GB are available", needed * 1e-9,
                  available * 1e-9);
    return unavailable(message);
  };
  if (needed > available - available / 32) return refuse();
  const size_t bytes = round_up<size_t>(std::max<int64_t>(matrix_elements(problem) * element_bytes(problem.dtype), 1), 64);
  const auto allocate = [&](bool wanted) { return Memory(wanted ? std::aligned_alloc(64, bytes) : nullptr); };
  const bool with_gradients = problem.pass == Pass::kBackward, with_tanh = with_gradients && problem.softcap > 0;
  auto state = std::make_unique<State>(State{problem,
                                             threads > 0 ? threads : omp_get_max_threads(),
                                             allocate(true),
                                             allocate(with_gradients),
                                             allocate(with_tanh),
                                             {},
                                             {},
                                             {},
                                             {},
                                             {},
                                             {},
                                             {},
                                             {}});
  if (!state->p || (with_gradients && !state->dp) || (with_tanh && !state->tanh)) return refuse();
  state->scratch.resize(state->threads);
  return Standard(std::move(state));
}

Status Standard::forward(const Arguments& arguments) {
  State& s = *state_;
  openblas_set_num_threads(1);
  s.q.attach(arguments.q), s.k.attach(arguments.k), s.v.attach(arguments.v), s.o.attach(arguments.o);
  for (Operand* input : {&s.q, &s.k, &s.v}) input->load(s.team());
  const int64_t pairs = s.problem.batch * s.heads(), runs = s.runs(pairs, s.problem.seqlen_q);
  s.with_type([&]<class E>(E) {
#pragma omp parallel for schedule(dynamic) num_threads(s.team())
    for (int64_t index = 0; index < pairs * runs; ++index) s.forward_item<E>(arguments, s.item(arguments, index, s.heads(), runs, false));
  });
  s.o.store(s.team());
  return {};
}

Status Standard::backward(const Arguments& arguments) {
  State& s = *state_;
  if (s.problem.pass != Pass::kBackward) return invalid_argument("pass is fwd: backward of standard attention needs a problem of pass bwd");
  openblas_set_num_threads(1);
  s.q.attach(arguments.q), s.k.attach(arguments.k), s.v.attach(arguments.v), s.do_.attach(arguments.do_);
  for (auto [output, view] : {std::pair{&s.dq, &arguments.dq}, {&s.dk, &arguments.dk}, {&s.dv, &arguments.dv}})
    output->attach(*view, s.problem.accumulate);
  for (Operand* input : {&s.q, &s.k, &s.v, &s.do_}) input->load(s.team());
  if (s.problem.seqused_k) s.dk.clear(), s.dv.clear();  // rows past the used keys belong to no item
  const int64_t pairs = s.problem.batch * s.heads(), pairs_kv = s.problem.batch * s.problem.num_heads_kv;
  const int64_t runs = s.runs(pairs, s.problem.seqlen_q), runs_kv = s.runs(pairs_kv, s.problem.seqlen_k);
  const bool with_dsink = s.problem.sink && arguments.dsink;
  std::vector<float> dsinks(with_dsink ? s.threads * s.heads() : 0);
  s.with_type([&]<class E>(E) {
#pragma omp parallel for schedule(dynamic) num_threads(s.team())
    for (int64_t index = 0; index < pairs * runs; ++index)
      s.backward_queries<E>(arguments, s.item(arguments, index, s.heads(), runs, false),
                            with_dsink ? &dsinks[omp_get_thread_num() * s.heads()] : nullptr);
#pragma omp parallel for schedule(dynamic) num_threads(s.team())
    for (int64_t index = 0; index < pairs_kv * runs_kv; ++index)
      s.backward_keys<E>(s.item(arguments, index, s.problem.num_heads_kv, runs_kv, true));
  });
  for (Operand* output : {&s.dq, &s.dk, &s.dv}) output->store(s.team());
  for (int64_t head = 0; with_dsink && head < s.heads(); ++head) {
    float sum = 0;
    for (int thread = 0; thread < s.threads; ++thread) sum += dsinks[thread * s.heads() + head];
    static_cast<float*>(arguments.dsink.data)[head * arguments.dsink.stride[0]] = sum;
  }
  return {};
}

}  // namespace tilewise::reference
