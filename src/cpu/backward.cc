// Attention backward on one core: a block of keys with its dK and dV stays on the desk (L2) while the query rows that see
// it pass by; scores are computed again from Q, K and lse, and with dP never leave the near cache (L1). Five products:
//   S^T = K Q^T        P^T = 2^(S^T - lse)          dV += P^T dO
//   dP^T = V dO^T      dS^T = P^T (dP^T - delta)    dK += dS^T Q     dQ^T += K^T dS^T
// with delta = rowsum(dO * O) - dlse. dK and dV of a key belong to one item; what a block of keys adds to dQ is summed from
// zero and added in order of the blocks. So every sum has one order, whatever the threads do. Compiled once per set.
#include <cmath>

#include "cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tilewise::cpu::TW_ISA {
namespace {

struct BackwardTile : RowTile {
  alignas(64) float lse[kTileRows];  // in units of log2; +inf where the row has seen nothing
  alignas(64) float delta[kTileRows];
  bool tainted;  // a NaN or an infinity in Q or dO
};

struct Layout {
  int ldk, ldv, dims_k;  // row lengths of float32 rows of head_dim and head_dim_v; rows of dQ^T
  size_t k, v, dk, dv, q, do_, q_t, do_t, p, ds, dq, bytes;

  explicit Layout(const Params& params) {
    ldk = round_up(params.head_dim, 16);
    ldv = round_up(params.head_dim_v, 16);
    dims_k = round_up(params.head_dim, 8);
    const int64_t keys = params.tile.block_n + kRegisterRows;  // the last keys are read and written as a full group
    Carver carve(sizeof(BackwardTile));
    k = carve.take(keys * ldk);
    v = carve.take(keys * ldv);
    dk = carve.take(keys * ldk);
    dv = carve.take(keys * ldv);
    q = carve.take(static_cast<int64_t>(kTileRows) * ldk);
    do_ = carve.take(static_cast<int64_t>(kTileRows) * ldv);
    q_t = carve.take(static_cast<int64_t>(kTileRows) * ldk);
    do_t = carve.take(static_cast<int64_t>(kTileRows) * ldv);
    p = carve.take(static_cast<int64_t>(params.tile.tile_n + kRegisterRows) * kTileRows);
    ds = carve.take(static_cast<int64_t>(params.tile.tile_n + kRegisterRows) * kTileRows);
    dq = carve.take(static_cast<int64_t>(dims_k) * kTileRows);
    bytes = carve.bytes();
  }
};

// Where the tiles of a sequence lie in dq_sum: sequences take whole tiles, at most one more than their share of rows. Buffer
// 0 is the sum; the others are the blocks of a round.
int64_t first_tile(const Group& g) {
  const int64_t row = g.p.cu_seqlens_q ? g.seq.q_row : static_cast<int64_t>(g.batch_index) * g.p.seqlen_q;
  return row * g.p.group / kTileRows + g.batch_index;
}
float* dq_tile(const Group& g, int buffer, int64_t tile) {
  const int64_t floats = static_cast<int64_t>(round_up(g.p.head_dim, 8)) * kTileRows;
  return g.p.dq_sum + ((buffer * static_cast<int64_t>(g.p.num_heads_kv) + g.kv_head) * g.p.dq_tiles + first_tile(g) + tile) * floats;
}
float* delta_of(const Group& g, const QueryHead& at) {
  const int64_t row = g.p.cu_seqlens_q ? g.seq.q_row : static_cast<int64_t>(g.batch_index) * g.p.seqlen_q;
  return g.p.delta + g.head(at) * g.p.total_rows + row + at.query;
}
float lse_of(const Group& g, const QueryHead& at) {
  return g.p.lse.data[g.batch_index * g.p.lse.batch + g.head(at) * g.p.lse.head + g.seq.q_row + at.query];
}

// P^T from the scores of kRegisterRows keys; ds keeps softcap's derivative until dP is there.
template <int kVectors>
HWY_INLINE void probabilities(const Params& p, const BackwardTile& tile, int key, bool modified, bool masked,
                              const V (&acc)[kRegisterRows][kVectors], float* p_t, float* ds_t) {
  const F d;
  const I di;
  TW_UNROLL
  for (int r = 0; r < kRegisterRows; ++r) {
    TW_UNROLL
    for (int n = 0; n < kVectors; ++n) {
      V x = acc[r][n];
      const V lse = hn::Load(d, tile.lse + n * kLanes);
      const ptrdiff_t at = r * static_cast<ptrdiff_t>(kTileRows) + n * kLanes;
      if (modified) {
        if (p.softcap > 0) {
          const V tanh = hn::Tanh(d, x);
          hn::Store(hn::NegMulAdd(tanh, tanh, hn::Set(d, 1.0f)), d, ds_t + at);
          x = hn::Mul(tanh, hn::Set(d, p.softcap * kLog2e));
        }
        if (p.alibi_slopes) {
          const auto distance = hn::Sub(hn::Load(di, tile.position + n * kLanes), hn::Set(di, key + r));
          x = hn::NegMulAdd(hn::Load(d, tile.slope + n * kLanes), hn::Abs(hn::ConvertTo(d, distance)), x);
        }
      }
      x = exp2(d, hn::Sub(x, lse));
      if (masked) {
        const auto seen = is_visible(hn::Set(di, key + r), hn::Load(di, tile.lo + n * kLanes), hn::Load(di, tile.hi + n * kLanes));
        x = hn::IfThenElseZero(seen, x);
      }
      hn::Store(x, d, p_t + at);
    }
  }
}

// dS^T = P^T (dP^T - delta), times softcap's derivative.
template <int kVectors>
HWY_INLINE void score_gradients(const Params& p, const BackwardTile& tile, int key, bool masked, const V (&acc)[kRegisterRows][kVectors],
                                const float* p_t, float* ds_t) {
  const F d;
  const I di;
  TW_UNROLL
  for (int r = 0; r < kRegisterRows; ++r) {
    TW_UNROLL
    for (int n = 0; n < kVectors; ++n) {
      const ptrdiff_t at = r * static_cast<ptrdiff_t>(kTileRows) + n * kLanes;
      V x = hn::Mul(hn::Load(d, p_t + at), hn::Sub(acc[r][n], hn::Load(d, tile.delta + n * kLanes)));
      if (p.softcap > 0) x = hn::Mul(x, hn::Load(d, ds_t + at));
      if (masked) {
        const auto seen = is_visible(hn::Set(di, key + r), hn::Load(di, tile.lo + n * kLanes), hn::Load(di, tile.hi + n * kLanes));
        x = hn::IfThenElseZero(seen, x);
      }
      hn::Store(x, d, ds_t + at);
    }
  }
}

// C[key][dim] += sum over rows of w[key][row] * B[row][dim], for `vectors` vectors of dims.
template <int kVectors>
HWY_INLINE void add_rows_part(const float* w, const float* b, int ld, int rows, int keys, float* c) {
  const F d;
  for (int j = 0; j < keys; j += kRegisterRows) {
    V acc[kRegisterRows][kVectors];
    clear(acc);
    multiply<kRegisterRows, kVectors, false>(w + j * static_cast<ptrdiff_t>(kTileRows), kTileRows, b, ld, rows, acc);
    TW_UNROLL
    for (int r = 0; r < kRegisterRows; ++r) {
      TW_UNROLL
      for (int n = 0; n < kVectors; ++n) {
        float* at = c + (j + r) * static_cast<ptrdiff_t>(ld) + n * kLanes;
        hn::Store(hn::Add(hn::Load(d, at), acc[r][n]), d, at);
      }
    }
  }
}
void add_rows(const float* w, const float* b, int ld, int dim, int rows, int keys, float* c) {
  for (int left = ceil_div(dim, kLanes); left > 0;) {
    const int n = left == 4 ? 2 : min_of(left, 3);
    const auto part = n == 1 ? add_rows_part<1> : n == 2 ? add_rows_part<2> : add_rows_part<3>;
    part(w, b, ld, rows, keys, c);
    b += n * kLanes;
    c += n * kLanes;
    left -= n;
  }
}
// The same for visible pairs only, where B holds a NaN or an infinity and the tile has hidden pairs.
void add_visible_rows(const RowTile& tile, const float* w, const float* b, int ld, int dim, int n0, int keys, float* c) {
  const F d;
  for (int j = 0; j < keys; ++j) {
    for (int e = 0; e < dim; e += kLanes) {
      V acc = hn::Zero(d);
      for (int r = 0; r < tile.count; ++r) {
        if (n0 + j < tile.lo[r] || n0 + j >= tile.hi[r]) continue;
        acc =
            hn::MulAdd(hn::Set(d, w[j * static_cast<ptrdiff_t>(kTileRows) + r]), hn::LoadU(d, b + r * static_cast<ptrdiff_t>(ld) + e), acc);
      }
      float* at = c + j * static_cast<ptrdiff_t>(ld) + e;
      hn::StoreU(hn::Add(hn::LoadU(d, at), acc), d, at);
    }
  }
}

struct KeyBlock {
  float *k, *v, *dk, *dv;
  int n0, n1;    // keys [n0, n1) of the sequence
  bool tainted;  // a NaN or an infinity in K
};

struct RowData {
  float *q, *do_, *q_t, *do_t, *p_t, *ds_t;
};

// Everything that one tile of rows gives to and takes from the keys [n0, n1) of the block.
template <int kVectors>
void differentiate(const Params& p, const Layout& at, const BackwardTile& tile, const KeyBlock& block, int n0, int n1, const RowData& x,
                   float* dq_t) {
  const F d;
  const int keys = n1 - n0;
  // Keys are taken in full groups: those of the block past n1 must count as hidden.
  const bool masked = n0 < tile.full_begin || min_of(n0 + round_up(keys, kRegisterRows), block.n1) > tile.full_end;
  const bool modified = p.softcap > 0 || p.alibi_slopes;
  const ptrdiff_t k_at = (n0 - block.n0) * static_cast<ptrdiff_t>(at.ldk), v_at = (n0 - block.n0) * static_cast<ptrdiff_t>(at.ldv);
  for (int j = 0; j < keys; j += kRegisterRows) {
    const ptrdiff_t to = j * static_cast<ptrdiff_t>(kTileRows);
    V acc[kRegisterRows][kVectors];
    clear(acc);
    multiply<kRegisterRows, kVectors, false>(block.k + k_at + j * static_cast<ptrdiff_t>(at.ldk), at.ldk, x.q_t, kTileRows, p.head_dim,
                                             acc);
    probabilities(p, tile, n0 + j, modified, masked, acc, x.p_t + to, x.ds_t + to);
    clear(acc);
    multiply<kRegisterRows, kVectors, false>(block.v + v_at + j * static_cast<ptrdiff_t>(at.ldv), at.ldv, x.do_t, kTileRows, p.head_dim_v,
                                             acc);
    score_gradients(p, tile, n0 + j, masked, acc, x.p_t + to, x.ds_t + to);
  }
  if (masked && tile.tainted) {
    add_visible_rows(tile, x.p_t, x.do_, at.ldv, p.head_dim_v, n0, keys, block.dv + v_at);
    add_visible_rows(tile, x.ds_t, x.q, at.ldk, p.head_dim, n0, keys, block.dk + k_at);
  } else {
    add_rows(x.p_t, x.do_, at.ldv, p.head_dim_v, tile.count, keys, block.dv + v_at);
    add_rows(x.ds_t, x.q, at.ldk, p.head_dim, tile.count, keys, block.dk + k_at);
  }
  V one[kVectors];
  TW_UNROLL
  for (int n = 0; n < kVectors; ++n) one[n] = hn::Set(d, 1.0f);
  if (masked && block.tainted) {
    add_visible(tile, block.k + k_at, at.ldk, x.ds_t, at.dims_k, n0, keys, one, dq_t);
  } else {
    add_product(block.k + k_at, at.ldk, x.ds_t, at.dims_k, keys, one, dq_t);
  }
}

void load_rows(const Group& g, const Layout& at, int64_t row0, const RowData& x, BackwardTile& tile) {
  describe_rows(g, row0, g.rows, tile);
  for (int r = 0; r < kTileRows; ++r) {
    tile.lse[r] = kInfinity;
    tile.delta[r] = 0;
    if (r >= tile.count) continue;
    const QueryHead row = query_head_of_row(row0 + r, g.p.group);
    const float lse = lse_of(g, row);
    tile.delta[r] = *delta_of(g, row);
    if (lse != -kInfinity) {
      tile.lse[r] = lse * kLog2e;
    } else {  // all scores were -inf: nothing of this row may meet a NaN or an infinity
      tile.lo[r] = tile.hi[r] = 0;
      tile.full_end = 0;
    }
  }
  const bool tainted_q = pack_rows(g, g.p.q, g.p.head_dim, tile, query_factor(g.p), at.ldk, x.q, x.q_t);
  const bool tainted_do = pack_rows(g, g.p.do_, g.p.head_dim_v, tile, 1.0f, at.ldv, x.do_, x.do_t);
  tile.tainted = tainted_q || tainted_do;
}

void clear_floats(float* at, int64_t floats) { memset(at, 0, static_cast<size_t>(floats) * sizeof(float)); }

void add_floats(const float* from, int64_t floats, float* to) {
  const F d;
  for (int64_t i = 0; i < floats; i += kLanes) hn::Store(hn::Add(hn::Load(d, to + i), hn::Load(d, from + i)), d, to + i);
}

// Tiles of rows that see one of the keys [n0, n1).
struct TileRange {
  int64_t begin, end;
};
TileRange tiles_that_see(const Group& g, int n0, int n1) {
  const int64_t row_begin = static_cast<int64_t>(first_query(g.mask, n0)) * g.p.group;
  const int64_t row_end = static_cast<int64_t>(end_query(g.mask, n1 - 1)) * g.p.group;
  return {row_begin / kTileRows, ceil_div<int64_t>(row_end, kTileRows)};
}

// n elements of a sum times factor: a row of the user's gradient, or added to one of float32.
void write_gradient(const Group& g, float* sum, int n, float factor, const Tensor& to, int64_t row, int head) {
  if (g.p.accumulate) {
    float* at = row_of<float>(to, g.batch_index, row, head);
    for (int i = 0; i < n; ++i) at[i] += factor * sum[i];
    return;
  }
  with_element(g.p.element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    store_scaled_row(sum, n, factor, row_of<T>(to, g.batch_index, row, head));
  });
}

