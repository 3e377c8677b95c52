// A tile of query rows and how the user's tensors become one. Rows are (query, head) pairs of one key/value head, in order
// of queries, so that the heads of a group share every reading of K and V.
#pragma once

#include <type_traits>

#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tilewise::cpu::TW_ISA {
namespace {

// Up to kTileRows query rows and what the mask and ALiBi say of each.
struct RowTile {
  int64_t row0;  // first row within the group
  int count, vectors;
  int first_key, end_key;               // keys that any row sees
  int full_begin, full_end;             // keys that every row sees
  alignas(64) float slope[kTileRows];   // ALiBi, in units of log2
  alignas(64) int position[kTileRows];  // query + offset
  alignas(64) int lo[kTileRows];        // visible keys of each row: [lo, hi)
  alignas(64) int hi[kTileRows];
};

// One (sequence, key/value head) of the problem.
struct Group {
  const Params& p;
  int batch_index, kv_head;
  Sequence seq;
  Band mask;
  int64_t rows;  // (query, head) pairs

  Group(const Params& params, int b, int head)
      : p(params),
        batch_index(b),
        kv_head(head),
        seq(sequence(params, b)),
        mask(band(params, seq)),
        rows(static_cast<int64_t>(seq.seqlen_q) * params.group) {}
  int head(const QueryHead& at) const { return kv_head * p.group + at.head; }
};

// Q times this gives scores in units of log2, or the argument of softcap's tanh.
inline float query_factor(const Params& p) { return p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2e; }

inline void describe_rows(const Group& g, int64_t row0, int64_t row_end, RowTile& tile) {
  const int count = row_end - row0 < kTileRows ? static_cast<int>(row_end - row0) : kTileRows;
  tile.row0 = row0;
  tile.count = count;
  tile.vectors = ceil_div(count, kLanes);
  for (int r = 0; r < kTileRows; ++r) {
    // Lanes past the end see nothing and are never stored.
    const QueryHead at = query_head_of_row(row0 + min_of(r, count - 1), g.p.group);
    tile.lo[r] = r < count ? first_key(g.mask, at.query) : 0;
    tile.hi[r] = r < count ? end_key(g.mask, at.query) : 0;
    tile.position[r] = at.query + g.mask.offset;
    tile.slope[r] = g.p.alibi_slopes ? g.p.alibi_slopes[g.batch_index * g.p.alibi_batch + g.head(at)] * kLog2e : 0;
  }
  tile.first_key = tile.lo[0];
  tile.end_key = tile.hi[count - 1];
  tile.full_begin = tile.lo[count - 1];
  tile.full_end = tile.hi[0];
}

// The tile's rows of `from` times factor, as float32: natural[row][ld] and transposed[dim][kTileRows]. Lanes past the end
// are zero. True where a row holds a NaN or an infinity.
inline bool pack_rows(const Group& g, const Tensor& from, int dim, const RowTile& tile, float factor, int ld, float* natural,
                      float* transposed) {
  V taint = hn::Zero(F());
  with_element(g.p.element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int r = 0; r < tile.vectors * kLanes; ++r) {
      float* to = natural + r * static_cast<ptrdiff_t>(ld);
      if (r < tile.count) {
        const QueryHead at = query_head_of_row(tile.row0 + r, g.p.group);
        const T* row = row_of<const T>(from, g.batch_index, g.seq.q_row + at.query, g.head(at));
        taint = hn::Add(taint, load_row(row, dim, factor, to));
      } else {
        memset(to, 0, static_cast<size_t>(ld) * sizeof(float));
      }
    }
  });
  for (int r = 0; r < tile.vectors * kLanes; r += 4) {
    for (int c = 0; c < dim; c += 4) {
      transpose4x4(natural + r * static_cast<ptrdiff_t>(ld) + c, ld, transposed + c * static_cast<ptrdiff_t>(kTileRows) + r, kTileRows);
    }
  }
  return is_tainted(taint);
}

