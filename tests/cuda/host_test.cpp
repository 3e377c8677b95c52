// What the CUDA backend decides on the host, for a device as a value: no GPU is needed.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/arguments.h"
#include "cuda/backend.h"
#include "cuda/backward_counts.h"
#include "cuda/backward_rows.h"
#include "tilewise/explain.hpp"

namespace tilewise {
namespace {

Device hopper() {
  Device device;
  device.type = DeviceType::kCuda, device.name = "a Hopper GPU", device.arch = "sm_90", device.units = 132;
  device.desk_bytes = 232448;
  return device;
}

TensorView view(uintptr_t address, int64_t row_stride) {
  return {reinterpret_cast<void*>(address), DataType::kBFloat16, 4, {2, 100, 4, 64}, {100 * row_stride, row_stride, 64, 1}};
}

TEST(Host, RowsOffTheGridAreRefused) {
  const auto refusal = [](const TensorView& t) { return cuda::check_rows("k", t).message(); };
  const std::string end = " for sm_90 kernels: copy k to a tensor whose rows are padded to a multiple of 8 elements";
  EXPECT_TRUE(cuda::check_rows("k", view(4096, 256)).ok());
  EXPECT_EQ(refusal(view(4098, 256)), "k begins 2 bytes past a multiple of 16, but every row must begin at a multiple of 16 bytes" + end);
  EXPECT_EQ(refusal(view(4096, 260)),
            "k has stride 260 in its dimension 1, which is 520 bytes, but every row must begin at a multiple of 16 bytes" + end);
  EXPECT_EQ(refusal(view(4096, -256)),
            "k has stride -25600 in its dimension 0, but strides must lie between 0 and 2^39 elements for sm_90 kernels: copy k to a "
            "contiguous tensor");
  TensorView one_row = view(4096, 256);  // a stride that is never taken may be anything
  one_row.shape[1] = 1, one_row.stride[1] = 3;
  EXPECT_TRUE(cuda::check_rows("k", one_row).ok());
}

// What no kernel takes is one sentence, however many kernels there are.
TEST(Host, RefusalsAreOneSentence) {
  Device later = hopper();
  later.arch = "sm_100";
  for (const char* pass : {"fwd", "bwd"}) {
    for (const auto& [words, device, reason] : std::vector<std::tuple<std::string, Device, std::string>>{
             {"d20 bf16", hopper(), "head_dim 20 is not a multiple of 8, which GPU kernels need: pad it with zeros and give softmax_scale"},
             {"d260 fp16", hopper(), "head_dim 260 is above 256, the largest of all GPU kernels"},
             {"d64/20 bf16", hopper(), "head_dim_v 20 is not a multiple of 8, which GPU kernels need: pad it with zeros"},
             {"d64/300 bf16", hopper(), "head_dim_v 300 is above 256, the largest of all GPU kernels"},
             {"d64 fp32", hopper(), "dtype fp32 is neither bf16 nor fp16, which GPU kernels take"},
             {"d64 bf16", later, "device.arch sm_100 is not sm_90, which all GPU kernels are for"}}) {
      const Problem problem = Problem::parse(std::string(pass) + " q64 " + words).value();
      const Status status = Plan::make(problem, device).status();
      EXPECT_EQ(status.code(), StatusCode::kUnsupported);
      EXPECT_EQ(status.message(), "no kernel takes '" + problem.to_string() + "' on a Hopper GPU (" + device.arch + "): " + reason);
    }
  }
}

constexpr BackwardConfig kShapes[] = {cuda::Backward64::kShape,      cuda::Backward96::kShape,  cuda::Backward128::kShape,
                                      cuda::Backward192x128::kShape, cuda::Backward192::kShape, cuda::Backward256::kShape};

// However many SMs there are, no claim of the backward kernel waits for a later one: a share of dq comes behind all works of its unit, and
// a work behind all shares of the unit whose sums it uses again.
TEST(Host, BackwardNeverWaitsForItself) {
  std::mt19937_64 random(1);
  const auto draw = [&](uint64_t most) { return static_cast<int64_t>(random() % (most + 1)); };
  for (int i = 0; i < 3000; ++i) {
    Problem p;
    p.pass = Pass::kBackward;
    p.num_heads_kv = 1 + draw(40);
    p.num_heads_q = p.num_heads_kv * (1 + draw(7));
    p.batch = 1 + draw(40);
    p.seqlen_q = draw(i % 2 == 0 ? 300 : 20000);
    p.seqlen_k = draw(i % 2 == 0 ? 300 : 20000);
    p.packed = draw(1) == 1;
    if (p.packed) {
      p.total_q = draw(static_cast<uint64_t>(p.batch * p.seqlen_q));
      p.total_k = draw(static_cast<uint64_t>(p.batch * p.seqlen_k));
    }
    if (draw(1) == 1) p.window_left = draw(2) == 0 ? draw(500) : -1, p.window_right = draw(1) * draw(500);
    p.deterministic = draw(1) == 1;
    Device device = hopper();
    device.units = std::vector<int>{2, 3, 31, 114, 132, 144}[static_cast<size_t>(draw(5))];
    const BackwardConfig& shape = kShapes[draw(5)];
    const cuda::Counts counts(p, shape, device);
    const std::string name = p.to_string() + " on " + std::to_string(device.units) + " SMs";
    ASSERT_TRUE(counts.waits_for_earlier_only()) << name;
    ASSERT_LE(counts.ahead, counts.units) << name;
    std::vector<int64_t> first(static_cast<size_t>(counts.units), counts.works), last(first.size());
    for (int64_t work = 0; work < counts.works; ++work) {
      const auto unit = static_cast<size_t>(unit_block(counts.order(), static_cast<int>(counts.units), static_cast<int>(counts.k_blocks),
                                                       p.deterministic && !p.packed, static_cast<int>(work))
                                                .unit);
      first[unit] = std::min(first[unit], work);
      last[unit] = work;
      if (work < device.units / shape.ctas()) {
        ASSERT_LT(static_cast<int64_t>(unit), counts.ahead) << name;
      }
    }
    for (int64_t unit = 0; unit < counts.units; ++unit) {
      const auto shares = [&](int64_t of) { return counts.lag + of * counts.shares; };  // the first one's claim
      ASSERT_LT(last[static_cast<size_t>(unit)], shares(unit)) << name;
      if (unit >= counts.ring) {
        ASSERT_LE(shares(unit - counts.ring + 1), first[static_cast<size_t>(unit)]) << name;
      }
    }
  }
}

// The order in which blocks add to dq depends on a sequence's own shape, neither on the batch nor on the number of SMs.
TEST(Host, BackwardOrderOfAdditionsIsTheSequences) {
  int in_runs = 0;
  for (const BackwardConfig& shape : kShapes)
    for (const std::string words :
         {"q300 k4200 h4", "q300 k4200 h16/4", "q8192 h32/8", "q4096 h2", "q64 k9000 h2", "q64 k16000 h1", "q700 h8"}) {
      std::vector<std::pair<int, int>> expected;  // of each block
      for (const int batch : {1, 2, 4, 16})
        for (const int units : {31, 132}) {
          Device device = hopper();
          device.units = units;
          const cuda::Counts counts(Problem::parse("bwd b" + std::to_string(batch) + " causal deterministic bf16 d64 " + words).value(),
                                    shape, device);
          std::vector<std::pair<int, int>> runs(static_cast<size_t>(counts.k_blocks));
          for (int work = 0; work < counts.works; ++work) {
            const UnitBlock at = unit_block(counts.order(), static_cast<int>(counts.units), static_cast<int>(counts.k_blocks), true, work);
            auto& run = runs[static_cast<size_t>(at.block)];
            if (at.unit > 0) {
              ASSERT_EQ(run, std::pair(at.run_begin, at.run_end)) << words << " batch " << batch << " unit " << at.unit;
            }
            run = {at.run_begin, at.run_end};
          }
          if (expected.empty()) expected = runs;
          EXPECT_EQ(runs, expected) << words << " batch " << batch << " on " << units << " SMs";
        }
      in_runs += expected[0].second < static_cast<int>(expected.size());
    }
  EXPECT_GT(in_runs, 10);
}

// Every block of every unit is claimed once. Where they fall, a block adds to a step's dq when all those have that see the step and were
// claimed before.
TEST(Host, BackwardBlocksAddInTheOrderOfTheirClaims) {
  std::mt19937_64 random(2);
  const auto draw = [&](int least, int most) { return least + static_cast<int>(random() % static_cast<uint64_t>(most - least + 1)); };
  constexpr int kBlockN = 128;
  for (int i = 0; i < 500; ++i) {
    const int units = draw(1, 9), block_m = 64 * draw(1, 2), seqlen_k = draw(1, 3000), k_blocks = (seqlen_k + kBlockN - 1) / kBlockN;
    const bool falling = draw(0, 3) > 0;
    const int plain = falling ? 0 : draw(0, units - 1);
    const UnitOrder order = {plain, draw(1, units), draw(1, units), falling ? draw(1, k_blocks) : k_blocks};
    const Band band = make_band(draw(1, 3000), seqlen_k, draw(0, 2) == 0 ? draw(0, 900) : -1, draw(-1, 400), draw(0, 1) == 1);
    std::vector<std::vector<int>> added(static_cast<size_t>(units), std::vector<int>(static_cast<size_t>(band.seqlen_q)));  // to a step
    std::vector<int> blocks;
    for (int work = 0; work < units * k_blocks; ++work) {
      const UnitBlock at = unit_block(order, units, k_blocks, falling, work);
      ASSERT_TRUE(at.unit >= 0 && at.unit < units && at.run_begin <= at.block && at.block < at.run_end && at.run_end <= k_blocks);
      blocks.push_back(at.unit * k_blocks + at.block);
      const BlockRange steps = q_blocks(band, at.block * kBlockN, std::min((at.block + 1) * kBlockN, seqlen_k), block_m);
      for (int m = steps.begin; falling && m < steps.end; ++m)
        ASSERT_EQ(added[static_cast<size_t>(at.unit)][static_cast<size_t>(m)]++,
                  turn_of(band, m, at.block, at.run_begin, at.run_end, block_m, kBlockN));
    }
    std::sort(blocks.begin(), blocks.end());
    for (int n = 0; n < units * k_blocks; ++n) ASSERT_EQ(blocks[static_cast<size_t>(n)], n);
  }
}

// Between memory and the SMs stands L2: tiles that are read again come from there.
TEST(Host, ExplainKnowsL2) {
  const Explanation e = explain(Problem::parse("b2 q4096 k4096 h8/4 d128 bf16").value(), hopper()).value();
  const double q = 2.0 * 2 * 4096 * 8 * 128, lse = 4.0 * 2 * 4096 * 8, kv = 2.0 * 2 * 4096 * 4 * 256;
  EXPECT_EQ(e.flash_bytes, 2 * q + lse + kv);
  EXPECT_EQ(e.least_bytes, e.flash_bytes);
  const double blocks = 2.0 * 4096 / static_cast<double>(e.tiles.block_m);  // of a key/value head
  EXPECT_EQ(e.tile_bytes, 2 * q + lse + blocks * kv);
}

// A tile of queries is of one query head, forward and backward. By hand: 300 queries are two blocks of 256, or three of 128; 700 keys ten
// blocks of 64 and a rest, or five of 128 and a rest; of 8 heads in 2 sequences.
TEST(Host, ExplainKnowsThatHeadsAreNotGrouped) {
  const Explanation forward = explain(Problem::parse("b2 q300 k700 h8/2 d64 bf16").value(), hopper()).value();
  ASSERT_EQ(std::tuple(forward.tiles.block_m, forward.tiles.block_n, forward.tiles.grouped), std::tuple(256, 64, false));
  EXPECT_EQ(forward.work_items, 16 * 2);
  EXPECT_EQ(forward.full_tiles, 16 * 2 * 10);
  EXPECT_EQ(forward.masked_tiles, 16 * 2 * 1);
  EXPECT_EQ(forward.picture.rows.size(), 2u);
  EXPECT_EQ(forward.tile_bytes, 16 * (2.0 * 300 * 128 + 4.0 * 300 + 2 * (2.0 * 700 * 128)));
  const Explanation backward = explain(Problem::parse("bwd b2 q300 k700 h8/2 d64 bf16").value(), hopper()).value();
  ASSERT_EQ(std::tuple(backward.tiles.block_m, backward.tiles.block_n, backward.tiles.grouped), std::tuple(128, 128, false));
  EXPECT_EQ(backward.work_items, 4 * 6);  // of a key/value head: all its query heads pass by
  EXPECT_EQ(backward.full_tiles, 16 * 3 * 5);
  EXPECT_EQ(backward.masked_tiles, 16 * 3 * 1);
  EXPECT_EQ(backward.picture.rows.size(), 3u);
}

// And where pairs are hidden: every pair of one head is asked for.
TEST(Host, ExplainCountsTheTilesOfEachQueryHead) {
  for (const char* text :
       {"b2 q300 k700 h8/2 d64 bf16 causal", "b3 q900 k500 h6/1 d128 bf16 causal topleft", "q1000 h4/2 d96 fp16 window=70,30",
        "q1000 h12/4 d192/128 bf16 window=-1,300 topleft", "b2 q65 k1500 h3 d256 bf16 causal"}) {
    for (const std::string pass : {"fwd ", "bwd "}) {
      const Problem p = Problem::parse(pass + text).value();
      const Explanation e = explain(p, hopper()).value();
      const int64_t block_m = e.tiles.block_m, block_n = e.tiles.block_n, heads = p.batch * p.num_heads_q;
      const int64_t offset = p.alignment == Alignment::kTopLeft ? 0 : p.seqlen_k - p.seqlen_q;
      int64_t full = 0, masked = 0, skipped = 0, items = 0, keys_read = 0;
      for (int64_t m = 0; m < p.seqlen_q; m += block_m, ++items) {
        for (int64_t n = 0; n < p.seqlen_k; n += block_n) {
          int64_t seen = 0, pairs = 0;
          for (int64_t i = m; i < std::min(m + block_m, p.seqlen_q); ++i, pairs += block_n)
            for (int64_t j = n; j < std::min(n + block_n, p.seqlen_k); ++j)
              seen += (p.window_left < 0 || j >= i + offset - p.window_left) && (p.window_right < 0 || j <= i + offset + p.window_right);
          full += seen == pairs, skipped += seen == 0, masked += seen > 0 && seen < pairs;
          if (seen > 0) keys_read += std::min(block_n, p.seqlen_k - n);
        }
      }
      const std::string name = p.to_string();
      EXPECT_EQ(e.full_tiles, heads * full) << name;
      EXPECT_EQ(e.masked_tiles, heads * masked) << name;
      EXPECT_EQ(e.skipped_tiles, heads * skipped) << name;
      if (p.pass == Pass::kBackward) {
        EXPECT_EQ(e.work_items, p.batch * p.num_heads_kv * ((p.seqlen_k + block_n - 1) / block_n)) << name;
      } else {
        EXPECT_EQ(e.work_items, heads * items) << name;
        const int64_t dims = p.head_dim + p.head_dim_v;
        EXPECT_EQ(e.tile_bytes, static_cast<double>(heads * (p.seqlen_q * (2 * dims + 4) + keys_read * 2 * dims))) << name;
      }
    }
  }
}

// Smaller head dimensions are filled up to the row's.
TEST(Host, ExplainKnowsTheRowsDimensions) {
  for (const std::string pass : {"fwd", "bwd"}) {
    for (const auto& [dims, head_dim, head_dim_v] : std::vector<std::tuple<std::string, int64_t, int64_t>>{
             {"d64", 64, 64}, {"d72", 96, 96}, {"d136/80", 192, 128}, {"d200", 256, 256}}) {
      const TilePlan tiles = explain(Problem::parse(pass + " q300 bf16 " + dims).value(), hopper()).value().tiles;
      EXPECT_EQ(std::pair(tiles.head_dim, tiles.head_dim_v), std::pair(head_dim, head_dim_v)) << pass << dims;
    }
  }
}

}  // namespace
}  // namespace tilewise