// dK and dV of the keys [n0, n1).
void store_keys(const Group& g, const Layout& at, const KeyBlock& block) {
  // dK was summed over Q as it was packed, with query_factor in it.
  const float factor = g.p.softcap > 0 ? g.p.softcap : kLn2;
  for (int j = block.n0; j < block.n1; ++j) {
    const ptrdiff_t i = j - block.n0;
    write_gradient(g, block.dk + i * at.ldk, g.p.head_dim, factor, g.p.dk, g.seq.k_row + j, g.kv_head);
    write_gradient(g, block.dv + i * at.ldv, g.p.head_dim_v, 1.0f, g.p.dv, g.seq.k_row + j, g.kv_head);
  }
}

}  // namespace

size_t backward_scratch(const Params& p) { return Layout(p).bytes; }

void backward_delta(const Params& p, int b, int kv_head, int64_t t) {
  const FlushSubnormals guard;
  const Group g(p, b, kv_head);
  const F d;
  for (int64_t row = t * kTileRows; row < g.rows && row < (t + 1) * kTileRows; ++row) {
    const QueryHead at = query_head_of_row(row, p.group);
    V sum = hn::Zero(d);
    with_element(p.element, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* o = row_of<const T>(p.o, b, g.seq.q_row + at.query, g.head(at));
      const T* grad = row_of<const T>(p.do_, b, g.seq.q_row + at.query, g.head(at));
      int i = 0;
      for (; i + kLanes <= p.head_dim_v; i += kLanes) sum = hn::MulAdd(load_vector(d, o + i), load_vector(d, grad + i), sum);
      if (i < p.head_dim_v) {
        T tail_o[kLanes] = {}, tail_grad[kLanes] = {};
        memcpy(tail_o, o + i, static_cast<size_t>(p.head_dim_v - i) * sizeof(T));
        memcpy(tail_grad, grad + i, static_cast<size_t>(p.head_dim_v - i) * sizeof(T));
        sum = hn::MulAdd(load_vector(d, tail_o), load_vector(d, tail_grad), sum);
      }
    });
    const float dlse = p.dlse.data ? p.dlse.data[b * p.dlse.batch + g.head(at) * p.dlse.head + g.seq.q_row + at.query] : 0.0f;
    *delta_of(g, at) = hn::GetLane(hn::SumOfLanes(d, sum)) - dlse;
  }
}

