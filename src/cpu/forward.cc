// Attention forward on one core: a block of query rows stays on the desk (L2) while the keys it sees pass by, tile by
// tile; scores never leave the near cache (L1). Compiled once per instruction set.
//
// Rows lie in lanes, so S^T = K Q^T and O^T = V^T P^T read K and V as they are, and maximum, sum and rescaling are
// vertical: a row's result is the same whatever else its tile holds. One tile of keys after the other:
//   S^T[key][row]  scores in units of log2, since Q was multiplied by softmax_scale * log2(e)
//   m, l           running maximum and sum of each row; alpha = 2^(m_old - m_new) corrects what was summed before
//   O^T[dim][row]  = alpha * O^T + V^T P^T
#include <cmath>
#include <type_traits>

#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tilewise::cpu::TW_ISA {
namespace {

// A tile of up to kTileRows query rows and everything that is known of each.
struct RowTile {
  int count, vectors;
  int first_key, end_key;    // keys that any row sees
  int full_begin, full_end;  // keys that every row sees
  alignas(64) float m[kTileRows];
  alignas(64) float l[kTileRows];
  alignas(64) float slope[kTileRows];   // ALiBi, in units of log2
  alignas(64) int position[kTileRows];  // query + offset
  alignas(64) int lo[kTileRows];        // visible keys of each row: [lo, hi)
  alignas(64) int hi[kTileRows];
};

struct Layout {
  int ldk, ldv, dim_rows;  // row lengths of the packed K and V; rows of O^T
  size_t q, o, k, v, s, out, bytes;

  explicit Layout(const Params& p) {
    const size_t tiles = ceil_div(p.tile.block_m, kTileRows);
    ldk = round_up(p.head_dim, kLanes);
    ldv = round_up(p.head_dim_v, 16);
    dim_rows = round_up(p.head_dim_v, 8);
    size_t at = round_up(tiles * sizeof(RowTile), size_t{64});
    const auto take = [&at](size_t floats) {
      const size_t begin = at;
      at += round_up(floats * sizeof(float), size_t{64});
      return begin;
    };
    q = take(tiles * static_cast<size_t>(round_up(p.head_dim, 4)) * kTileRows);
    o = take(tiles * static_cast<size_t>(dim_rows) * kTileRows);
    k = take(static_cast<size_t>(p.tile.block_n + kRegisterRows) * static_cast<size_t>(ldk));  // the last rows are read as a group
    v = take(static_cast<size_t>(p.tile.block_n) * static_cast<size_t>(ldv));
    s = take(static_cast<size_t>(round_up(p.tile.block_n, 8)) * kTileRows);
    out = take(4 * static_cast<size_t>(round_up(max_of(p.head_dim, p.head_dim_v), 16)));
    bytes = at;
  }
};

// Q^T of the rows [row0, row0 + tile.count), scaled; lanes past the end are zero.
void pack_queries(const Params& p, const Sequence& seq, int b, int kv_head, int64_t row0, const RowTile& tile, float factor, float* rows4,
                  float* q_t) {
  const int dims = round_up(p.head_dim, 4), ld = round_up(p.head_dim, 16);
  for (int r = 0; r < tile.vectors * kLanes; r += 4) {
    for (int i = 0; i < 4; ++i) {
      float* to = rows4 + i * ld;
      if (r + i < tile.count) {
        const QueryHead at = query_head_of_row(row0 + r + i, p.group);
        with_element(p.element, [&](auto* type) {
          using T = std::remove_pointer_t<decltype(type)>;
          load_row(row_of<const T>(p.q, b, seq.q_row + at.query, kv_head * p.group + at.head), p.head_dim, factor, to);
        });
      } else {
        memset(to, 0, static_cast<size_t>(ld) * sizeof(float));
      }
    }
    for (int c = 0; c < dims; c += 4) transpose4x4(rows4 + c, ld, q_t + c * kTileRows + r, kTileRows);
  }
}

// The keys [n0, n1) of K or V as float32 rows. True where one of them holds a NaN or an infinity.
bool pack_keys(const Params& p, const Tensor& from, int64_t k_row, int b, int kv_head, int dim, int n0, int n1, int ld, float* to) {
  V taint = hn::Zero(F());
  with_element(p.element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int j = n0; j < n1; ++j) {
      taint = hn::Add(taint, load_row(row_of<const T>(from, b, k_row + j, kv_head), dim, 1.0f, to + (j - n0) * static_cast<ptrdiff_t>(ld)));
    }
  });
  return is_tainted(taint);
}