// The keys [n0, n1) of K or V as float32 rows. True where one of them holds a NaN or an infinity.
inline bool pack_keys(const Group& g, const Tensor& from, int dim, int n0, int n1, int ld, float* to) {
  V taint = hn::Zero(F());
  with_element(g.p.element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int j = n0; j < n1; ++j) {
      const T* row = row_of<const T>(from, g.batch_index, g.seq.k_row + j, g.kv_head);
      taint = hn::Add(taint, load_row(row, dim, 1.0f, to + (j - n0) * static_cast<ptrdiff_t>(ld)));
    }
  });
  return is_tainted(taint);
}

// n elements of a float32 row times factor, to a row of the user's tensor. The + 0 turns -0 into 0: which tiles of hidden
// pairs were added to a sum must not show.
template <class T>
HWY_INLINE void store_scaled_row(float* row, int n, float factor, T* to) {
  const F4 d;
  const auto scale = hn::Set(d, factor), zero = hn::Zero(d);
  for (int c = 0; c < n; c += 4) hn::StoreU(hn::MulAdd(hn::LoadU(d, row + c), scale, zero), d, row + c);
  store_row(row, n, to);
}

// C^T[dim][row] = alpha * C^T + sum over keys of A[key][dim] * w[key][row], for the visible pairs only: for tiles with
// hidden pairs where A holds a NaN or an infinity, which a weight of zero must not meet.
template <int kVectors>
void add_visible(const RowTile& tile, const float* a, int lda, const float* w, int dims, int n0, int keys, const V (&alpha)[kVectors],
                 float* c_t) {
  const F d;
  const I di;
  for (int n = 0; n < kVectors; ++n) {
    const auto lo = hn::Load(di, tile.lo + n * kLanes), hi = hn::Load(di, tile.hi + n * kLanes);
    for (int c = 0; c < dims; ++c) {
      V acc = hn::Zero(d);
      for (int j = 0; j < keys; ++j) {
        const V x = hn::MulAdd(hn::Set(d, a[j * static_cast<ptrdiff_t>(lda) + c]), hn::Load(d, w + j * kTileRows + n * kLanes), acc);
        acc = hn::IfThenElse(is_visible(hn::Set(di, n0 + j), lo, hi), x, acc);
      }
      float* at = c_t + c * static_cast<ptrdiff_t>(kTileRows) + n * kLanes;
      hn::Store(hn::MulAdd(hn::Load(d, at), alpha[n], acc), d, at);
    }
  }
}

// C^T[dim][row] = alpha * C^T + sum over keys of A[key][dim] * w[key][row]. The tile's own sum starts at zero, so rounding
// errors do not grow with the sequence. dims is a multiple of kRegisterRows.
template <int kVectors>
void add_product(const float* a, int lda, const float* w, int dims, int keys, const V (&alpha)[kVectors], float* c_t) {
  const F d;
  for (int c = 0; c < dims; c += kRegisterRows) {
    V acc[kRegisterRows][kVectors];
    clear(acc);
    multiply<kRegisterRows, kVectors, true>(a + c, lda, w, kTileRows, keys, acc);
    TW_UNROLL
    for (int r = 0; r < kRegisterRows; ++r) {
      TW_UNROLL
      for (int n = 0; n < kVectors; ++n) {
        float* at = c_t + (c + r) * static_cast<ptrdiff_t>(kTileRows) + n * kLanes;
        hn::Store(hn::MulAdd(hn::Load(d, at), alpha[n], acc[r][n]), d, at);
      }
    }
  }
}

// Float arrays one after the other in a thread's scratch, each aligned to 64 bytes.
class Carver {
 public:
  explicit Carver(size_t begin) : at_(round_up(begin, size_t{64})) {}
  size_t take(int64_t floats) {
    const size_t begin = at_;
    at_ += round_up(static_cast<size_t>(floats) * sizeof(float), size_t{64});
    return begin;
  }
  size_t bytes() const { return at_; }

 private:
  size_t at_;
};

}  // namespace
}  // namespace tilewise::cpu::TW_ISA
HWY_AFTER_NAMESPACE();
