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

// How a work item is cut; see tile_shape() in kernels.cpp.
struct TileShape {
  int block_m;  // forward: rows (query, head) of an item
  int block_n;  // keys on the desk at a time
  int tile_n;   // keys whose scores are in the near cache at a time; forward: block_n
};

struct Params {
  Element element;
  int batch, seqlen_q, seqlen_k, num_heads_q, num_heads_kv, group, head_dim, head_dim_v;
  float scale, softcap;
  int64_t window_left, window_right;
  bool top_left;
  bool accumulate;  // dq, dk and dv are float32 and are added to
  const int* cu_seqlens_q;
  const int* cu_seqlens_k;
  const int* seqused_k;
  const float* alibi_slopes;
  int64_t alibi_batch;
  const float* sink;
  Tensor q, k, v, o, do_, dq, dk, dv;
  RowTensor lse, dlse;
  TileShape tile;
  // Backward's workspace. What a block of keys adds to dq is summed from zero and added in order of the blocks, so that the
  // result is the same however many blocks are worked on at once.
  float* delta;        // [num_heads_q, rows] rowsum(do * o) - dlse, rows as in q over all sequences
  float* dq_sum;       // [1, and blocks_at_once if more than one][num_heads_kv, dq_tiles, head_dim rounded up, kTileRows]
  int64_t total_rows;  // batch * seqlen_q or total_q
  int64_t dq_tiles;    // tiles of rows of one key/value head over all sequences
  int blocks_at_once;  // of one sequence's keys; 1: an item takes all blocks of its head, one after the other
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
  size_t (*backward_scratch)(const Params&);
  // Backward: delta of all rows; then the blocks of keys, in rounds of blocks_at_once if there is more than one, and after
  // each round what it adds to dq; then dq. `tile` is a tile of rows.
  void (*backward_delta)(const Params&, int batch_index, int kv_head, int64_t tile);
  void (*backward_item)(const Params&, int batch_index, int kv_head, int block_begin, int block_end, void* scratch);
  void (*backward_add)(const Params&, int batch_index, int kv_head, int64_t tile, int block_begin);
  void (*backward_dq)(const Params&, int batch_index, int kv_head, int64_t tile, void* scratch);
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
