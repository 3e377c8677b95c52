// What a CTA of the forward kernel keeps in shared memory, and the four warps that move data: one decides the tiles and loads queries, two
// load blocks of keys and of values, right to left, into rings, one stores finished tiles. The rows in it that need it are computed anew
// on the way out.
#pragma once

#include "core/mask.h"
#include "core/sequence.h"
#include "cuda/kernels/params.h"
#include "cuda/kernels/schedule.cuh"
#include "cuda/ptx/scalar.cuh"
#include "cuda/tile/dot.cuh"
#include "cuda/tile/load.cuh"
#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/rows.cuh"
#include "cuda/tile/shared.cuh"
#include "cuda/tile/store.cuh"

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

// Decides the tiles and loads queries. One warp.
template <ForwardConfig C>
__device__ __forceinline__ void load_queries(const ForwardParams& params, ForwardShared<C>& shared) {
  const bool leader = threadIdx.x % 32 == 0;
  tile::Ring<kItems> items;
  tile::Ring<C.q_slots> q_ring;
  uint32_t results[C.consumers] = {};
  Schedule schedule;
  for (bool more = true; more; items.advance()) {
    shared.item_empty[items.stage()].wait(items.parity() ^ 1);
    WorkItem<C.consumers>& item = shared.item[items.stage()];
    more = schedule.next(params, C.block_n, item);
    // Places for queries go round all warpgroups that have work: which one a warpgroup gets is part of the item. Where places are few, and
    // the last rows meet their keys before the first rows do, their queries come first.
    const tile::Ring<C.q_slots> first = q_ring;
#pragma unroll
    for (int part = 0; part < C.consumers; ++part) {
      if (leader) item.part[part].result = results[part];
      results[part] += more && !item.part[part].empty();
    }
    const bool last_first = !ForwardShared<C>::kOwnPlaces && more && item.part[C.consumers - 1].before < item.part[0].before;
    const auto nth = [&](int i) { return last_first ? C.consumers - 1 - i : i; };
#pragma unroll
    for (int i = 0; i < C.consumers; ++i) {
      if (leader) item.part[nth(i)].q_place = q_ring.position;
      if (more && !item.part[nth(i)].empty()) q_ring.advance();
    }
    shared.item_full[items.stage()].arrive();  // every lane, for what it has written
    __syncwarp();
    if (!more) break;
    q_ring = first;
    // All that a load needs is there before its place is free.
    const int begin = ptx::uniform(item.m_begin), length = ptx::uniform(item.sequence.seqlen_q);
    const int q_row = ptx::uniform(static_cast<int>(item.sequence.q_row)), head = ptx::uniform(item.head);
    const int batch = params.cu_seqlens_q ? 0 : ptx::uniform(item.batch);
    unsigned empty = 0;  // parts that see nothing and ask for nothing, as bits
    for (int part = 0; part < C.consumers; ++part) empty |= item.part[part].empty() << part;
    empty = ptx::uniform(empty);
#pragma unroll 1
    for (int i = 0; i < C.consumers; ++i) {
      const int part = nth(i), row = begin + 64 * part;
      if (empty >> part & 1) continue;
      shared.q_empty[q_ring.stage()].wait(q_ring.parity() ^ 1);
      if (ptx::elect())
        tile::load_rows(shared.q[q_ring.stage()], &params.q_map, shared.q_full[q_ring.stage()], q_row + row, length - row, head, batch,
                        params.head_dim);
      q_ring.advance();
    }
  }
}

