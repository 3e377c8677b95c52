// All that is ever asked of a mask. Causal, windows and both alignments are one band: query i sees the keys
// first_key(i) <= j < end_key(i), and both bounds never fall as i grows.
#pragma once

#include "core/config.h"

namespace tilewise {

struct Band {
  int seqlen_q, seqlen_k;
  int offset;                     // key position that query 0 is aligned with
  int window_left, window_right;  // inclusive, kUnbounded where there is none
};

// Windows of -1 are unbounded; lengths at most kMaxSeqlen.
TW_HD Band make_band(int seqlen_q, int seqlen_k, long long window_left, long long window_right, bool top_left) {
  Band band;
  band.seqlen_q = seqlen_q;
  band.seqlen_k = seqlen_k;
  band.offset = top_left ? 0 : seqlen_k - seqlen_q;
  band.window_left = window_left < 0 || window_left > kMaxSeqlen ? kUnbounded : static_cast<int>(window_left);
  band.window_right = window_right < 0 || window_right > kMaxSeqlen ? kUnbounded : static_cast<int>(window_right);
  return band;
}

// The first visible key of query i, before it is cut to the sequence: it may be negative or past the end.
TW_HD int raw_first_key(const Band& band, int i) { return i + band.offset - band.window_left; }
TW_HD int raw_end_key(const Band& band, int i) { return i + band.offset + band.window_right + 1; }

TW_HD int first_key(const Band& band, int i) { return min_of(max_of(raw_first_key(band, i), 0), band.seqlen_k); }
TW_HD int end_key(const Band& band, int i) { return max_of(min_of(raw_end_key(band, i), band.seqlen_k), 0); }

TW_HD bool visible(const Band& band, int i, int j) { return first_key(band, i) <= j && j < end_key(band, i); }

// Blocks of one axis as three runs: [begin, full_begin) masked edge, [full_begin, full_end) every pair visible,
// [full_end, end) masked edge. Blocks outside [begin, end) hold no visible pair.
struct BlockRange {
  int begin, full_begin, full_end, end;
};

namespace detail {
// Blocks of `block` positions that touch [touch_begin, touch_end) and those that lie inside [full_begin, full_end).
TW_HD BlockRange block_range(int touch_begin, int touch_end, int full_begin, int full_end, int block) {
  if (touch_begin >= touch_end) return {0, 0, 0, 0};
  const int begin = touch_begin / block, end = (touch_end - 1) / block + 1;
  int inner_begin = full_begin / block + (full_begin % block != 0), inner_end = full_end / block;
  if (inner_begin >= inner_end) return {begin, end, end, end};
  return {begin, max_of(begin, inner_begin), min_of(end, inner_end), end};
}
}  // namespace detail

// Key blocks that the queries [m_begin, m_end) see. m_begin < m_end <= seqlen_q.
TW_HD BlockRange kv_blocks(const Band& band, int m_begin, int m_end, int block_n) {
  return detail::block_range(first_key(band, m_begin), end_key(band, m_end - 1),  // seen by at least one query
                             first_key(band, m_end - 1), end_key(band, m_begin),  // seen by every query
                             block_n);
}

// Queries that see key j: [first_query, end_query).
TW_HD int first_query(const Band& band, int j) { return min_of(max_of(j - band.offset - band.window_right, 0), band.seqlen_q); }
TW_HD int end_query(const Band& band, int j) {
  // Written so that no sum leaves int: j - offset <= 2^31 - 4 with a window bounded by kMaxSeqlen.
  const int aligned = j - band.offset;
  if (band.window_left >= band.seqlen_q - aligned - 1) return band.seqlen_q;
  return max_of(aligned + band.window_left + 1, 0);
}

// Query blocks that see the keys [n_begin, n_end). n_begin < n_end <= seqlen_k.
TW_HD BlockRange q_blocks(const Band& band, int n_begin, int n_end, int block_m) {
  return detail::block_range(first_query(band, n_begin), end_query(band, n_end - 1),  //
                             first_query(band, n_end - 1), end_query(band, n_begin), block_m);
}

}  // namespace tilewise
