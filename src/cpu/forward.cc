// Attention forward on one core: a block of query rows stays on the desk (L2) while the keys it sees pass by, tile by
// tile; scores never leave the near cache (L1). Compiled once per instruction set.
//
// Rows lie in lanes, so S^T = K Q^T and O^T = V^T P^T read K and V as they are, and maximum, sum and rescaling are
// vertical: a row's result is the same whatever else its tile holds. One tile of keys after the other:
//   S^T[key][row]  scores in units of log2, since Q was multiplied by softmax_scale * log2(e)
//   m, l           running maximum and sum of each row; alpha = 2^(m_old - m_new) corrects what was summed before
//   O^T[dim][row]  = alpha * O^T + V^T P^T
#include <cmath>

#include "cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tilewise::cpu::TW_ISA {
namespace {

struct ForwardTile : RowTile {
  alignas(64) float m[kTileRows];
  alignas(64) float l[kTileRows];
  // The maximum over the tile of keys in work. In memory: held in registers, it would drive a register tile out of them.
  alignas(64) float top[kTileRows];
};

struct Layout {
  int ldk, ldv, dims_v;  // row lengths of packed K and V; rows of O^T
  int64_t q_tile, o_tile;
  size_t q, o, k, v, s, rows, bytes;

  explicit Layout(const Params& p) {
    const int64_t tiles = ceil_div(p.tile.block_m, kTileRows);
    ldk = round_up(p.head_dim, 16);
    ldv = round_up(p.head_dim_v, 16);
    dims_v = round_up(p.head_dim_v, 8);
    q_tile = static_cast<int64_t>(round_up(p.head_dim, 4)) * kTileRows;
    o_tile = static_cast<int64_t>(dims_v) * kTileRows;
    Carver carve(static_cast<size_t>(tiles) * sizeof(ForwardTile));
    q = carve.take(tiles * q_tile);
    o = carve.take(tiles * o_tile);
    k = carve.take(static_cast<int64_t>(p.tile.block_n + kRegisterRows) * ldk);  // the last keys are read as a full group
    v = carve.take(static_cast<int64_t>(p.tile.block_n) * ldv);
    s = carve.take(static_cast<int64_t>(p.tile.block_n + kRegisterRows) * kTileRows);
    rows = carve.take(static_cast<int64_t>(kTileRows) * max_of(ldk, ldv));
    bytes = carve.bytes();
  }
};

// S^T of `keys` keys; with_max: the block's maximum of each row too.
template <int kVectors>
void scores(const float* k, int ldk, const float* q_t, int head_dim, int keys, bool with_max, float* s, float* top) {
  const F d;
  for (int j = 0; j < keys; j += kRegisterRows) {
    V acc[kRegisterRows][kVectors];
    clear(acc);
    multiply<kRegisterRows, kVectors, false>(k + j * static_cast<ptrdiff_t>(ldk), ldk, q_t, kTileRows, head_dim, acc);
    TW_UNROLL
    for (int r = 0; r < kRegisterRows; ++r) {
      TW_UNROLL
      for (int n = 0; n < kVectors; ++n) hn::Store(acc[r][n], d, s + (j + r) * kTileRows + n * kLanes);
      if (with_max && j + r < keys) {
        TW_UNROLL
        for (int n = 0; n < kVectors; ++n) hn::Store(hn::Max(acc[r][n], hn::Load(d, top + n * kLanes)), d, top + n * kLanes);
      }
    }
  }
}

// softcap, ALiBi and the mask, and the maximum of what is left. n0 is the key of row 0 of S^T.
template <int kVectors>
void modify(const Params& p, ForwardTile& tile, int n0, int keys, bool masked, float* s) {
  const F d;
  const I di;
  for (int n = 0; n < kVectors; ++n) {
    const V slope = hn::Load(d, tile.slope + n * kLanes);
    const auto position = hn::Load(di, tile.position + n * kLanes);
    const auto lo = hn::Load(di, tile.lo + n * kLanes), hi = hn::Load(di, tile.hi + n * kLanes);
    V top = hn::Load(d, tile.top + n * kLanes);
    for (int j = 0; j < keys; ++j) {
      const auto key = hn::Set(di, n0 + j);
      float* at = s + j * kTileRows + n * kLanes;
      V x = hn::Load(d, at);
      if (p.softcap > 0) x = hn::Mul(hn::Tanh(d, x), hn::Set(d, p.softcap * kLog2e));
      if (p.alibi_slopes) x = hn::NegMulAdd(slope, hn::Abs(hn::ConvertTo(d, hn::Sub(position, key))), x);
      if (masked) {
        x = hn::IfThenElse(is_visible(key, lo, hi), x, hn::Set(d, -kInfinity));
      }
      hn::Store(x, d, at);
      top = hn::Max(x, top);
    }
    hn::Store(top, d, tile.top + n * kLanes);
  }
}

// S^T becomes P^T; m and l move on; gives back alpha.
template <int kVectors>
void softmax(ForwardTile& tile, int keys, float* s, V (&alpha)[kVectors]) {
  const F d;
  V shift[kVectors], sum[kVectors];
  TW_UNROLL
  for (int n = 0; n < kVectors; ++n) {
    const V m_old = hn::Load(d, tile.m + n * kLanes);
    const V m = hn::Max(hn::Load(d, tile.top + n * kLanes), m_old);
    // A row that has seen nothing yet keeps p = 0 and alpha = 0 with any finite shift.
    shift[n] = hn::IfThenElse(hn::Eq(m, hn::Set(d, -kInfinity)), hn::Zero(d), m);
    alpha[n] = exp2(d, hn::Sub(m_old, shift[n]));
    sum[n] = hn::Zero(d);
    hn::Store(m, d, tile.m + n * kLanes);
  }
  for (int j = 0; j < keys; ++j) {
    TW_UNROLL
    for (int n = 0; n < kVectors; ++n) {
      float* at = s + j * kTileRows + n * kLanes;
      const V x = exp2(d, hn::Sub(hn::Load(d, at), shift[n]));
      sum[n] = hn::Add(sum[n], x);
      hn::Store(x, d, at);
    }
  }
  TW_UNROLL
  for (int n = 0; n < kVectors; ++n) {
    float* l = tile.l + n * kLanes;
    hn::Store(hn::MulAdd(hn::Load(d, l), alpha[n], sum[n]), d, l);
  }
}

struct KeyTile {
  const float *k, *v;
  int ldk, ldv, n0, n1;  // keys [n0, n1) of the sequence
  bool tainted_v;
};

template <int kVectors>
void attend(const Params& p, ForwardTile& tile, const KeyTile& kv, int dims_v, const float* q_t, float* s, float* o_t) {
  const F d;
  const int n0 = max_of(kv.n0, tile.first_key), n1 = min_of(kv.n1, tile.end_key), keys = n1 - n0;
  if (keys <= 0) return;
  const bool masked = n0 < tile.full_begin || n1 > tile.full_end;
  const bool modified = masked || p.softcap > 0 || p.alibi_slopes;
  const float* k = kv.k + (n0 - kv.n0) * static_cast<ptrdiff_t>(kv.ldk);
  const float* v = kv.v + (n0 - kv.n0) * static_cast<ptrdiff_t>(kv.ldv);
  V alpha[kVectors];
  TW_UNROLL
  for (int n = 0; n < kVectors; ++n) hn::Store(hn::Set(d, -kInfinity), d, tile.top + n * kLanes);
  scores<kVectors>(k, kv.ldk, q_t, p.head_dim, keys, !modified, s, tile.top);
  if (modified) modify<kVectors>(p, tile, n0, keys, masked, s);
  softmax(tile, keys, s, alpha);
  if (masked && kv.tainted_v) {
    add_visible(tile, v, kv.ldv, s, dims_v, n0, keys, alpha, o_t);
  } else {
    add_product(v, kv.ldv, s, dims_v, keys, alpha, o_t);
  }
}

// The state before the first key. A sink is a logit without a value: the row starts as if it had seen it.
void start_rows(const Group& g, ForwardTile& tile) {
  for (int r = 0; r < kTileRows; ++r) {
    const QueryHead at = query_head_of_row(tile.row0 + min_of(r, tile.count - 1), g.p.group);
    const float sink = g.p.sink ? g.p.sink[g.head(at)] * kLog2e : -kInfinity;
    tile.m[r] = sink;
    tile.l[r] = sink == -kInfinity ? 0.0f : 1.0f;
  }
}

// O and lse of the tile's rows, from O^T, m and l.
void finish_rows(const Group& g, const ForwardTile& tile, const float* o_t, int ld, float* rows) {
  const Params& p = g.p;
  for (int r = 0; r < tile.count; r += 4) {
    for (int c = 0; c < p.head_dim_v; c += 4) transpose4x4(o_t + c * static_cast<ptrdiff_t>(kTileRows) + r, kTileRows, rows + c, ld);
    for (int i = 0; i < min_of(4, tile.count - r); ++i) {
      const QueryHead at = query_head_of_row(tile.row0 + r + i, p.group);
      const float m = tile.m[r + i], l = tile.l[r + i];
      const bool unseen = tile.lo[r + i] >= tile.hi[r + i], empty = unseen || l == 0.0f;
      float* row = rows + i * static_cast<ptrdiff_t>(ld);
      if (empty) memset(row, 0, static_cast<size_t>(ld) * sizeof(float));  // p = 0 has met every v, an infinity too
      with_element(p.element, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        store_scaled_row(row, p.head_dim_v, empty ? 0.0f : 1.0f / l, row_of<T>(p.o, g.batch_index, g.seq.q_row + at.query, g.head(at)));
      });
      if (!p.lse.data) continue;
      float lse = empty ? -kInfinity : static_cast<float>(static_cast<double>(m) * 0.69314718055994531 + static_cast<double>(logf(l)));
      if (unseen && p.sink) lse = p.sink[g.head(at)];  // to the last bit
      p.lse.data[g.batch_index * p.lse.batch + g.head(at) * p.lse.head + g.seq.q_row + at.query] = lse;
    }
  }
}

}  // namespace

