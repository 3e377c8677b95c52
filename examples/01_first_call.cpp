// The first call: attention over dense tensors, and how far it is from float64.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "tilewise/tilewise.hpp"

int main() {
  const int64_t batch = 1, seqlen = 512, heads = 4, dim = 64;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto draw = [&] {
    std::vector<float> values(static_cast<size_t>(batch * seqlen * heads * dim));
    for (float& value : values) value = normal(random);
    return values;
  };
  const std::vector<float> q = draw(), k = draw(), v = draw();
  std::vector<float> o(q.size());

  // A view is a pointer, a type, a shape and strides: nothing is copied. Dimensions: batch, sequence, head, head dimension.
  const auto view = [&](const std::vector<float>& values) {
    return tilewise::TensorView::contiguous(values.data(), tilewise::DataType::kFloat32, {batch, seqlen, heads, dim});
  };
  tilewise::Options options;
  options.causal = true;
  const tilewise::Status status = tilewise::forward(view(q), view(k), view(v), view(o), {}, options);
  if (!status.ok()) {
    std::fprintf(stderr, "%s\n", status.message().c_str());
    return 1;
  }

  // The definition, in float64: o_i = sum over j <= i of softmax(q_i k_j / sqrt(dim)) v_j.
  double worst = 0;
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < seqlen; ++i) {
      const auto row = [&](const std::vector<float>& values, int64_t j) { return values.data() + (j * heads + h) * dim; };
      std::vector<double> expected(static_cast<size_t>(dim));
      double sum = 0;
      for (int64_t j = 0; j <= i; ++j) {
        double score = 0;
        for (int64_t c = 0; c < dim; ++c) score += double{row(q, i)[c]} * row(k, j)[c];
        const double weight = std::exp(score / std::sqrt(double(dim)));
        sum += weight;
        for (int64_t c = 0; c < dim; ++c) expected[size_t(c)] += weight * row(v, j)[c];
      }
      for (int64_t c = 0; c < dim; ++c) worst = std::fmax(worst, std::fabs(row(o, i)[c] - expected[size_t(c)] / sum));
    }
  }
  std::printf("causal attention over %d tokens, %d heads of %d: largest difference from float64 %.2g\n", int(seqlen), int(heads), int(dim),
              worst);
  return worst < 1e-5 ? 0 : 1;
}
