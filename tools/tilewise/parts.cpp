#include "parts.h"

#include <algorithm>

namespace tilewise::tool {
namespace {

// The part [begin, begin + count) of one dimension.
TensorView slice(TensorView view, int dimension, int64_t begin, int64_t count) {
  if (!view) return view;
  const int64_t element_bytes = view.dtype == DataType::kFloat32 || view.dtype == DataType::kInt32 ? 4 : 2;
  view.data = static_cast<char*>(view.data) + begin * view.stride[dimension] * element_bytes;
  view.shape[dimension] = count;
  return view;
}

// Sequences [b, b + batch).
Part sequences_of(const Part& whole, int64_t b, int64_t batch) {
  Part part = whole;
  part.problem.batch = batch;
  Arguments& a = part.arguments;
  a.seqused_k = slice(a.seqused_k, 0, b, batch);
  if (a.alibi_slopes.rank == 2) a.alibi_slopes = slice(a.alibi_slopes, 0, b, batch);
  if (!whole.problem.packed) {
    for (TensorView* view : {&a.q, &a.k, &a.v, &a.o, &a.do_, &a.dq, &a.dk, &a.dv, &a.lse, &a.dlse}) *view = slice(*view, 0, b, batch);
    return part;
  }
  part.cu_seqlens = std::make_shared<std::vector<int32_t>>();
  part.cu_seqlens->reserve(2 * static_cast<size_t>(batch + 1));
  const auto rebase = [&](TensorView& view, int64_t& total) {  // gives back the first row
    const int32_t* starts = static_cast<const int32_t*>(view.data) + b;
    view.data = part.cu_seqlens->data() + part.cu_seqlens->size();
    view.shape[0] = batch + 1;
    for (int64_t n = 0; n <= batch; ++n) part.cu_seqlens->push_back(starts[n] - starts[0]);
    total = starts[batch] - starts[0];
    return starts[0];
  };
  const int64_t row_q = rebase(a.cu_seqlens_q, part.problem.total_q), row_k = rebase(a.cu_seqlens_k, part.problem.total_k);
  for (TensorView* view : {&a.q, &a.o, &a.do_, &a.dq}) *view = slice(*view, 0, row_q, part.problem.total_q);
  for (TensorView* view : {&a.k, &a.v, &a.dk, &a.dv}) *view = slice(*view, 0, row_k, part.problem.total_k);
  for (TensorView* view : {&a.lse, &a.dlse}) *view = slice(*view, 1, row_q, part.problem.total_q);
  return part;
}

// Key/value heads [g, g + heads) with their query heads.
Part heads_of(const Part& whole, int64_t g, int64_t heads) {
  const int64_t group = whole.problem.num_heads_q / whole.problem.num_heads_kv;
  const int head_dimension = whole.problem.packed ? 1 : 2, lse_dimension = whole.problem.packed ? 0 : 1;
  Part part = whole;
  part.problem.num_heads_kv = heads, part.problem.num_heads_q = heads * group;
  Arguments& a = part.arguments;
  for (TensorView* view : {&a.q, &a.o, &a.do_, &a.dq}) *view = slice(*view, head_dimension, g * group, heads * group);
  for (TensorView* view : {&a.k, &a.v, &a.dk, &a.dv}) *view = slice(*view, head_dimension, g, heads);
  for (TensorView* view : {&a.lse, &a.dlse}) *view = slice(*view, lse_dimension, g * group, heads * group);
  for (TensorView* view : {&a.alibi_slopes, &a.sink, &a.dsink}) *view = slice(*view, view->rank - 1, g * group, heads * group);
  return part;
}

// A run of queries is a problem of its own where it has no mask, or a causal one: then its keys end where its last query
// stands, and its diagonal ends at the last key.
bool runs_are_problems(const Problem& p) {
  if (p.pass == Pass::kBackward || p.packed) return false;
  if (p.window_right < 0) return p.window_left < 0 && !p.alibi;
  return p.window_right == 0 && !p.seqused_k && (p.alignment == Alignment::kBottomRight || p.seqlen_q <= p.seqlen_k);
}
Part queries_of(const Part& whole, int64_t q, int64_t queries) {
  const Problem& p = whole.problem;
  Part part = whole;
  part.problem.seqlen_q = queries;
  Arguments& a = part.arguments;
  for (TensorView* view : {&a.q, &a.o}) *view = slice(*view, 1, q, queries);
  a.lse = slice(a.lse, 2, q, queries);
  if (p.window_right < 0) return part;
  const int64_t offset = p.alignment == Alignment::kTopLeft ? 0 : p.seqlen_k - p.seqlen_q;
  part.problem.alignment = Alignment::kBottomRight;
  part.problem.seqlen_k = std::max<int64_t>(q + queries + offset, 0);
  for (TensorView* view : {&a.k, &a.v}) *view = slice(*view, 1, 0, part.problem.seqlen_k);
  return part;
}

// Each part in `pieces` of equal length.
template <class Take>
void split(std::vector<Part>& parts, int64_t length, int64_t pieces, const Take& take) {
  if (pieces < 2) return;
  std::vector<Part> smaller;
  for (const Part& part : parts)
    for (int64_t n = 0; n < pieces; ++n)
      smaller.push_back(take(part, length * n / pieces, length * (n + 1) / pieces - length * n / pieces));
  parts = std::move(smaller);
}

}  // namespace

std::vector<Part> cut(const Problem& p, const Arguments& arguments, int64_t count) {
  std::vector<Part> parts{{p, arguments, nullptr}};
  const auto wanted = [&](int64_t length) { return std::min(length, count / static_cast<int64_t>(parts.size())); };
  if (!arguments.dsink) split(parts, p.batch, wanted(p.batch), sequences_of);  // dsink sums over the batch
  split(parts, p.num_heads_kv, wanted(p.num_heads_kv), heads_of);
  if (runs_are_problems(p)) split(parts, p.seqlen_q, wanted(p.seqlen_q), queries_of);
  return parts;
}

}  // namespace tilewise::tool