void backward_item(const Params& p, int b, int kv_head, int block_begin, int block_end, void* scratch) {
  const FlushSubnormals guard;
  const Group g(p, b, kv_head);
  const Layout at(p);
  char* base = static_cast<char*>(scratch);
  const auto floats = [base](size_t offset) { return reinterpret_cast<float*>(base + offset); };
  BackwardTile& tile = *reinterpret_cast<BackwardTile*>(base);
  const RowData x{floats(at.q), floats(at.do_), floats(at.q_t), floats(at.do_t), floats(at.p), floats(at.ds)};
  KeyBlock block{floats(at.k), floats(at.v), floats(at.dk), floats(at.dv), 0, 0, false};
  float* dq_t = floats(at.dq);
  const int64_t dq_floats = static_cast<int64_t>(at.dims_k) * kTileRows;

  if (block_begin == 0) {  // keys past seqused_k take no part: their gradients are 0
    const Sequence whole = sequence_of(b, p.seqlen_q, p.seqlen_k, p.cu_seqlens_q, p.cu_seqlens_k, nullptr);
    clear_floats(block.dk, at.ldk);
    clear_floats(block.dv, at.ldv);
    for (block.n0 = g.seq.seqlen_k; block.n0 < whole.seqlen_k; block.n0 = block.n1) {
      block.n1 = block.n0 + 1;
      store_keys(g, at, block);
    }
    clear_floats(dq_tile(g, 0, 0), ceil_div<int64_t>(g.rows, kTileRows) * dq_floats);
  }

  for (int i = block_begin; i < block_end && i * static_cast<int64_t>(p.tile.block_n) < g.seq.seqlen_k; ++i) {
    block.n0 = i * p.tile.block_n;
    block.n1 = min_of(block.n0 + p.tile.block_n, g.seq.seqlen_k);
    block.tainted = pack_keys(g, p.k, p.head_dim, block.n0, block.n1, at.ldk, block.k);
    pack_keys(g, p.v, p.head_dim_v, block.n0, block.n1, at.ldv, block.v);
    clear_floats(block.dk, static_cast<int64_t>(block.n1 - block.n0) * at.ldk);
    clear_floats(block.dv, static_cast<int64_t>(block.n1 - block.n0) * at.ldv);
    const TileRange tiles = tiles_that_see(g, block.n0, block.n1);
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
      load_rows(g, at, t * kTileRows, x, tile);
      clear_floats(dq_t, dq_floats);
      const auto step = tile.vectors == 1 ? differentiate<1> : tile.vectors == 2 ? differentiate<2> : differentiate<3>;
      for (int n = block.n0; n < block.n1; n += p.tile.tile_n) {
        // In whole groups of keys from the block's first, since a group's dK and dV are written together.
        const int skipped = max_of(tile.first_key - n, 0) / kRegisterRows * kRegisterRows;
        const int n0 = n + skipped, n1 = min_of(min_of(n + p.tile.tile_n, block.n1), tile.end_key);
        if (n0 < n1) step(p, at, tile, block, n0, n1, x, dq_t);
      }
      if (p.blocks_at_once == 1) {
        add_floats(dq_t, dq_floats, dq_tile(g, 0, t));
      } else {
        memcpy(dq_tile(g, 1 + i % p.blocks_at_once, t), dq_t, static_cast<size_t>(dq_floats) * sizeof(float));
      }
    }
    store_keys(g, at, block);
  }
}

