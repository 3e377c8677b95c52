// Where one sequence lies: dense or packed (cu_seqlens), its keys capped by seqused_k; and which query and head a
// row is when the query heads of one key/value head are packed into rows.
#pragma once

#include "core/config.h"

namespace tilewise {

struct Sequence {
  long long q_row, k_row;  // first row in the packed tensors; 0 when dense, where the batch stride leads there
  int seqlen_q, seqlen_k;
};

// cu_seqlens are null when dense, seqused_k null when not given. seqlen_q and seqlen_k are the problem's.
TW_HD Sequence sequence_of(int batch_index, int seqlen_q, int seqlen_k, const int* cu_seqlens_q, const int* cu_seqlens_k,
                           const int* seqused_k) {
  Sequence s{0, 0, seqlen_q, seqlen_k};
  if (cu_seqlens_q) {
    s.q_row = cu_seqlens_q[batch_index];
    s.seqlen_q = cu_seqlens_q[batch_index + 1] - cu_seqlens_q[batch_index];
  }
  if (cu_seqlens_k) {
    s.k_row = cu_seqlens_k[batch_index];
    s.seqlen_k = cu_seqlens_k[batch_index + 1] - cu_seqlens_k[batch_index];
  }
  if (seqused_k) s.seqlen_k = max_of(min_of(s.seqlen_k, seqused_k[batch_index]), 0);
  return s;
}

// Row r of a packed group: all heads of a query lie side by side, so that a run of rows is a run of queries.
struct QueryHead {
  int query, head;  // head within the group
};
TW_HD QueryHead query_head_of_row(long long row, int group) {
  const long long query = row / group;
  return {static_cast<int>(query), static_cast<int>(row - query * group)};
}

}  // namespace tilewise