// Loads the blocks of keys or of values of every tile, right to left. One warp.
template <ForwardConfig C, bool kValues, class T, int kStages>
__device__ __forceinline__ void load_keys(const ForwardParams& params, ForwardShared<C>& shared, T (&tiles)[kStages],
                                          const CUtensorMap& map, int columns, tile::Barrier (&full)[kStages],
                                          tile::Barrier (&empty)[kStages]) {
  if (threadIdx.x % 32 != 0) return;
  tile::Ring<kItems> items;
  tile::Ring<kStages> ring;
  // All SMs begin at once, and what is needed first would come with all the rest. So the first keys come before values and other keys are
  // asked for, the first values before others. (At k_full the loader of values could come too late, when two phases have passed.)
  bool first = true;
  for (;; items.advance()) {
    shared.item_full[items.stage()].wait(items.parity());
    const WorkItem<C.consumers>& item = shared.item[items.stage()];
    if (!item.valid) return;
    const int batch = params.cu_seqlens_k ? 0 : item.batch, head = item.head / params.group;
    for (int block = item.blocks_end - 1; block >= item.blocks_begin; --block, ring.advance()) {
      empty[ring.stage()].wait(ring.parity() ^ 1);
      if (kValues && first) shared.begun.wait(0);
      const int row = block * C.block_n;
      tile::load_rows(tiles[ring.stage()], &map, full[ring.stage()], item.sequence.k_row + row, item.sequence.seqlen_k - row, head, batch,
                      columns);
      if (!first) continue;
      first = false;
      full[0].wait(0);
      if (!kValues) shared.begun.arrive();
    }
    shared.item_empty[items.stage()].arrive();
  }
}

// A row's place in o and lse.
template <ForwardConfig C>
__device__ __forceinline__ uint16_t* output_row(const ForwardParams& params, const WorkItem<C.consumers>& item, int query) {
  return static_cast<uint16_t*>(params.o.data) + (params.cu_seqlens_q ? 0 : item.batch * params.o.batch) +
         (item.sequence.q_row + query) * params.o.row + item.head * params.o.head;
}
// If lse is wanted; `batch` is 0 where sequences are packed.
__device__ __forceinline__ float* lse_row(const ForwardParams& params, int batch, int head, long long row) {
  return params.lse + batch * params.lse_batch + head * params.lse_head + row;
}

// Rows that see no key: o = 0, lse = -inf or the sink.
template <ForwardConfig C>
__device__ __forceinline__ void write_empty(const ForwardParams& params, const WorkItem<C.consumers>& item, int part) {
  const int thread = static_cast<int>(threadIdx.x) % 128, begin = item.m_begin + 64 * part;
  const int rows = min_of(64, item.sequence.seqlen_q - begin), units = params.head_dim_v / 8;
  for (int i = thread; i < rows * units; i += 128)
    *reinterpret_cast<uint4*>(output_row<C>(params, item, begin + i / units) + i % units * 8) = make_uint4(0, 0, 0, 0);
  if (!params.lse) return;
  float* lse = lse_row(params, params.cu_seqlens_q ? 0 : item.batch, item.head, item.sequence.q_row + begin);
  for (int i = thread; i < rows; i += 128) lse[i] = params.sink ? params.sink[item.head] : -INFINITY;
}

// What is done about finished rows that are NaN, by one warp. Three things make them so: NaN or infinities that they see, in which case all
// is well; a sum that outgrew float; and in blocks at the mask's edge, which are multiplied whole, a value that is not finite times the 0
// of a pair that is not visible. To compute a row anew takes thousands of times what it took before, so the first is looked for where it
// costs little.
template <ForwardConfig C>
struct Repair {
  using Shared = ForwardShared<C>;
  using Item = WorkItem<C.consumers>;
  using O = typename Shared::O;

  const ForwardParams& params;
  Shared& shared;
  const Item& item;
  const int part, piece;
  const int kv_head = item.head / params.group;

  // Few registers are left for this: what can be found again is not kept.
  __device__ __forceinline__ static int lane() { return ptx::thread_anew() % 32; }
  __device__ __forceinline__ int first_column() const { return piece * O::kColumns; }  // of o and v
  __device__ __forceinline__ int columns() const { return min_of(O::kColumns, params.head_dim_v - first_column()); }
  __device__ __forceinline__ uint16_t& at(int query, int column) const {
    return shared.o[Shared::o_slot(part)][piece].at((query - item.m_begin) % 64, column);
  }
  __device__ __forceinline__ float& lse(int query) const { return shared.lse[part][(query - item.m_begin) % 64]; }
  __device__ __forceinline__ const uint16_t* row_of(const Elements& t, long long row, int head) const {
    return static_cast<const uint16_t*>(t.data) + (params.cu_seqlens_q ? 0 : item.batch * t.batch) + row * t.row + head * t.head;
  }
  __device__ __forceinline__ const uint16_t* key_row(const Elements& t, int key) const {
    return row_of(t, item.sequence.k_row + key, kv_head);
  }
  __device__ __forceinline__ static float element(const uint16_t* row, int column) { return ptx::to_float<C.element>(row[column]); }

