#include "reference/attention.h"

#include <algorithm>
#include <limits>

#include "core/mask.h"
#include "reference/lookup.h"

namespace tilewise::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kWorkOfThreads = 1 << 16;  // fewer operations than this cost less than waking threads

// A tensor of rank 3 or 4 as doubles in the order of its shape.
std::vector<double> read_tensor(const TensorView& view) {
  const int dense = view.rank == 4;
  const int64_t batch = dense ? view.shape[0] : 1, rows = view.shape[dense], heads = view.shape[dense + 1], dim = view.shape[dense + 2];
  std::vector<double> values(static_cast<size_t>(batch * rows * heads * dim));
#pragma omp parallel for if (static_cast <int64_t>(values.size()) > kWorkOfThreads)
  for (int64_t r = 0; r < batch * rows; ++r) {
    const int64_t row_offset = (dense ? r / rows * view.stride[0] : 0) + r % rows * view.stride[dense];
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t x = 0; x < dim; ++x)
        values[(r * heads + h) * dim + x] = read_element(view.data, view.dtype, row_offset + h * view.stride[dense + 1] + x);
  }
  return values;
}

double dot(const double* a, const double* b, int64_t n) {
  double sums[8] = {};  // independent, so that the compiler may use vectors without reordering
  int64_t x = 0;
  for (; x + 8 <= n; x += 8)
    for (int l = 0; l < 8; ++l) sums[l] += a[x + l] * b[x + l];
  double sum = ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
  for (; x < n; ++x) sum += a[x] * b[x];
  return sum;
}

void add_scaled(double* target, double factor, const double* source, int64_t n) {
  for (int64_t x = 0; x < n; ++x) target[x] += factor * source[x];
}

void add_squares(double* target, double factor, const double* source, int64_t n) {
  for (int64_t x = 0; x < n; ++x) target[x] += factor * source[x] * (factor * source[x]);
}

double dot_of_squares(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t x = 0; x < n; ++x) sum += a[x] * b[x] * (a[x] * b[x]);
  return sum;
}

// What one query row sees: the scores of its visible keys and what softmax needs of them.
struct Row {
  std::vector<int> keys;
  std::vector<double> scores, slopes;  // d score / d (scaled product): below 1 under a softcap
  double lse = -kInfinity;             // where it stays so there is nothing to average: o and gradients are 0, whatever v and do hold

  // Errors of the scores are factors of 1 + error in p; scores are summed in float32 whatever the type of the tensors. A row
  // whose weight lies on one key may be exact in standard attention by chance, one of many keys is not: sum(p^2) says which it is.
  double noise_of_scores(DataType dtype, double noise_of_products) const {
    double largest = 0, squares = 0;
    for (double score : scores) {
      squares += std::exp(2 * (score - lse));
      if (std::isfinite(score)) largest = std::max(largest, std::abs(score));
    }
    return std::sqrt(squares) * (dtype == DataType::kFloat32 ? 1 + largest + noise_of_products : 1);
  }
};

struct Inputs {
  const Problem& problem;
  const Arguments& arguments;
  std::vector<double> q, k, v, do_;
  int64_t dim = problem.head_dim, dim_v = problem.head_dim_v;
  int64_t heads = problem.num_heads_q, heads_kv = problem.num_heads_kv, group = heads / heads_kv;

  Sequence sequence(int64_t b) const { return sequence_at(problem, arguments, b); }
  const double* q_row(int64_t row, int64_t head) const { return &q[(row * heads + head) * dim]; }
  const double* k_row(int64_t row, int64_t head) const { return &k[(row * heads_kv + head / group) * dim]; }
  const double* v_row(int64_t row, int64_t head) const { return &v[(row * heads_kv + head / group) * dim_v]; }
  // lse, dlse: [batch, heads, seqlen_q] or [heads, total_q]
  int64_t lse_index(const Sequence& s, int64_t b, int64_t i, int64_t head) const {
    return problem.packed ? head * problem.total_q + s.q_row + i : (b * heads + head) * problem.seqlen_q + i;
  }
  double dlse(const Sequence& s, int64_t b, int64_t i, int64_t head) const {
    const float* value = lse_at(arguments.dlse, s, b, head, i);
    return value ? *value : 0;
  }
  double sink(int64_t head) const {
    const TensorView& view = arguments.sink;
    return view ? static_cast<const float*>(view.data)[head * view.stride[0]] : -kInfinity;
  }

  double noise_of_products(const Sequence& s, int i, int64_t head, const Row& row) const {
    double largest = 0;
    for (int j : row.keys) {
      const double squares = dot_of_squares(q_row(s.q_row + i, head), k_row(s.k_row + j, head), dim);
      if (std::isfinite(squares)) largest = std::max(largest, squares);
    }
    // Partial sums grow like a random walk, and each is rounded: by 0.58 units in the root mean square, so 0.41 sqrt(dim) in all.
    return std::abs(problem.scale()) * std::sqrt(largest) * std::max(1.0, std::sqrt(static_cast<double>(dim)) / 2);
  }