// S^T of `keys` keys; with_max: the block's maximum of each row too.
template <int kVectors>
void scores(const float* k, int ldk, const float* q_t, int head_dim, int keys, bool with_max, float* s, V (&top)[kVectors]) {
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
        for (int n = 0; n < kVectors; ++n) top[n] = hn::Max(acc[r][n], top[n]);
      }
    }
  }
}

// softcap, ALiBi and the mask, and the maximum of what is left. n0 is the key of row 0 of S^T.
template <int kVectors>
void modify(const Params& p, const RowTile& tile, int n0, int keys, bool masked, float* s, V (&top)[kVectors]) {
  const F d;
  const I di;
  for (int n = 0; n < kVectors; ++n) {
    const V slope = hn::Load(d, tile.slope + n * kLanes);
    const auto position = hn::Load(di, tile.position + n * kLanes);
    const auto lo = hn::Load(di, tile.lo + n * kLanes), hi = hn::Load(di, tile.hi + n * kLanes);
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
      top[n] = hn::Max(x, top[n]);
    }
  }
}

// S^T becomes P^T; m and l move on; gives back alpha.
template <int kVectors>
void softmax(RowTile& tile, int keys, float* s, const V (&top)[kVectors], V (&alpha)[kVectors]) {
  const F d;
  V shift[kVectors], sum[kVectors];
  TW_UNROLL
  for (int n = 0; n < kVectors; ++n) {
    const V m_old = hn::Load(d, tile.m + n * kLanes);
    const V m = hn::Max(top[n], m_old);
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

// O^T = alpha * O^T + V^T P^T. The tile's own sum starts at zero, so rounding errors do not grow with the sequence.
template <int kVectors>
void add_values(const float* v, int ldv, const float* p_t, int dim_rows, int keys, const V (&alpha)[kVectors], float* o_t) {
  const F d;
  for (int c = 0; c < dim_rows; c += kRegisterRows) {
    V acc[kRegisterRows][kVectors];
    clear(acc);
    multiply<kRegisterRows, kVectors, true>(v + c, ldv, p_t, kTileRows, keys, acc);
    TW_UNROLL
    for (int r = 0; r < kRegisterRows; ++r) {
      TW_UNROLL
      for (int n = 0; n < kVectors; ++n) {
        float* at = o_t + (c + r) * kTileRows + n * kLanes;
        hn::Store(hn::MulAdd(hn::Load(d, at), alpha[n], acc[r][n]), d, at);
      }
    }
  }
}

// The same where V holds a NaN or an infinity and the tile has hidden pairs, whose p = 0 must not meet it.
template <int kVectors>
void add_visible_values(const RowTile& tile, const float* v, int ldv, const float* p_t, int dim_rows, int n0, int keys,
                        const V (&alpha)[kVectors], float* o_t) {
  const F d;
  const I di;
  for (int n = 0; n < kVectors; ++n) {
    const auto lo = hn::Load(di, tile.lo + n * kLanes), hi = hn::Load(di, tile.hi + n * kLanes);
    for (int c = 0; c < dim_rows; ++c) {
      V acc = hn::Zero(d);
      for (int j = 0; j < keys; ++j) {
        const auto key = hn::Set(di, n0 + j);
        const V x = hn::MulAdd(hn::Set(d, v[j * static_cast<ptrdiff_t>(ldv) + c]), hn::Load(d, p_t + j * kTileRows + n * kLanes), acc);
        acc = hn::IfThenElse(is_visible(key, lo, hi), x, acc);
      }
      float* at = o_t + c * kTileRows + n * kLanes;
      hn::Store(hn::MulAdd(hn::Load(d, at), alpha[n], acc), d, at);
    }
  }
}

struct KeyTile {
  const float *k, *v;
  int ldk, ldv, n0, n1;  // keys [n0, n1) of the sequence
  bool tainted_v;
};

template <int kVectors>
void attend(const Params& p, RowTile& tile, const KeyTile& kv, int dim_rows, const float* q_t, float* s, float* o_t) {
  const F d;
  const int n0 = max_of(kv.n0, tile.first_key), n1 = min_of(kv.n1, tile.end_key), keys = n1 - n0;
  if (keys <= 0) return;
  const bool masked = n0 < tile.full_begin || n1 > tile.full_end;
  const bool modified = masked || p.softcap > 0 || p.alibi_slopes;
  V top[kVectors], alpha[kVectors];
  TW_UNROLL
  for (int n = 0; n < kVectors; ++n) top[n] = hn::Set(d, -kInfinity);
  const float* v = kv.v + (n0 - kv.n0) * static_cast<ptrdiff_t>(kv.ldv);
  scores(kv.k + (n0 - kv.n0) * static_cast<ptrdiff_t>(kv.ldk), kv.ldk, q_t, p.head_dim, keys, !modified, s, top);
  if (modified) modify(p, tile, n0, keys, masked, s, top);
  softmax(tile, keys, s, top, alpha);
  if (masked && kv.tainted_v) {
    add_visible_values(tile, v, kv.ldv, s, dim_rows, n0, keys, alpha, o_t);
  } else {
    add_values(v, kv.ldv, s, dim_rows, keys, alpha, o_t);
  }
}

void describe_rows(const Params& p, const Band& mask, int b, int kv_head, int64_t row0, int count, RowTile& tile) {
  tile.count = count;
  tile.vectors = ceil_div(count, kLanes);
  for (int r = 0; r < kTileRows; ++r) {
    // Lanes past the end see nothing and are never stored; they take the last row's place in the arithmetic of bounds.
    const QueryHead at = query_head_of_row(row0 + min_of(r, count - 1), p.group);
    const int head = kv_head * p.group + at.head;
    tile.lo[r] = r < count ? first_key(mask, at.query) : 0;
    tile.hi[r] = r < count ? end_key(mask, at.query) : 0;
    tile.position[r] = at.query + mask.offset;
    tile.slope[r] = p.alibi_slopes ? p.alibi_slopes[b * p.alibi_batch + head] * kLog2e : 0;
    // The sink is a logit without a value: the state starts as if it had been seen.
    const float sink = p.sink ? p.sink[head] * kLog2e : -kInfinity;
    tile.m[r] = sink;
    tile.l[r] = sink == -kInfinity ? 0.0f : 1.0f;
  }
  tile.first_key = tile.lo[0];
  tile.end_key = tile.hi[count - 1];
  tile.full_begin = tile.lo[count - 1];
  tile.full_end = tile.hi[0];
}

// O and lse of the tile's rows, from O^T, m and l.
void finish_rows(const Params& p, const Sequence& seq, int b, int kv_head, int64_t row0, const RowTile& tile, const float* o_t,
                 float* rows4) {
  const int dims = round_up(p.head_dim_v, 4), ld = round_up(p.head_dim_v, 16);
  const F4 d4;
  for (int r = 0; r < tile.count; r += 4) {
    for (int c = 0; c < dims; c += 4) transpose4x4(o_t + c * kTileRows + r, kTileRows, rows4 + c, ld);
    for (int i = 0; i < min_of(4, tile.count - r); ++i) {
      const QueryHead at = query_head_of_row(row0 + r + i, p.group);
      const int head = kv_head * p.group + at.head;
      const float m = tile.m[r + i], l = tile.l[r + i];
      const bool empty = l == 0.0f;
      float* row = rows4 + i * ld;
      // + 0 turns -0 into 0: which tiles of hidden keys were added must not show.
      const auto inverse = hn::Set(d4, empty ? 0.0f : 1.0f / l), zero = hn::Zero(d4);
      for (int c = 0; c < dims; c += 4) hn::StoreU(hn::MulAdd(hn::LoadU(d4, row + c), inverse, zero), d4, row + c);
      with_element(p.element, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        store_row(row, p.head_dim_v, row_of<T>(p.o, b, seq.q_row + at.query, head));
      });
      if (p.lse.data) {
        p.lse.data[b * p.lse.batch + head * p.lse.head + seq.q_row + at.query] =
            empty ? -kInfinity : static_cast<float>(static_cast<double>(m) * 0.69314718055994531 + static_cast<double>(logf(l)));
      }
    }
  }
}

}  // namespace