  // The first of the keys from `begin` to `end` with an element that is NaN, or with kInfinite not finite, in `count` columns from `column`
  // on; `end`: none.
  template <bool kInfinite>
  __device__ __forceinline__ int find(const Elements& t, int begin, int end, int column, int count) const {
    const int units = count / 8, rows = 32 / units, mine = lane() / units;  // 16 bytes a lane
#pragma unroll 1
    for (int key = begin; key < end; key += rows) {
      bool bad = false;
      if (mine < rows && key + mine < end) {
        const uint4 x = *reinterpret_cast<const uint4*>(key_row(t, key + mine) + column + lane() % units * 8);
        bad = ptx::has_nan<C.element, kInfinite>(x.x) || ptx::has_nan<C.element, kInfinite>(x.y) ||
              ptx::has_nan<C.element, kInfinite>(x.z) || ptx::has_nan<C.element, kInfinite>(x.w);
      }
      if (const unsigned found = __ballot_sync(0xffffffff, bad)) return key + (__ffs(found) - 1) / units;
    }
    return end;
  }
  // Of one key, by one lane.
  __device__ __forceinline__ float score(int query, int key) const {
    const uint16_t *q = row_of(params.q, item.sequence.q_row + query, item.head), *k = key_row(params.k, key);
    float sum = 0;
#pragma unroll 1
    for (int d = 0; d < params.head_dim; d += 8) {
      const uint4 a = *reinterpret_cast<const uint4*>(q + d), b = *reinterpret_cast<const uint4*>(k + d);
      sum += tile::dot<C.element>(a, b);
    }
    const float slope = params.alibi_slopes ? params.alibi_slopes[item.batch * params.alibi_batch + item.head] * kLog2e : 0;
    return tile::modify(sum * params.scale, params.softcap, slope, key - query - item.band.offset);
  }
  // A row anew with plain arithmetic from the keys that it sees and no others: its columns of o, and lse where that is not finite. Each
  // lane has the score of one of 32 keys, then its columns of all of them.
  __device__ __forceinline__ void compute(int query, int begin, int end) const {
    constexpr int kRuns = O::kColumns / 32;
    const bool known = fabsf(lse(query)) < INFINITY;
    float max = lse(query) * kLog2e;
    bool finite = true;  // so far: scores of NaN or +inf make all of the row NaN
    if (!known) {
      max = -INFINITY;
#pragma unroll 1
      for (int first = begin; finite && first < end; first += 32) {
        const float x = first + lane() < end ? score(query, first + lane()) : -INFINITY;
        finite = __all_sync(0xffffffff, x < INFINITY);
        max = fmaxf(max, x);
      }
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, distance));
      if (params.sink) max = fmaxf(max, params.sink[item.head] * kLog2e);
    }
    const float shift = max == -INFINITY ? 0 : max;
    float o[kRuns] = {}, sum = finite ? 0 : NAN;
#pragma unroll 1
    for (int first = begin; finite && first < end; first += 32) {
      const int count = min_of(end - first, 32);
      const float weight = lane() < count ? ptx::exp2(score(query, first + lane()) - shift) : 0;
      sum += weight;
      bool open = false;
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        const float w = __shfl_sync(0xffffffff, weight, i);
        const uint16_t* v = key_row(params.v, first + i) + first_column();
#pragma unroll
        for (int run = 0; run < kRuns; ++run)
          if (32 * run + lane() < columns()) o[run] += w * element(v, 32 * run + lane());
      }
#pragma unroll
      for (int run = 0; run < kRuns; ++run) open |= o[run] == o[run] && 32 * run + lane() < columns();
      if (!__any_sync(0xffffffff, open) && (known || __any_sync(0xffffffff, !(sum == sum)))) break;  // nothing can change any more
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffff, sum, distance);
    // Who sees nothing has the sink as lse, whatever it is.
    if (begin < end && params.sink) sum += ptx::exp2(params.sink[item.head] * kLog2e - shift);
    if (begin >= end) max = params.sink ? params.sink[item.head] * kLog2e : -INFINITY, sum = 1;