  void compute_row(const Sequence& s, const Band& band, int64_t b, int i, int64_t head, Row* row) const {
    const double scale = problem.scale(), softcap = problem.softcap, slope = alibi_slope(arguments, b, head), logit = sink(head);
    row->keys.clear(), row->scores.clear(), row->slopes.clear();
    double maximum = logit;
    bool nan = std::isnan(logit) || logit == kInfinity;  // as in softmax: inf - inf
    for (int j = 0; j < s.seqlen_k; ++j) {
      if (!visible(band, i, j)) continue;
      double score = scale * dot(q_row(s.q_row + i, head), k_row(s.k_row + j, head), dim), derivative = 1;
      if (softcap > 0) {
        const double t = std::tanh(score / softcap);
        score = softcap * t, derivative = 1 - t * t;
      }
      if (problem.alibi) score -= slope * std::abs(static_cast<double>(i) + band.offset - j);
      row->keys.push_back(j), row->scores.push_back(score), row->slopes.push_back(derivative);
      nan = nan || std::isnan(score) || score == kInfinity;
      maximum = std::max(maximum, score);
    }
    if (row->keys.empty())
      row->lse = logit;
    else if (nan)
      row->lse = std::numeric_limits<double>::quiet_NaN();
    else if (maximum == -kInfinity)
      row->lse = -kInfinity;
    else {
      double sum = std::exp(logit - maximum);
      for (double score : row->scores) sum += std::exp(score - maximum);
      row->lse = maximum + std::log(sum);
    }
  }
};

void forward(const Inputs& in, Outputs* out, Outputs* noise) {
  const Problem& p = in.problem;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = in.sequence(b);
    const Band band = make_band(s.seqlen_q, s.seqlen_k, p.window_left, p.window_right, p.alignment == Alignment::kTopLeft);
#pragma omp parallel if (in.heads * s.seqlen_q * s.seqlen_k * (in.dim + in.dim_v) > kWorkOfThreads)
    {
      Row row;
#pragma omp for collapse(2) schedule(dynamic, 8)
      for (int64_t head = 0; head < in.heads; ++head)
        for (int i = 0; i < s.seqlen_q; ++i) {
          in.compute_row(s, band, b, i, head, &row);
          out->lse[in.lse_index(s, b, i, head)] = row.lse;
          if (noise && std::isfinite(row.lse)) noise->lse[in.lse_index(s, b, i, head)] = row.lse * row.lse / 4;
          if (row.lse == -kInfinity) continue;
          const int64_t at = ((s.q_row + i) * in.heads + head) * in.dim_v;
          for (size_t n = 0; n < row.keys.size(); ++n) {
            const double probability = std::exp(row.scores[n] - row.lse);
            add_scaled(&out->o[at], probability, in.v_row(s.k_row + row.keys[n], head), in.dim_v);
          }
          if (!noise) continue;
          const double of_scores = row.noise_of_scores(p.dtype, in.noise_of_products(s, i, head, row));
          noise->lse[in.lse_index(s, b, i, head)] += of_scores * of_scores;
          add_squares(&noise->o[at], 1, &out->o[at], in.dim_v);
          for (size_t n = 0; n < row.keys.size(); ++n)
            add_squares(&noise->o[at], of_scores * std::exp(row.scores[n] - row.lse), in.v_row(s.k_row + row.keys[n], head), in.dim_v);
        }
    }
  }
}

