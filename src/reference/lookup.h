// Where a sequence lies and what its rows are given, read from a problem's arguments in host memory.
#pragma once

#include "core/sequence.h"
#include "tilewise/tilewise.hpp"

namespace tilewise::reference {

// Rows count from the tensors' first one, in dense tensors too.
inline Sequence sequence_at(const Problem& p, const Arguments& a, int64_t b, bool with_seqused = true) {
  Sequence s = sequence_of(static_cast<int>(b), static_cast<int>(p.seqlen_q), static_cast<int>(p.seqlen_k),
                           static_cast<const int*>(a.cu_seqlens_q.data), static_cast<const int*>(a.cu_seqlens_k.data),
                           with_seqused ? static_cast<const int*>(a.seqused_k.data) : nullptr);
  if (!p.packed) s.q_row = b * p.seqlen_q, s.k_row = b * p.seqlen_k;
  return s;
}

inline float alibi_slope(const Arguments& a, int64_t b, int64_t head) {
  const TensorView& view = a.alibi_slopes;
  if (!view) return 0;
  return static_cast<const float*>(view.data)[view.rank == 2 ? b * view.stride[0] + head * view.stride[1] : head * view.stride[0]];
}

// Query i of sequence s in lse or dlse; nullptr where that is not given.
inline float* lse_at(const TensorView& view, const Sequence& s, int64_t b, int64_t head, int64_t i) {
  if (!view) return nullptr;
  return static_cast<float*>(view.data) + (view.rank == 2 ? head * view.stride[0] + (s.q_row + i) * view.stride[1]
                                                          : b * view.stride[0] + head * view.stride[1] + i * view.stride[2]);
}

}  // namespace tilewise::reference