#pragma unroll
    for (int run = 0; run < kRuns; ++run)
      if (const int column = 32 * run + lane(); column < columns())
        at(query, column) = static_cast<uint16_t>(ptx::pack<C.element>(sum == 0 ? 0 : o[run] / sum, 0));
    __syncwarp();
    // With the last columns: that it was not finite says of the others, too, that they are to be computed anew.
    if (!known && lane() == 0 && first_column() + O::kColumns >= params.head_dim_v) lse(query) = (max + log2f(sum)) * kLn2;
  }

  // Whether a row has NaN, and whether all of it is so in the first or last value that the row sees.
  __device__ __forceinline__ bool is_nan(int query) const {
    bool nan = false;
#pragma unroll 1
    for (int column = lane(); column < columns(); column += 32) nan |= !(element(&at(query, column), 0) == element(&at(query, column), 0));
    return __any_sync(0xffffffff, nan);
  }
  __device__ __forceinline__ bool is_seen(int query, int begin, int end) const {
    bool all = true;
#pragma unroll 1
    for (int column = lane(); column < columns(); column += 32) {
      const float o = element(&at(query, column), 0), first = element(key_row(params.v, begin), first_column() + column);
      const float last = element(key_row(params.v, end - 1), first_column() + column);
      all &= o == o || !(first == first) || !(last == last);
    }
    return __all_sync(0xffffffff, all);
  }
  __device__ __forceinline__ bool query_is_nan(int query) const {
    const uint16_t* q = row_of(params.q, item.sequence.q_row + query, item.head);
    bool nan = false;
#pragma unroll 1
    for (int d = lane(); d < params.head_dim; d += 32) nan |= !(element(q, d) == element(q, d));
    return __any_sync(0xffffffff, nan);
  }
  // All rows of the part's tile.
  __device__ __forceinline__ void run() const {
    const int first = item.m_begin + 64 * part, end_query = min_of(first + 64, item.sequence.seqlen_q);
    // Keys that some rows see and others do not: all but those from `inner` to `outer`.
    const int keys_begin = item.part[part].begin * C.block_n, keys_end = min_of(item.part[part].end * C.block_n, item.sequence.seqlen_k);
    const int inner = min_of(max_of(first_key(item.band, end_query - 1), keys_begin), keys_end);
    const int outer = max_of(min_of(end_key(item.band, first), keys_end), inner);
    const bool edge = find<true>(params.v, keys_begin, inner, first_column(), columns()) < inner ||
                      find<true>(params.v, outer, keys_end, first_column(), columns()) < keys_end;
    int spoilt_key = -1;  // the first with NaN, when it has been looked for
#pragma unroll 1
    for (int query = first; query < end_query; ++query) {
      if (!is_nan(query)) continue;
      const int begin = first_key(item.band, query), end = end_key(item.band, query);
      if (begin < end && fabsf(lse(query)) < INFINITY) {
        if (!edge || is_seen(query, begin, end)) continue;
      } else if (begin < end) {
        if (query_is_nan(query)) continue;
        if (spoilt_key < 0) spoilt_key = find<false>(params.k, keys_begin, keys_end, 0, params.head_dim);
        if (spoilt_key >= begin && spoilt_key < end) continue;
      }
      compute(query, begin, end);
      __syncwarp();
    }
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
    __syncwarp();
  }
};

// Stores finished tiles and their lse. One warp, for which everything waits in short sequences: what the copy engine needs is in registers
// before a tile is finished, and known to be the same in all lanes.
template <ForwardConfig C>
struct Storer {
  using Shared = ForwardShared<C>;
  using Item = WorkItem<C.consumers>;
  using O = typename Shared::O;
  static constexpr int kPieces = Shared::kPieces;

  const ForwardParams& params;
  Shared& shared;
  const int lane = static_cast<int>(threadIdx.x) % 32;

