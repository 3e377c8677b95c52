// dq from its sums, when all blocks of keys have added to them: each work writes a share of what an earlier unit has summed.
#pragma once

#include "cuda/kernels/gradient_work.cuh"
#include "cuda/ptx/scalar.cuh"
#include "cuda/tile/fragment.cuh"
#include "cuda/tile/store_row.cuh"

namespace tilewise {

// A share by two warpgroups, of a pair by four, which take pieces in turn: a piece is a tile of 64 rows, or half of its columns. The sums
// become 0 where another unit comes after this one.
template <BackwardConfig C>
struct Share {
  static constexpr int kPieces = C.head_dim > 128 ? 2 : 1, kColumns = C.head_dim / kPieces, kThreads = 128;
  const BackwardParams& params;
  const ShareWork& share;
  const int thread;
  int piece;  // the present one: tile * kPieces + part of its columns
  float x[kColumns / 32][16];
  // Of the present piece.
  Sequence sequence;
  long long spoilt_tile;
  float4* sums;
  int batch, head, tile;

  __device__ __forceinline__ int column() const { return piece % kPieces * kColumns; }
  __device__ __forceinline__ int row() const { return tile * kBlockM + tile::lane_of(thread).row; }
  __device__ __forceinline__ bool more() const { return piece < share.tiles * kPieces; }
  // Leaves `sums` alone where nothing is there.
  __device__ __forceinline__ void find() {
    int member = 0;
    for (tile = share.begin + piece / kPieces; tile >= params.q_tiles; tile -= params.q_tiles) ++member;
    head = share.head + member;
    spoilt_tile = head * params.tiles + share.first_tile + tile;
    const long long place = share.first_sum + member * params.q_tiles + tile;
    batch = share.batch;
    sequence = share.sequence;
    if (params.cu_seqlens_q) {
      const Place at = find_place(params.cu_seqlens_q, params.batch, C.block_m, tile / C.tiles());
      if (at.batch < 0) return;
      batch = at.batch;
      tile = at.block * C.tiles() + tile % C.tiles();
      sequence = trimmed_sequence(params, batch).sequence;
    }
    sums = reinterpret_cast<float4*>(params.dq_sum + (place * C.sum_columns(params.deterministic) + column()) * kBlockM) + thread;
  }
  // 32 columns of sums, as the tensor cores hold them.
  static __device__ __forceinline__ void read(const float4* from, float (&to)[16]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 four = __ldcg(from + i * kThreads);  // other SMs have added to it
      to[4 * i] = four.x, to[4 * i + 1] = four.y, to[4 * i + 2] = four.z, to[4 * i + 3] = four.w;
    }
  }
  // Where both CTAs of a pair have sums of the 8 columns from column() + 8 * i on: from the first's to the second's.
  static constexpr int kToSecond = C.own_columns() / 8 * kThreads;
  __device__ __forceinline__ bool twice(int i) const {
    return C.pair && params.deterministic && column() + 8 * i >= C.head_dim - C.own_columns();
  }
  // 32 columns of the present piece's sums.
  __device__ __forceinline__ void read_sums(int i, float (&to)[16]) const {
    read(sums + i * 4 * kThreads, to);
    if (!twice(4 * i)) return;
    float second[16];
    read(sums + i * 4 * kThreads + kToSecond, second);
#pragma unroll
    for (int j = 0; j < 16; ++j) to[j] += second[j];
  }
  __device__ __forceinline__ void load() {
    sums = nullptr;
    if (more()) find();
    if (!sums) return;
#pragma unroll
    for (int i = 0; i < kColumns / 32; ++i) read_sums(i, x[i]);
  }
  __device__ __forceinline__ void store() const {
    if (!sums) return;
    float zero[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) zero[i % 2] += 0 * x[i / 16][i % 16];
    if (params.accumulate || __any_sync(0xffffffff, !(zero[0] + zero[1] == 0)))
      store_carefully();
    else
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint16_t* to = row() + 8 * r < sequence.seqlen_q
                           ? row_of(params.dq, params.cu_seqlens_q != nullptr, batch, sequence.q_row + row() + 8 * r, head) + column()
                           : nullptr;
#pragma unroll
        for (int i = 0; i < kColumns / 32; ++i)
          tile::store_row<C.element>(x[i], r, params.scale, to ? to + 32 * i : nullptr, params.head_dim - column() - 32 * i, thread);
      }
    if (!share.again) return;
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
      sums[i * kThreads] = make_float4(0, 0, 0, 0);
      if (twice(i)) sums[i * kThreads + kToSecond] = make_float4(0, 0, 0, 0);
    }
  }
  // Where rows may not be finite, or gradients are added to: the postprocess kernel is told which rows to look after.
  __device__ __forceinline__ void store_carefully() const {
    SpoiltRows* spoilt = params.spoilt + spoilt_tile * (C.head_dim / 32) + column() / 32;
#pragma unroll 1
    for (int i = 0; i < kColumns / 32; ++i) {
      float part[16];
      read_sums(i, part);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const unsigned rows = tile::infinite_rows(part, r);
        if (rows && thread % 32 == 0) spoilt[i].of[thread / 32][r] = rows, params.counters->spoilt = 1;
        const bool added = params.accumulate && (rows >> thread % 32 & 1);  // what is added cannot be taken back
        write_gradient<C.element>(params, part, r, params.scale, row() + 8 * r < sequence.seqlen_q && !added, params.dq, batch,
                                  sequence.q_row + row() + 8 * r, head, column() + 32 * i, params.head_dim, thread);
      }
    }
  }
  // The present piece, which has been loaded, and all others.
  __device__ __forceinline__ void finish() {
    store();
#pragma unroll 1
    for (piece += 2 * C.ctas(); more(); piece += 2 * C.ctas()) {
      load();
      store();
    }
  }
};

}  // namespace tilewise
