// The band of mask.h against the definition in words, for every small shape, and at the ends of its range.
#include "core/mask.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>

namespace tilewise {
namespace {

// The contract's sentence, in 64 bits.
bool visible_by_definition(long long seqlen_q, long long seqlen_k, long long left, long long right, bool top_left, long long i,
                           long long j) {
  const long long offset = top_left ? 0 : seqlen_k - seqlen_q;
  if (left >= 0 && j < i + offset - left) return false;
  if (right >= 0 && j > i + offset + right) return false;
  return 0 <= j && j < seqlen_k;
}

template <class F>
void for_each_small_band(int longest, const F& f) {
  for (int seqlen_q = 0; seqlen_q <= longest; ++seqlen_q)
    for (int seqlen_k = 0; seqlen_k <= longest; ++seqlen_k)
      for (int left = -1; left <= longest; ++left)
        for (int right = -1; right <= longest; ++right)
          for (bool top_left : {false, true}) {
            SCOPED_TRACE(testing::Message() << "q" << seqlen_q << " k" << seqlen_k << " window=" << left << "," << right
                                            << (top_left ? " topleft" : ""));
            f(make_band(seqlen_q, seqlen_k, left, right, top_left), left, right, top_left);
            if (testing::Test::HasFailure()) return;
          }
}

TEST(Mask, VisibleIsTheDefinition) {
  for_each_small_band(9, [](const Band& band, int left, int right, bool top_left) {
    for (int i = 0; i < band.seqlen_q; ++i)
      for (int j = 0; j < band.seqlen_k; ++j)
        ASSERT_EQ(visible(band, i, j), visible_by_definition(band.seqlen_q, band.seqlen_k, left, right, top_left, i, j)) << i << " " << j;
  });
}

TEST(Mask, KeysOfAQueryAndQueriesOfAKeyAreRuns) {
  for_each_small_band(9, [](const Band& band, int, int, bool) {
    for (int i = 0; i < band.seqlen_q; ++i) {
      ASSERT_GE(first_key(band, i), 0);
      ASSERT_LE(first_key(band, i), band.seqlen_k);
      ASSERT_GE(end_key(band, i), 0);
      ASSERT_LE(end_key(band, i), band.seqlen_k);
      if (i > 0) {
        ASSERT_LE(first_key(band, i - 1), first_key(band, i));
        ASSERT_LE(end_key(band, i - 1), end_key(band, i));
      }
    }
    for (int j = 0; j < band.seqlen_k; ++j) {
      ASSERT_GE(first_query(band, j), 0);
      ASSERT_LE(first_query(band, j), band.seqlen_q);
      ASSERT_GE(end_query(band, j), 0);
      ASSERT_LE(end_query(band, j), band.seqlen_q);
      for (int i = 0; i < band.seqlen_q; ++i)
        ASSERT_EQ(visible(band, i, j), first_query(band, j) <= i && i < end_query(band, j)) << i << " " << j;
    }
  });
}

// What a range of blocks claims, block by block, against every pair. Block n holds positions [n * block, (n + 1) * block).
template <class Visible>
void check_blocks(const BlockRange& range, int blocks, int block, int length, int others_begin, int others_end, const Visible& is_visible) {
  ASSERT_LE(range.begin, range.full_begin);
  ASSERT_LE(range.full_begin, range.full_end);
  ASSERT_LE(range.full_end, range.end);
  ASSERT_LE(range.end, blocks);
  for (int n = 0; n < blocks; ++n) {
    int seen = 0;
    for (int j = n * block; j < (n + 1) * block && j < length; ++j)
      for (int i = others_begin; i < others_end; ++i) seen += is_visible(i, j);
    const bool touched = n >= range.begin && n < range.end, full = n >= range.full_begin && n < range.full_end;
    const bool edge = touched && (n == range.begin || n == range.end - 1);
    ASSERT_TRUE(touched || seen == 0) << "block " << n << " is skipped";
    // A run of full blocks leaves none out, so that no mask is applied in vain.
    ASSERT_EQ(full, seen == block * (others_end - others_begin)) << "block " << n;
    ASSERT_TRUE(!edge || seen > 0) << "block " << n << " is an edge";
  }
}

TEST(Mask, KeyBlocksOfQueries) {
  for_each_small_band(7, [](const Band& band, int, int, bool) {
    for (int block = 1; block <= 5; ++block)
      for (int begin = 0; begin < band.seqlen_q; ++begin)
        for (int end = begin + 1; end <= band.seqlen_q; ++end)
          check_blocks(kv_blocks(band, begin, end, block), ceil_div(band.seqlen_k, block), block, band.seqlen_k, begin, end,
                       [&](int i, int j) { return visible(band, i, j); });
  });
}

TEST(Mask, QueryBlocksOfKeys) {
  for_each_small_band(7, [](const Band& band, int, int, bool) {
    for (int block = 1; block <= 5; ++block)
      for (int begin = 0; begin < band.seqlen_k; ++begin)
        for (int end = begin + 1; end <= band.seqlen_k; ++end)
          check_blocks(q_blocks(band, begin, end, block), ceil_div(band.seqlen_q, block), block, band.seqlen_q, begin, end,
                       [&](int j, int i) { return visible(band, i, j); });
  });
}

// -fsanitize=undefined sees an overflow; without it a wrong sign shows.
TEST(Mask, LongestSequences) {
  const long long lengths[] = {0, 1, 2, 1000, kMaxSeqlen / 2, kMaxSeqlen - 1, kMaxSeqlen};
  const long long windows[] = {-1, 0, 1, 1000, kMaxSeqlen - 1, kMaxSeqlen, kMaxSeqlen + 1LL, 1LL << 40, INT64_MAX};
  for (long long q : lengths)
    for (long long k : lengths)
      for (long long left : windows)
        for (long long right : windows)
          for (bool top_left : {false, true}) {
            const Band band = make_band(static_cast<int>(q), static_cast<int>(k), left, right, top_left);
            const long long wide = 1LL << 40;  // wider than any distance, and far from the end of 64 bits
            const auto expected = [&](long long i, long long j) {
              return visible_by_definition(q, k, std::min(left, wide), std::min(right, wide), top_left, i, j);
            };
            for (long long i : {0LL, 1LL, q / 2, q - 2, q - 1})
              for (long long j : {0LL, 1LL, k / 2, k - 2, k - 1}) {
                if (i < 0 || j < 0 || i >= q || j >= k) continue;
                const int qi = static_cast<int>(i), kj = static_cast<int>(j);
                ASSERT_EQ(visible(band, qi, kj), expected(i, j)) << q << " " << k << " " << left << " " << right << " " << i << " " << j;
                ASSERT_EQ(first_query(band, kj) <= qi && qi < end_query(band, kj), expected(i, j))
                    << q << " " << k << " " << left << " " << right << " " << top_left << " " << i << " " << j;
                const BlockRange n = kv_blocks(band, qi, qi + 1, 64), m = q_blocks(band, kj, kj + 1, 64);
                ASSERT_TRUE(!expected(i, j) || (n.begin <= kj / 64 && kj / 64 < n.end));
                ASSERT_TRUE(!expected(i, j) || (m.begin <= qi / 64 && qi / 64 < m.end));
              }
          }
}

TEST(Mask, DivisionsThatRoundUp) {
  for (int a = 0; a < 100; ++a)
    for (int b = 1; b < 20; ++b) {
      EXPECT_GE(ceil_div(a, b) * b, a);
      EXPECT_LT((ceil_div(a, b) - 1) * b, a);
      EXPECT_EQ(round_up(a, b), ceil_div(a, b) * b);
    }
}

}  // namespace
}  // namespace tilewise
