// Keys in parts, as in ring attention, where every machine holds a part of them and the parts go round: forward of each part, merged by
// lse; then backward of each part with the o and lse of the whole, and float32 gradients to which each part adds its share.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "tilewise/tilewise.hpp"

using tilewise::DataType;
using tilewise::TensorView;
using Floats = std::vector<float>;

constexpr int64_t kSeqlen = 256, kParts = 2, kPart = kSeqlen / kParts, kHeads = 4, kDim = 64, kRow = kHeads * kDim;

// Keys `first` to `first + count` of a tensor, or all rows of q, o and their gradients.
TensorView rows(const Floats& x, int64_t first = 0, int64_t count = kSeqlen) {
  return TensorView::contiguous(x.data() + first * kRow, DataType::kFloat32, {1, count, kHeads, kDim});
}
TensorView per_row(const Floats& x) { return TensorView::contiguous(x.data(), DataType::kFloat32, {1, kHeads, kSeqlen}); }

double largest_difference(const Floats& x, const Floats& y) {
  double largest = 0;
  for (size_t i = 0; i < x.size(); ++i) largest = std::max(largest, std::fabs(double{x[i]} - y[i]));
  return largest;
}

double check(bool causal) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto draw = [&] {
    Floats values(kSeqlen * kRow);
    for (float& value : values) value = normal(random);
    return values;
  };
  const Floats q = draw(), k = draw(), v = draw(), do_ = draw();
  tilewise::Options whole;
  whole.causal = causal;
  Floats o(q.size()), lse(kHeads * kSeqlen), dq(q.size()), dk(q.size()), dv(q.size());
  forward(rows(q), rows(k), rows(v), rows(o), per_row(lse), whole).check();
  backward(rows(do_), rows(q), rows(k), rows(v), rows(o), per_row(lse), rows(dq), rows(dk), rows(dv), whole).check();

  // Query i sees key j of part p where p * kPart + j <= i. The diagonal ends at the last key of the part, that far from where it should.
  const auto options_of = [&](int64_t part) {
    tilewise::Options options;
    if (causal) options.window_right = kSeqlen - (part + 1) * kPart;
    return options;
  };
  Floats ring_o(q.size()), ring_lse(lse.size(), -INFINITY), part_o(q.size()), part_lse(lse.size());
  for (int64_t part = 0; part < kParts; ++part) {
    const int64_t key = part * kPart;
    forward(rows(q), rows(k, key, kPart), rows(v, key, kPart), rows(part_o), per_row(part_lse), options_of(part)).check();
    for (int64_t head = 0; head < kHeads; ++head) {
      for (int64_t i = 0; i < kSeqlen; ++i) {
        float &sum = ring_lse[head * kSeqlen + i], more = part_lse[head * kSeqlen + i];
        if (more == -INFINITY) continue;  // the row sees no key of this part
        const float larger = std::max(sum, more), merged = larger + std::log(std::exp(sum - larger) + std::exp(more - larger));
        const float keep = std::exp(sum - merged), add = std::exp(more - merged);
        for (int64_t x = i * kRow + head * kDim; x < i * kRow + (head + 1) * kDim; ++x) ring_o[x] = keep * ring_o[x] + add * part_o[x];
        sum = merged;
      }
    }
  }

  Floats ring_dq(q.size()), ring_dk(q.size()), ring_dv(q.size());  // float32 for inputs of any type, and 0 at first
  for (int64_t part = 0; part < kParts; ++part) {
    const int64_t key = part * kPart;
    tilewise::Options options = options_of(part);
    options.accumulate = true;
    backward(rows(do_), rows(q), rows(k, key, kPart), rows(v, key, kPart), rows(ring_o), per_row(ring_lse), rows(ring_dq),
             rows(ring_dk, key, kPart), rows(ring_dv, key, kPart), options)
        .check();
  }
  const double difference = std::max({largest_difference(o, ring_o), largest_difference(lse, ring_lse), largest_difference(dq, ring_dq),
                                      largest_difference(dk, ring_dk), largest_difference(dv, ring_dv)});
  std::printf("%s, %d parts of the keys and all at once: o, lse, dq, dk and dv differ by at most %.1e\n", causal ? "causal" : "full",
              int(kParts), difference);
  return difference;
}

int main() { return check(false) < 1e-5 && check(true) < 1e-5 ? 0 : 1; }
