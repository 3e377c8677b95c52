// explain() against counting every pair and every tile.
#include "tilewise/explain.hpp"

#include <gtest/gtest.h>

#include <chrono>
#include <random>

#include "core/mask.h"

namespace tilewise {
namespace {

struct Count {
  int64_t pairs = 0, items = 0, full = 0, masked = 0, skipped = 0, keys_read = 0, rows_read = 0;
};

// One head group, by asking visible() about every pair. A tile is full where all block_n keys exist and every row sees them.
Count brute_force(const Band& band, int group, const TilePlan& tiles) {
  Count c;
  const int block_n = static_cast<int>(tiles.block_n);
  for (int i = 0; i < band.seqlen_q; ++i) {
    for (int j = 0; j < band.seqlen_k; ++j) c.pairs += visible(band, i, j);
  }
  const int64_t rows = int64_t{band.seqlen_q} * group;
  for (int64_t row = 0; row < rows; row += tiles.block_m) {
    const int64_t row_end = std::min(rows, row + tiles.block_m);
    ++c.items;
    for (int n = 0; n < band.seqlen_k; n += block_n) {
      const int n_end = std::min(n + block_n, band.seqlen_k);
      int64_t seen = 0;
      for (int64_t r = row; r < row_end; ++r) {
        for (int j = n; j < n_end; ++j) seen += visible(band, static_cast<int>(r / group), j);
      }
      const bool full = seen == (row_end - row) * block_n;
      c.full += full;
      c.masked += !full && seen > 0;
      c.skipped += seen == 0;
      if (seen > 0) c.keys_read += n_end - n, c.rows_read += row_end - row;
    }
  }
  return c;
}

void expect_equal(const Problem& p, const Lengths& lengths, const std::vector<std::pair<int, int>>& sequences) {
  const Result<Explanation> explained = explain(p, Device::cpu(2), lengths);
  ASSERT_TRUE(explained.ok()) << p.to_string() << ": " << explained.status().message();
  const Explanation& e = *explained;
  Count sum;
  int64_t rows = 0, keys = 0;
  double scores = 0;
  const int group = static_cast<int>(p.num_heads_q / p.num_heads_kv);
  for (const auto& [seqlen_q, seqlen_k] : sequences) {
    const Band band = make_band(seqlen_q, seqlen_k, p.window_left, p.window_right, p.alignment == Alignment::kTopLeft);
    Count c = brute_force(band, group, e.tiles);
    if (p.pass == Pass::kBackward) c.items = ceil_div<int64_t>(seqlen_k, e.tiles.block_n);
    sum.pairs += c.pairs * p.num_heads_q;
    for (auto [to, from] : {std::pair{&sum.items, c.items},
                            {&sum.full, c.full},
                            {&sum.masked, c.masked},
                            {&sum.skipped, c.skipped},
                            {&sum.keys_read, c.keys_read},
                            {&sum.rows_read, c.rows_read}}) {
      *to += from * p.num_heads_kv;
    }
    rows += seqlen_q * p.num_heads_q;
    keys += seqlen_k;
    scores += static_cast<double>(seqlen_q) * seqlen_k * static_cast<double>(p.num_heads_q);
  }
  EXPECT_EQ(e.work_items, sum.items) << p.to_string();
  EXPECT_EQ(e.full_tiles, sum.full) << p.to_string();
  EXPECT_EQ(e.masked_tiles, sum.masked) << p.to_string();
  EXPECT_EQ(e.skipped_tiles, sum.skipped) << p.to_string();
  const double bytes = p.dtype == DataType::kFloat32 ? 4 : 2, d = static_cast<double>(p.head_dim), dv = static_cast<double>(p.head_dim_v);
  const double q = bytes * d * static_cast<double>(rows), o = bytes * dv * static_cast<double>(rows);
  const double kv_per_key = bytes * (d + dv), head_keys = static_cast<double>(keys * p.num_heads_q);
  const double gradient = p.accumulate ? 8 : bytes, dq = gradient * d * static_cast<double>(rows), dkv_per_key = gradient * (d + dv);
  const double group_keys = static_cast<double>(keys * p.num_heads_kv), float_rows = 4.0 * static_cast<double>(rows);
  if (p.pass == Pass::kForward) {
    EXPECT_EQ(e.flops, 2.0 * static_cast<double>(sum.pairs) * (d + dv)) << p.to_string();
    EXPECT_EQ(e.flash_bytes, q + o + float_rows + static_cast<double>(sum.keys_read) * kv_per_key) << p.to_string();
    EXPECT_EQ(e.standard_bytes, q + o + head_keys * kv_per_key + 4 * bytes * scores) << p.to_string();
  } else {
    EXPECT_EQ(e.flops, 2.0 * static_cast<double>(sum.pairs) * (3 * d + 2 * dv)) << p.to_string();
    const double visits = static_cast<double>(sum.rows_read);
    EXPECT_EQ(e.flash_bytes,
              2 * o + float_rows + group_keys * (kv_per_key + dkv_per_key) + visits * (kv_per_key + 8 + 8 * d) + 2 * float_rows * d + dq)
        << p.to_string();
    EXPECT_EQ(e.standard_bytes, 2 * o + q + dq + head_keys * (kv_per_key + dkv_per_key) + 7 * bytes * scores) << p.to_string();
  }
  EXPECT_EQ(e.flash_extra_bytes, e.workspace_bytes + 4 * rows);
  EXPECT_EQ(static_cast<size_t>(e.workspace_bytes), Plan::make(p, Device::cpu(2))->workspace_bytes());
  EXPECT_EQ(e.kernel, Plan::make(p, Device::cpu(2))->kernel());
  EXPECT_EQ(e.tile_bytes, e.flash_bytes) << p.to_string();
  EXPECT_EQ(e.intensity, e.flash_bytes > 0 ? e.flops / e.flash_bytes : 0);
  EXPECT_EQ(e.candidates.size(), Plan::candidates(p).size());
}

TEST(Explain, CountsEveryTileAndPair) {
  std::mt19937_64 random(2);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
  for (int round = 0; round < 300; ++round) {
    Problem p;
    p.pass = static_cast<Pass>(below(2));
    p.dtype = static_cast<DataType>(below(3));
    p.accumulate = p.pass == Pass::kBackward && below(2);
    p.batch = 1 + below(3);
    p.seqlen_q = below(300);
    p.seqlen_k = below(300);
    p.num_heads_kv = 1 + below(2);
    p.num_heads_q = p.num_heads_kv * (1 + below(5));
    p.head_dim = 1 + below(130);
    p.head_dim_v = 1 + below(130);
    p.alignment = static_cast<Alignment>(below(2));
    if (below(2)) p.window_right = below(2) ? 0 : below(200);
    if (below(2)) p.window_left = below(200);
    std::vector<std::pair<int, int>> sequences;
    Lengths lengths;
    p.packed = below(2);
    for (int64_t b = 0; b < p.batch; ++b) {
      const int q = static_cast<int>(p.packed ? below(p.seqlen_q + 1) : p.seqlen_q);
      const int k = static_cast<int>(p.packed ? below(p.seqlen_k + 1) : p.seqlen_k);
      sequences.emplace_back(q, k);
      if (!p.packed) continue;
      lengths.q.push_back(q);
      lengths.k.push_back(k);
      p.total_q += q;
      p.total_k += k;
    }
    expect_equal(p, lengths, sequences);
  }
}

TEST(Explain, SequencesWithoutLengthsCountWithTheirBounds) {
  expect_equal(*Problem::parse("b4 q100 k120 h2 d16 packed tq250 tk120 causal"), {}, {{100, 120}, {100, 0}, {50, 0}, {0, 0}});
  Lengths used;
  used.k = {3, 0};
  expect_equal(*Problem::parse("b2 q50 k120 h2 d16 seqused causal"), used, {{50, 3}, {50, 0}});
}

TEST(Explain, KnowsTheDimensionsThatAreMultiplied) {
  const auto dims = [](const char* problem) {
    const TilePlan tiles = explain(*Problem::parse(problem))->tiles;
    EXPECT_TRUE(tiles.grouped);
    return std::pair(tiles.head_dim, tiles.head_dim_v);
  };
  EXPECT_EQ(dims("q64 d7/9"), std::pair(int64_t{7}, int64_t{16}));
  EXPECT_EQ(dims("q64 d64"), std::pair(int64_t{64}, int64_t{64}));
  EXPECT_EQ(dims("bwd q64 d7/9"), std::pair(int64_t{7}, int64_t{9}));
}

TEST(Explain, MatricesOfStandardAttention) {
  EXPECT_EQ(explain(*Problem::parse("b2 q100 k50 h4/2 d16 bf16 causal"))->standard_extra_bytes, 2 * 4 * 100 * 50 * 2);
  EXPECT_EQ(explain(*Problem::parse("bwd b2 q100 k50 h4/2 d16"))->standard_extra_bytes, 2 * 4 * 100 * 50 * 4 * 2);
  EXPECT_EQ(explain(*Problem::parse("b3 q100 k50 h4 d16 packed tq80 tk90"))->standard_extra_bytes, 3 * 4 * 80 * 50 * 4);
}

TEST(Explain, RefusesWhatNoPlanTakes) {
  EXPECT_EQ(explain(*Problem::parse("q64 d513")).status().code(), StatusCode::kUnsupported);
  Problem p = *Problem::parse("b2 q64 d32 packed tq64 tk64");
  EXPECT_EQ(explain(p, Device::cpu(), {{1, 2, 3}, {}}).status().message(), "lengths.q has 3 entries, but batch is 2");
  EXPECT_EQ(explain(p, Device::cpu(), {{}, {1, 65}}).status().message(), "lengths.k has 65, which is not between 0 and 64");
  EXPECT_EQ(explain(p, Device::cpu(), {{-1, 2}, {}}).status().message(), "lengths.q has -1, which is not between 0 and 64");
  p.head_dim = 0;
  EXPECT_EQ(explain(p).status().message(), "head_dim 0 is not positive");
  EXPECT_EQ(measure_rates(Device::cpu(), DataType::kInt32).status().message(), "dtype int32 is none of fp32, bf16 and fp16");
}

TEST(Explain, IsQuickForLongSequences) {
  const auto start = std::chrono::steady_clock::now();
  const Explanation e = *explain(*Problem::parse("b4 q1000000 h32/1 d128 bf16 causal"));
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(1));
  EXPECT_EQ(e.flops, 4.0 * 128 * 32 * 4 * (1e6 * (1e6 + 1) / 2));
}

}  // namespace
}  // namespace tilewise
