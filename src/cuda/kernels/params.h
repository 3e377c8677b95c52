// What the host tells a forward kernel. Everything that changes bounds, addresses or trip counts is here, not in a template.
#pragma once

#include <cuda.h>

#include "core/config.h"
#include "cuda/ptx/element.h"

namespace tilewise {

// All that changes the instructions of the inner loop.
struct ForwardConfig {
  ptx::Element element = ptx::Element::kBFloat16;
  int head_dim, head_dim_v;  // largest; smaller ones are filled with zeros
  int consumers;             // warpgroups of 64 queries
  int block_n;               // keys in a block
  int k_stages, v_stages;    // blocks of keys and of values in shared memory
  int q_slots;               // places for 64 queries in shared memory
  int o_slots;               // and for finished tiles
  bool modified = false;     // softcap or ALiBi
  TW_HD constexpr int block_m() const { return 64 * consumers; }
  TW_HD constexpr int threads() const { return 128 * (consumers + 1); }
  // Of the registers that a CTA gets, as many as its warps can have alike, the loaders leave to the consumers what they do without.
  TW_HD constexpr int consumer_registers() const { return consumers == 2 ? 216 : consumers == 3 ? 160 : 112; }
  TW_HD constexpr int loader_registers() const { return consumers == 2 ? 72 : 32; }
};

// A tensor for plain loads and stores, of 16-bit elements or, where gradients are added to, of float32; strides in elements.
struct Elements {
  void* data;
  long long batch, row, head;
};

struct ForwardParams {
  CUtensorMap q_map, k_map, v_map, o_map;  // as tile/load.cuh says
  Elements q, k, v, o;
  float* lse;  // null: not wanted
  long long lse_batch, lse_head;
  const int *cu_seqlens_q, *cu_seqlens_k, *seqused_k;
  const float *alibi_slopes, *sink;  // null: none
  long long alibi_batch;
  long long window_left, window_right;
  int batch, num_heads, group;  // group: query heads of one key/value head
  int seqlen_q, seqlen_k;       // packed: upper bounds
  int head_dim, head_dim_v;
  float scale, softcap;
  bool top_left;
  // Order of the work, see schedule.cuh: heads whose tiles come in pairs, and whether the others' come falling in size.
  int paired_heads;
  bool falling;
};

}  // namespace tilewise