size_t forward_scratch(const Params& p) { return Layout(p).bytes; }

void forward_item(const Params& p, int b, int kv_head, int64_t m_block, void* scratch) {
  const Group g(p, b, kv_head);
  const int64_t row_begin = m_block * p.tile.block_m;
  const int64_t row_end = row_begin + p.tile.block_m < g.rows ? row_begin + p.tile.block_m : g.rows;
  if (row_begin >= row_end) return;

  const FlushSubnormals guard;
  const Layout at(p);
  char* base = static_cast<char*>(scratch);
  ForwardTile* tiles = reinterpret_cast<ForwardTile*>(base);
  float* q_t = reinterpret_cast<float*>(base + at.q);
  float* o_t = reinterpret_cast<float*>(base + at.o);
  float* k = reinterpret_cast<float*>(base + at.k);
  float* v = reinterpret_cast<float*>(base + at.v);
  float* s = reinterpret_cast<float*>(base + at.s);
  float* rows = reinterpret_cast<float*>(base + at.rows);
  const int num_tiles = static_cast<int>((row_end - row_begin + kTileRows - 1) / kTileRows);

  for (int t = 0; t < num_tiles; ++t) {
    describe_rows(g, row_begin + t * kTileRows, row_end, tiles[t]);
    start_rows(g, tiles[t]);
    pack_rows(g, p.q, p.head_dim, tiles[t], query_factor(p), at.ldk, rows, q_t + t * at.q_tile);
    memset(o_t + t * at.o_tile, 0, static_cast<size_t>(at.o_tile) * sizeof(float));
  }

  const int first = tiles[0].first_key, end = tiles[num_tiles - 1].end_key;
  for (int n = first / p.tile.block_n; n * p.tile.block_n < end; ++n) {
    const int n0 = max_of(n * p.tile.block_n, first), n1 = min_of((n + 1) * p.tile.block_n, end);
    pack_keys(g, p.k, p.head_dim, n0, n1, at.ldk, k);
    const bool tainted_v = pack_keys(g, p.v, p.head_dim_v, n0, n1, at.ldv, v);
    const KeyTile kv{k, v, at.ldk, at.ldv, n0, n1, tainted_v};
    for (int t = 0; t < num_tiles; ++t) {
      const auto attend_tile = tiles[t].vectors == 1 ? attend<1> : tiles[t].vectors == 2 ? attend<2> : attend<3>;
      attend_tile(p, tiles[t], kv, at.dims_v, q_t + t * at.q_tile, s, o_t + t * at.o_tile);
    }
  }

  for (int t = 0; t < num_tiles; ++t) finish_rows(g, tiles[t], o_t + t * at.o_tile, at.ldv, rows);
}

}  // namespace tilewise::cpu::TW_ISA
HWY_AFTER_NAMESPACE();
