// Problems for fuzzing: a seed is a problem, and every feature appears alone and with the others.
#include <algorithm>
#include <array>
#include <cmath>

#include "reference/random.h"
#include "reference/trial.h"

namespace tilewise::reference {

Layout random_layout(uint64_t seed) { return static_cast<Layout>(hash(seed ^ 0x1a1) % 4); }

Problem random_problem(uint64_t seed, const FuzzLimits& limits) {
  Random random{hash(seed ^ 0xf022)};
  const auto small = [&](int64_t low, int64_t high, double power) {  // weighted to the low end
    return low + static_cast<int64_t>(std::pow(random.next(), power) * static_cast<double>(high - low + 1));
  };
  Problem p;
  p.pass = limits.backward && random.chance(0.5) ? Pass::kBackward : Pass::kForward;
  p.dtype = std::array{DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16}[random.integer(0, 2)];
  constexpr std::array<int64_t, 7> kUsualDims{16, 32, 64, 80, 96, 128, 256};
  const auto draw_dim = [&] {
    const int64_t dim = random.chance(0.4) ? kUsualDims[random.integer(0, 6)] : small(1, limits.max_head_dim, 3);
    return std::min(dim, limits.max_head_dim);
  };
  p.head_dim = draw_dim();
  p.head_dim_v = random.chance(0.7) ? p.head_dim : draw_dim();
  p.num_heads_kv = small(1, 3, 2);
  p.num_heads_q = p.num_heads_kv * (random.chance(0.5) ? 1 : small(1, 6, 1.5));
  p.batch = small(1, 4, 2);
  const double pairs = limits.max_products / static_cast<double>(p.batch * p.num_heads_q * std::max(p.head_dim, p.head_dim_v));
  const double side = std::sqrt(std::max(pairs, 1.0)), aspect = random.chance(0.4) ? 1 : std::exp2(8 * random.next() - 4);
  const auto draw_seqlen = [&](double bound) {
    const int64_t high = std::clamp<int64_t>(static_cast<int64_t>(bound), 1, limits.max_seqlen);
    return random.chance(0.3) ? high : random.integer(1, high);
  };
  if (random.chance(0.3)) {
    p.seqlen_q = p.seqlen_k = draw_seqlen(side);
  } else {
    p.seqlen_q = draw_seqlen(side * aspect);
    p.seqlen_k = draw_seqlen(side / aspect);
  }
  if (random.chance(0.02)) p.seqlen_k = 0;

  const double mask = random.next();
  if (mask < 0.35) p.window_right = 0;
  if (mask >= 0.3 && mask < 0.6) {
    const int64_t reach = std::max(p.seqlen_q, p.seqlen_k);
    if (random.chance(0.8)) p.window_left = small(0, reach, 2);
    if (mask >= 0.35 && random.chance(0.8)) p.window_right = small(0, reach, 2);
  }
  if (random.chance(0.4)) p.alignment = Alignment::kTopLeft;
  if (random.chance(0.35)) {
    p.packed = true;
    const int64_t most_q = p.batch * p.seqlen_q, most_k = p.batch * p.seqlen_k;
    if (random.chance(0.5)) p.batch = random.integer(p.batch, 12);
    p.total_q = random.chance(0.1) ? most_q : random.integer(0, most_q);
    p.total_k = random.chance(0.1) ? most_k : random.integer(0, most_k);
  }
  p.seqused_k = random.chance(0.2);
  if (random.chance(0.15)) p.softmax_scale = static_cast<float>(2 * random.next() - 1) / std::sqrt(static_cast<float>(p.head_dim));
  if (random.chance(0.15)) p.softcap = static_cast<float>(std::exp2(8 * random.next() - 2));
  p.alibi = random.chance(0.15);
  p.sink = random.chance(0.15);
  p.deterministic = random.chance(0.1);
  p.accumulate = p.pass == Pass::kBackward && random.chance(0.1);
  return p;
}

}  // namespace tilewise::reference
