// What the instruction-set units are given: plain values and pointers only. A unit compiled for AVX-512 must not hold a
// standard-library template that the linker could hand to another unit, so nothing of the standard library stands here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/mask.h"
#include "core/sequence.h"

namespace tilewise::cpu {

enum class Element { kFloat32, kBFloat16, kFloat16 };

// A tensor [batch, row, head, dim] with strides in elements; packed tensors have batch stride 0.
struct Tensor {
  void* data;
  int64_t batch, row, head;
};
// lse and dlse: float32 [batch, head, row], rows contiguous.
struct RowTensor {
  float* data;
  int64_t batch, head;
};

// How many rows and keys a work item holds at a time; see tile_shape() in kernels.cpp.
struct TileShape {
  int block_m;  // rows (query, head) of a work item
  int block_n;  // keys in one tile
  int splits;   // backward: parts of the keys that are summed apart, in order
};

struct Params {
  Element element;
  int batch, seqlen_q, seqlen_k, num_heads_q, num_heads_kv, group, head_dim, head_dim_v;
  float scale, softcap;
  int64_t window_left, window_right;
  bool top_left;
  const int* cu_seqlens_q;
  const int* cu_seqlens_k;
  const int* seqused_k;
  const float* alibi_slopes;
  int64_t alibi_batch;
  const float* sink;
  Tensor q, k, v, o, do_, dq, dk, dv;
  RowTensor lse, dlse;
  TileShape tile;
  int64_t total_q;    // rows of q over all sequences; backward's per-row buffers have that many per head
  float* delta;       // backward: [num_heads_q, total_q] rowsum(do * o) - dlse
  float* dq_partial;  // backward with splits > 1: [splits, num_heads_q, total_q, head_dim]
};

inline Sequence sequence(const Params& p, int b) {
  return sequence_of(b, p.seqlen_q, p.seqlen_k, p.cu_seqlens_q, p.cu_seqlens_k, p.seqused_k);
}
inline Band band(const Params& p, const Sequence& s) {
  return make_band(s.seqlen_q, s.seqlen_k, p.window_left, p.window_right, p.top_left);
}

// One instruction set's kernels. Scratch is aligned to 64 bytes and belongs to one thread.
struct Isa {
  const char* name;
  int lanes;  // floats in a vector; a register tile is 3 vectors of rows wide
  size_t (*forward_scratch)(const Params&);
  void (*forward_item)(const Params&, int batch_index, int kv_head, int64_t m_block, void* scratch);
  void (*multiply_add)(int64_t repeats);  // 48 independent chains: 2 * lanes * 48 FLOP per repeat
};

namespace avx512 {
extern const Isa kIsa;
}
namespace avx2 {
extern const Isa kIsa;
}
namespace sse4 {
extern const Isa kIsa;
}
namespace neon {
extern const Isa kIsa;
}

}  // namespace tilewise::cpu