void backward_add(const Params& p, int b, int kv_head, int64_t t, int block_begin) {
  const FlushSubnormals guard;
  const Group g(p, b, kv_head);
  if (t * kTileRows >= g.rows) return;
  for (int i = block_begin; i < block_begin + p.blocks_at_once && i * static_cast<int64_t>(p.tile.block_n) < g.seq.seqlen_k; ++i) {
    const int n0 = i * p.tile.block_n;
    const TileRange tiles = tiles_that_see(g, n0, min_of(n0 + p.tile.block_n, g.seq.seqlen_k));
    if (t < tiles.begin || t >= tiles.end) continue;
    add_floats(dq_tile(g, 1 + i % p.blocks_at_once, t), static_cast<int64_t>(round_up(p.head_dim, 8)) * kTileRows, dq_tile(g, 0, t));
  }
}

void backward_dq(const Params& p, int b, int kv_head, int64_t t, void* scratch) {
  const FlushSubnormals guard;
  const Group g(p, b, kv_head);
  const Layout at(p);
  float* rows = static_cast<float*>(scratch);
  const float* sum = dq_tile(g, 0, t);
  const int count = static_cast<int>(g.rows - t * kTileRows < kTileRows ? g.rows - t * kTileRows : kTileRows);
  for (int r = 0; r < count; r += 4) {
    for (int c = 0; c < p.head_dim; c += 4) transpose4x4(sum + c * static_cast<ptrdiff_t>(kTileRows) + r, kTileRows, rows + c, at.ldk);
    for (int i = 0; i < min_of(4, count - r); ++i) {
      const QueryHead row = query_head_of_row(t * kTileRows + r + i, p.group);
      write_gradient(g, rows + i * static_cast<ptrdiff_t>(at.ldk), p.head_dim, p.scale, p.dq, g.seq.q_row + row.query, g.head(row));
    }
  }
}

}  // namespace tilewise::cpu::TW_ISA
HWY_AFTER_NAMESPACE();