size_t forward_scratch(const Params& p) { return Layout(p).bytes; }

void forward_item(const Params& p, int b, int kv_head, int64_t m_block, void* scratch) {
  const Sequence seq = sequence(p, b);
  const Band mask = band(p, seq);
  const int64_t row_begin = m_block * p.tile.block_m;
  const int64_t row_end = row_begin + p.tile.block_m < static_cast<int64_t>(seq.seqlen_q) * p.group
                              ? row_begin + p.tile.block_m
                              : static_cast<int64_t>(seq.seqlen_q) * p.group;
  if (row_begin >= row_end) return;

  const FlushSubnormals guard;
  const Layout at(p);
  char* base = static_cast<char*>(scratch);
  RowTile* tiles = reinterpret_cast<RowTile*>(base);
  float* q_t = reinterpret_cast<float*>(base + at.q);
  float* o_t = reinterpret_cast<float*>(base + at.o);
  float* k = reinterpret_cast<float*>(base + at.k);
  float* v = reinterpret_cast<float*>(base + at.v);
  float* s = reinterpret_cast<float*>(base + at.s);
  float* rows4 = reinterpret_cast<float*>(base + at.out);
  const ptrdiff_t q_tile = static_cast<ptrdiff_t>(round_up(p.head_dim, 4)) * kTileRows;
  const ptrdiff_t o_tile = static_cast<ptrdiff_t>(at.dim_rows) * kTileRows;
  const int num_tiles = static_cast<int>((row_end - row_begin + kTileRows - 1) / kTileRows);
  const float factor = p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2e;

  for (int t = 0; t < num_tiles; ++t) {
    const int64_t row0 = row_begin + t * kTileRows;
    const int count = row_end - row0 < kTileRows ? static_cast<int>(row_end - row0) : kTileRows;
    describe_rows(p, mask, b, kv_head, row0, count, tiles[t]);
    pack_queries(p, seq, b, kv_head, row0, tiles[t], factor, rows4, q_t + t * q_tile);
    memset(o_t + t * o_tile, 0, static_cast<size_t>(o_tile) * sizeof(float));
  }

  const int first = tiles[0].first_key, end = tiles[num_tiles - 1].end_key;
  for (int n = first / p.tile.block_n; n * p.tile.block_n < end; ++n) {
    const int n0 = max_of(n * p.tile.block_n, first), n1 = min_of((n + 1) * p.tile.block_n, end);
    if (n0 >= n1) continue;
    pack_keys(p, p.k, seq.k_row, b, kv_head, p.head_dim, n0, n1, at.ldk, k);
    const bool tainted_v = pack_keys(p, p.v, seq.k_row, b, kv_head, p.head_dim_v, n0, n1, at.ldv, v);
    const KeyTile kv{k, v, at.ldk, at.ldv, n0, n1, tainted_v};
    for (int t = 0; t < num_tiles; ++t) {
      switch (tiles[t].vectors) {
        case 1:
          attend<1>(p, tiles[t], kv, at.dim_rows, q_t + t * q_tile, s, o_t + t * o_tile);
          break;
        case 2:
          attend<2>(p, tiles[t], kv, at.dim_rows, q_t + t * q_tile, s, o_t + t * o_tile);
          break;
        default:
          attend<3>(p, tiles[t], kv, at.dim_rows, q_t + t * q_tile, s, o_t + t * o_tile);
      }
    }
  }

  for (int t = 0; t < num_tiles; ++t) finish_rows(p, seq, b, kv_head, row_begin + t * kTileRows, tiles[t], o_t + t * o_tile, rows4);
}

}  // namespace tilewise::cpu::TW_ISA
HWY_AFTER_NAMESPACE();