  // Lets a warpgroup write a piece of its tile, when all stores but the last kLeft have read what they store.
  template <int kLeft>
  __device__ __forceinline__ void give_place(int part, int piece) {
    if (ptx::elect()) tile::wait_stored<kLeft>();
    __syncwarp();
    shared.o_empty[part][piece].arrive();  // every lane, for what it has read
  }
  template <int kPiece = 0>
  __device__ __forceinline__ void give_places(int part) {
    give_place<kPieces - 1 - kPiece>(part, kPiece);
    if constexpr (kPiece + 1 < kPieces) give_places<kPiece + 1>(part);
  }
  // Where a part's tile goes.
  struct Target {
    int row, rows, head, batch, q_row;
    uint32_t parity;
  };
  __device__ __forceinline__ Target target_of(const Item& item, int part) const {
    const int row = ptx::uniform(item.m_begin) + 64 * part;
    return {row,
            min_of(64, ptx::uniform(item.sequence.seqlen_q) - row),
            ptx::uniform(item.head),
            params.cu_seqlens_q ? 0 : ptx::uniform(item.batch),
            ptx::uniform(static_cast<int>(item.sequence.q_row)) + row,
            static_cast<uint32_t>(ptx::uniform(static_cast<int>(item.part[part].result & 1)))};
  }
  // Stores a part's tile from a piece on, and lets part `next` have the common place piece by piece (-1: nobody). Where a row is NaN it
  // goes on in a form of its own, so that nothing that the other needs has to be kept beside what Repair needs.
  template <bool kRepairs>
  __device__ __forceinline__ void store(const Item& item, int part, int next, int piece) {
    Target to = target_of(item, part);
#pragma unroll 1
    for (; piece < kPieces; ++piece) {
      shared.o_full[part][piece].wait(to.parity);
      O& tile = shared.o[Shared::o_slot(part)][piece];
      const bool there = piece * O::kColumns < params.head_dim_v;
      if (there && __any_sync(0xffffffff, lane < 4 && shared.spoilt[part][piece][lane % 4])) {
        if constexpr (!kRepairs) return store<true>(item, part, next, piece);
        Repair<C>{params, shared, item, part, piece}.run();
        to = target_of(item, part);
      }
      if (ptx::elect()) tile::store_rows(tile, &params.o_map, to.q_row, to.rows, to.head, to.batch, params.head_dim_v, piece * O::kColumns);
      if (next >= 0 && piece > 0) give_place<1>(next, piece - 1);
    }
    if (next >= 0) give_place<0>(next, kPieces - 1);
    if (params.lse) {
      float* lse = lse_row(params, to.batch, to.head, to.q_row);
#pragma unroll
      for (int i = lane; i < 64; i += 32)
        if (i < to.rows) lse[i] = shared.lse[part][i];
    }
  }
  __device__ __forceinline__ void run() {
    for (tile::Ring<kItems> items;; items.advance()) {
      shared.item_full[items.stage()].wait(items.parity());
      const Item& item = shared.item[items.stage()];
      if (!ptx::uniform(item.valid)) break;
      unsigned left = 0;  // parts with a tile to store, as bits
      for (int part = 0; part < C.consumers; ++part) left |= !item.part[part].empty() << part;
      left = ptx::uniform(left);
      const auto first = [&] { return __ffs(left) - 1; };  // -1: none
      int part = first();
      if constexpr (Shared::kOwnPlaces) {
        for (int own = 0; own < C.consumers; ++own)
          if (left >> own & 1) give_place<0>(own, 0);
      } else if (part >= 0) {
        const auto asks = [&] { return left >> part & 1 && shared.o_wanted[part].passed(item.part[part].result & 1); };
        while (!__all_sync(0xffffffff, asks())) part ^= 1;
        give_places(part);
      }
      while (part >= 0) {
        left ^= 1u << part;
        const int next = first();
        store<false>(item, part, Shared::kOwnPlaces ? -1 : next, 0);
        part = next;
      }
      __syncwarp();  // every lane has read the item
      if (lane == 0) shared.item_empty[items.stage()].arrive();
    }
    if (ptx::elect()) tile::wait_stored();  // the memory must stay until then
  }
};

}  // namespace tilewise
