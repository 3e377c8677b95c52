// All tensors of a problem in host memory, contiguous, drawn from a seed: for tests of the references alone.
#pragma once

#include <deque>
#include <random>
#include <vector>

#include "reference/attention.h"
#include "tilewise/tilewise.hpp"

namespace tilewise::reference {

struct HostTensors {
  Problem problem;
  Arguments arguments;
  std::deque<std::vector<std::byte>> memory;
  std::mt19937_64 random;

  HostTensors(const Problem& p, uint64_t seed) : problem(p), random(seed) {
    const auto rows = [&](bool keys, int64_t heads, int64_t dim) {
      const int64_t total = keys ? p.total_k : p.total_q, seqlen = keys ? p.seqlen_k : p.seqlen_q;
      return p.packed ? std::vector<int64_t>{total, heads, dim} : std::vector<int64_t>{p.batch, seqlen, heads, dim};
    };
    const std::vector<int64_t> lse =
        p.packed ? std::vector<int64_t>{p.num_heads_q, p.total_q} : std::vector<int64_t>{p.batch, p.num_heads_q, p.seqlen_q};
    Arguments& a = arguments;
    a.q = normal(p.dtype, rows(false, p.num_heads_q, p.head_dim));
    a.k = normal(p.dtype, rows(true, p.num_heads_kv, p.head_dim));
    a.v = normal(p.dtype, rows(true, p.num_heads_kv, p.head_dim_v));
    a.o = make(p.dtype, rows(false, p.num_heads_q, p.head_dim_v));
    a.lse = make(DataType::kFloat32, lse);
    if (p.packed) {
      a.cu_seqlens_q = starts(p.seqlen_q, p.total_q);
      a.cu_seqlens_k = starts(p.seqlen_k, p.total_k);
    }
    if (p.seqused_k) {
      a.seqused_k = make(DataType::kInt32, {p.batch});
      for (int64_t b = 0; b < p.batch; ++b) static_cast<int32_t*>(a.seqused_k.data)[b] = static_cast<int32_t>(random() % (p.seqlen_k + 1));
    }
    if (p.alibi)
      a.alibi_slopes =
          normal(DataType::kFloat32, seed % 2 ? std::vector<int64_t>{p.num_heads_q} : std::vector<int64_t>{p.batch, p.num_heads_q});
    if (p.sink) a.sink = normal(DataType::kFloat32, {p.num_heads_q});
    if (p.pass == Pass::kForward) return;
    a.do_ = normal(p.dtype, rows(false, p.num_heads_q, p.head_dim_v));
    if (seed % 3) a.dlse = normal(DataType::kFloat32, lse);
    a.dq = make(p.dtype, rows(false, p.num_heads_q, p.head_dim));
    a.dk = make(p.dtype, rows(true, p.num_heads_kv, p.head_dim));
    a.dv = make(p.dtype, rows(true, p.num_heads_kv, p.head_dim_v));
    if (p.sink) a.dsink = make(DataType::kFloat32, {p.num_heads_q});
  }
  HostTensors(const HostTensors&) = delete;
  HostTensors& operator=(const HostTensors&) = delete;

  TensorView make(DataType dtype, const std::vector<int64_t>& shape) {
    TensorView view;
    view.dtype = dtype, view.rank = static_cast<int>(shape.size());
    int64_t count = 1;
    for (int d = view.rank - 1; d >= 0; --d) view.shape[d] = shape[d], view.stride[d] = count, count *= shape[d];
    memory.emplace_back(count * 4 + 4);
    view.data = memory.back().data();
    return view;
  }
  // Multiples of 2^-10, so that small powers of two may be added to them without rounding.
  TensorView normal(DataType dtype, const std::vector<int64_t>& shape) {
    const TensorView view = make(dtype, shape);
    std::normal_distribution<float> distribution;
    for (int64_t n = 0; n < count(view); ++n) write_element(view.data, dtype, n, std::round(distribution(random) * 0x1p10f) * 0x1p-10f);
    return view;
  }
  TensorView starts(int64_t longest, int64_t total) {
    const TensorView view = make(DataType::kInt32, {problem.batch + 1});
    int32_t* values = static_cast<int32_t*>(view.data);
    values[0] = 0;
    for (int64_t b = 0; b < problem.batch; ++b) {
      const int64_t low = std::max<int64_t>(0, total - (problem.batch - b - 1) * longest), high = std::min(longest, total);
      const int64_t length = random() % 4 ? low + static_cast<int64_t>(random() % static_cast<uint64_t>(high - low + 1)) : low;
      values[b + 1] = static_cast<int32_t>(values[b] + length), total -= length;
    }
    return view;
  }
  static int64_t count(const TensorView& view) {
    int64_t n = 1;
    for (int d = 0; d < view.rank; ++d) n *= view.shape[d];
    return n;
  }
  static float get(const TensorView& view, int64_t index) { return read_element(view.data, view.dtype, index); }
  static void set(const TensorView& view, std::initializer_list<float> values) {
    int64_t n = 0;
    for (float value : values) write_element(view.data, view.dtype, n++, value);
  }
};

}  // namespace tilewise::reference
