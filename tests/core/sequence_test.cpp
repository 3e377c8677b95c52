// Where a sequence lies, and which query and head a packed row is.
#include "core/sequence.h"

#include <gtest/gtest.h>

#include <climits>
#include <vector>

namespace tilewise {
namespace {

TEST(Sequence, DenseIsTheProblem) {
  const Sequence s = sequence_of(3, 17, 23, nullptr, nullptr, nullptr);
  EXPECT_EQ(s.q_row, 0);
  EXPECT_EQ(s.k_row, 0);
  EXPECT_EQ(s.seqlen_q, 17);
  EXPECT_EQ(s.seqlen_k, 23);
}

TEST(Sequence, PackedCoversEveryRowOnce) {
  const std::vector<int> q{0, 0, 5, 5, 12}, k{0, 4, 4, 4, 7};  // empty sequences anywhere
  long long q_rows = 0, k_rows = 0;
  for (int b = 0; b < 4; ++b) {
    const Sequence s = sequence_of(b, 7, 4, q.data(), k.data(), nullptr);
    EXPECT_EQ(s.q_row, q_rows);
    EXPECT_EQ(s.k_row, k_rows);
    EXPECT_EQ(s.seqlen_q, q[b + 1] - q[b]);
    EXPECT_EQ(s.seqlen_k, k[b + 1] - k[b]);
    q_rows += s.seqlen_q, k_rows += s.seqlen_k;
  }
  EXPECT_EQ(q_rows, 12);
  EXPECT_EQ(k_rows, 7);
}

TEST(Sequence, SequsedOnlyCapsKeys) {
  for (int used = -3; used <= 12; ++used) {
    const Sequence s = sequence_of(0, 9, 8, nullptr, nullptr, &used);
    EXPECT_EQ(s.seqlen_k, used < 0 ? 0 : used > 8 ? 8 : used);
    EXPECT_EQ(s.seqlen_q, 9);
  }
  const int cu[] = {0, 3, 10}, used[] = {5, 5};
  EXPECT_EQ(sequence_of(0, 7, 7, cu, cu, used).seqlen_k, 3);
  EXPECT_EQ(sequence_of(1, 7, 7, cu, cu, used).seqlen_k, 5);
  EXPECT_EQ(sequence_of(1, 7, 7, cu, cu, used).seqlen_q, 7);
}

TEST(Sequence, StartsUpToTheLastInt) {
  const int cu[] = {0, INT_MAX - 5, INT_MAX};
  const Sequence s = sequence_of(1, 5, 5, cu, cu, nullptr);
  EXPECT_EQ(s.q_row, INT_MAX - 5);
  EXPECT_EQ(s.seqlen_k, 5);
}

TEST(Sequence, PackedRowsAreQueriesThenHeads) {
  for (int group = 1; group <= 9; ++group) {
    long long row = 0;
    for (int query = 0; query < 20; ++query)
      for (int head = 0; head < group; ++head, ++row) {
        EXPECT_EQ(query_head_of_row(row, group).query, query);
        EXPECT_EQ(query_head_of_row(row, group).head, head);
      }
  }
  const long long last = 1073741821LL * 64 + 63;  // past 2^31
  EXPECT_EQ(query_head_of_row(last, 64).query, 1073741821);
  EXPECT_EQ(query_head_of_row(last, 64).head, 63);
}

}  // namespace
}  // namespace tilewise