// One key/value head of one sequence: it alone adds to its dk and dv, so that the order of the sums is fixed.
void backward(const Inputs& in, const Sequence& s, int64_t b, int64_t head_kv, Outputs* out, Outputs* noise) {
  const Problem& p = in.problem;
  const Band band = make_band(s.seqlen_q, s.seqlen_k, p.window_left, p.window_right, p.alignment == Alignment::kTopLeft);
  const double scale = p.scale();
  Row row;
  std::vector<double> dp;
  for (int64_t head = head_kv * in.group; head < (head_kv + 1) * in.group; ++head) {
    double dsink = 0, dsink_noise = 0;
    for (int i = 0; i < s.seqlen_q; ++i) {
      in.compute_row(s, band, b, i, head, &row);
      if (row.lse == -kInfinity) continue;
      const double* do_ = &in.do_[((s.q_row + i) * in.heads + head) * in.dim_v];
      const double dlse = in.dlse(s, b, i, head);
      double delta = 0;  // <do, o>
      dp.clear();
      for (size_t n = 0; n < row.keys.size(); ++n) {
        dp.push_back(dot(do_, in.v_row(s.k_row + row.keys[n], head), in.dim_v));
        delta += std::exp(row.scores[n] - row.lse) * dp[n];
      }
      const double* o = &out->o[((s.q_row + i) * in.heads + head) * in.dim_v];
      const double delta_noise = dot_of_squares(do_, o, in.dim_v) + delta * delta + dlse * dlse;
      // Backward is given lse in float32, of which standard attention, that keeps P, knows nothing.
      const double of_lse = p.dtype == DataType::kFloat32 ? std::abs(row.lse) / 16 : 0;
      const double of_scores = noise ? of_lse + row.noise_of_scores(p.dtype, in.noise_of_products(s, i, head, row)) : 0;
      const double* q = in.q_row(s.q_row + i, head);
      const int64_t dq_at = ((s.q_row + i) * in.heads + head) * in.dim;
      for (size_t n = 0; n < row.keys.size(); ++n) {
        const int64_t k_row = s.k_row + row.keys[n];
        const int64_t dk_at = (k_row * in.heads_kv + head_kv) * in.dim, dv_at = (k_row * in.heads_kv + head_kv) * in.dim_v;
        const double* k = in.k_row(k_row, head);
        const double probability = std::exp(row.scores[n] - row.lse), factor = scale * row.slopes[n] * probability;
        const double ds = factor * (dp[n] - delta + dlse);
        add_scaled(&out->dq[dq_at], ds, k, in.dim);
        add_scaled(&out->dk[dk_at], ds, q, in.dim);
        add_scaled(&out->dv[dv_at], probability, do_, in.dim_v);
        if (!noise) continue;
        const double* v = in.v_row(k_row, head);
        const double of_ds = of_scores * factor * std::sqrt(dot_of_squares(do_, v, in.dim_v) + dp[n] * dp[n] + delta_noise);
        add_squares(&noise->dq[dq_at], of_ds, k, in.dim);
        add_squares(&noise->dk[dk_at], of_ds, q, in.dim);
        add_squares(&noise->dv[dv_at], of_scores * probability, do_, in.dim_v);
      }
      const double probability = std::exp(in.sink(head) - row.lse);
      dsink += probability * (dlse - delta);
      dsink_noise += probability * probability * (delta_noise + dlse * dlse + of_scores * of_scores * (dlse - delta) * (dlse - delta));
    }
    if (noise) noise->dsink[b * in.heads + head] = dsink_noise;
    out->dsink[b * in.heads + head] = dsink;
  }
}

// [batch, heads] to [heads]; none without a sink.
void add_dsinks(const Inputs& in, std::vector<double>* dsink) {
  for (size_t n = in.heads; n < dsink->size(); ++n) (*dsink)[n % in.heads] += (*dsink)[n];
  dsink->resize(in.problem.sink ? in.heads : 0);
}

}  // namespace

Outputs attention(const Problem& problem, const Arguments& arguments, Outputs* noise) {
  const bool with_gradients = problem.pass == Pass::kBackward;
  const Inputs in{problem,
                  arguments,
                  read_tensor(arguments.q),
                  read_tensor(arguments.k),
                  read_tensor(arguments.v),
                  with_gradients ? read_tensor(arguments.do_) : std::vector<double>()};
  const size_t rows_q = problem.packed ? problem.total_q : problem.batch * problem.seqlen_q;
  Outputs out;
  out.o.assign(rows_q * in.heads * in.dim_v, 0.0);
  out.lse.assign(rows_q * in.heads, 0.0);
  if (with_gradients) {
    out.dq.assign(in.q.size(), 0.0);
    out.dk.assign(in.k.size(), 0.0);
    out.dv.assign(in.v.size(), 0.0);
    out.dsink.assign(problem.batch * in.heads, 0.0);  // one for each sequence until they are added
  }
  if (noise) *noise = out;
  forward(in, &out, noise);
  if (with_gradients) {
    const int64_t work = static_cast<int64_t>(in.q.size()) * problem.seqlen_k;
#pragma omp parallel for collapse(2) schedule(dynamic) if (work > kWorkOfThreads)
    for (int64_t b = 0; b < problem.batch; ++b)
      for (int64_t head_kv = 0; head_kv < in.heads_kv; ++head_kv) backward(in, in.sequence(b), b, head_kv, &out, noise);
    add_dsinks(in, &out.dsink);
    if (noise) add_dsinks(in, &noise->dsink);
  }
  if (!noise) return out;
  for (std::vector<double>* squares : {&noise->o, &noise->lse, &noise->dq, &noise->dk, &noise->dv, &noise->dsink})
    for (double& value : *squares) value = std::sqrt(value);
  return out;
}

}  // namespace tilewise::reference
