// What a CTA of the forward kernel keeps in shared memory.
#pragma once

#include "cuda/kernels/params.h"
#include "cuda/kernels/schedule.cuh"
#include "cuda/tile/load.cuh"
#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/shared.cuh"

namespace tilewise {

constexpr int kItems = 4;  // work items published ahead

template <ForwardConfig C>
struct ForwardShared {
  using Q = tile::Tile<64, C.head_dim>;
  using K = tile::Tile<C.block_n, C.head_dim>;
  using V = tile::Tile<C.block_n, C.head_dim_v>;
  // Every warpgroup has a place for finished tiles, or all have one in common: who asks first (o_wanted) gets it, the next panel by panel.
  static constexpr bool kOwnPlaces = C.o_slots == C.consumers;
  static_assert(kOwnPlaces || (C.o_slots == 1 && C.consumers == 2));
  static constexpr int kPieces = kOwnPlaces ? 1 : C.head_dim_v / 64;
  static_assert(kOwnPlaces || C.head_dim_v % 64 == 0);
  using O = tile::Tile<64, C.head_dim_v / kPieces>;
  Q q[C.q_slots];
  K k[C.k_stages];
  V v[C.v_stages];
  O o[C.o_slots][kPieces];
  float lse[C.consumers][64];
  bool spoilt[C.consumers][kPieces][4];  // some row of a warp of the finished tile is NaN
  WorkItem<C.consumers> item[kItems];
  tile::Barrier item_full[kItems], item_empty[kItems];
  tile::Barrier q_full[C.q_slots], q_empty[C.q_slots], o_full[C.consumers][kPieces], o_empty[C.consumers][kPieces];
  tile::Barrier o_wanted[C.consumers];
  tile::Barrier k_full[C.k_stages], k_empty[C.k_stages], v_full[C.v_stages], v_empty[C.v_stages];
  tile::Barrier begun;  // the first keys are there

  __device__ __forceinline__ static constexpr int o_slot(int part) { return kOwnPlaces ? part : 0; }

  // Columns that are not there.
  __device__ __forceinline__ void clear_columns(int head_dim, int head_dim_v) {
    const int thread = static_cast<int>(threadIdx.x), threads = C.threads();
    for (auto& tile : q) tile::clear_panels(tile, head_dim, thread, threads);
    for (auto& tile : k) tile::clear_panels(tile, head_dim, thread, threads);
    for (auto& tile : v) tile::clear_panels(tile, head_dim_v, thread, threads);
  }
  __device__ __forceinline__ void init_barriers() {
    constexpr int kWarps = 4 * C.consumers;
    for (int i = 0; i < kItems; ++i) {
      item_full[i].init(32);
      item_empty[i].init(32 * kWarps + 3);  // and the loaders of keys and of values, and who stores
    }
    for (int i = 0; i < C.q_slots; ++i) {
      q_full[i].init(1);
      q_empty[i].init(4);
    }
    for (int i = 0; i < C.consumers; ++i) {
      for (int piece = 0; piece < kPieces; ++piece) {
        o_full[i][piece].init(128);
        o_empty[i][piece].init(32);
      }
      o_wanted[i].init(4);
    }
    for (int i = 0; i < C.k_stages; ++i) {
      k_full[i].init(1);
      k_empty[i].init(kWarps);
    }
    for (int i = 0; i < C.v_stages; ++i) {
      v_full[i].init(1);
      v_empty[i].init(kWarps);
    }
    begun.init(1);
    ::cuda::ptx::fence_mbarrier_init(::cuda::ptx::sem_release, ::cuda::ptx::scope_cluster);
  }
};

}  // namespace tilewise
