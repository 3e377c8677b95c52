// Sequences of different lengths, packed one after the other: no padding is stored and none is computed.
#include <cstdio>
#include <random>
#include <vector>

#include "tilewise/tilewise.hpp"

using tilewise::DataType;
using tilewise::TensorView;

int main() {
  const int64_t heads = 4, dim = 64;
  const std::vector<int32_t> cu_seqlens = {0, 100, 100, 357, 400};  // lengths 100, 0, 257 and 43
  const int64_t batch = static_cast<int64_t>(cu_seqlens.size()) - 1, total = cu_seqlens.back(), row = heads * dim;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto draw = [&] {
    std::vector<float> values(static_cast<size_t>(total * row));
    for (float& value : values) value = normal(random);
    return values;
  };
  const std::vector<float> q = draw(), k = draw(), v = draw();
  std::vector<float> packed(q.size()), one_by_one(q.size());

  tilewise::Options options;
  options.causal = true;
  options.cu_seqlens_q = options.cu_seqlens_k = TensorView::contiguous(cu_seqlens.data(), DataType::kInt32, {batch + 1});
  options.max_seqlen_q = options.max_seqlen_k = 257;
  const auto view = [&](const std::vector<float>& values) {
    return TensorView::contiguous(values.data(), DataType::kFloat32, {total, heads, dim});
  };
  tilewise::forward(view(q), view(k), view(v), view(packed), {}, options).check();  // check() throws where something is wrong

  // The same, each sequence by itself.
  for (size_t b = 0; b + 1 < cu_seqlens.size(); ++b) {
    const auto sequence = [&](const std::vector<float>& values) {
      return TensorView::contiguous(values.data() + cu_seqlens[b] * row, DataType::kFloat32,
                                    {1, cu_seqlens[b + 1] - cu_seqlens[b], heads, dim});
    };
    tilewise::Options alone;
    alone.causal = true;
    tilewise::forward(sequence(q), sequence(k), sequence(v), sequence(one_by_one), {}, alone).check();
  }
  const bool equal = packed == one_by_one;
  std::printf("%d sequences, %d tokens in one call: %s as one by one\n", int(batch), int(total),
              equal ? "bit for bit the same" : "NOT the same");
  return equal ? 0 : 1;
}
