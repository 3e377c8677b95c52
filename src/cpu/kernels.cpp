// The CPU's rows: one per instruction set and pass. Here a problem becomes Params, the work is cut into items, and OpenMP
// threads take them; the arithmetic is in forward.cc and backward.cc.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/backend.h"

namespace tilewise::cpu {
namespace {

constexpr int kMaxHeadDim = 512;

#if defined(__x86_64__)
constexpr const Isa* kIsas[] = {&avx512::kIsa, &avx2::kIsa, &sse4::kIsa};
#else
constexpr const Isa* kIsas[] = {&neon::kIsa};
#endif

// Instruction sets are listed best first and each contains those after it.
int rank_of(std::string_view arch) {
  int rank = 0;
  for (const Isa* isa : kIsas) {
    if (isa->name == arch) return rank;
    ++rank;
  }
  return rank;
}

std::string refusal(const Isa& isa, const Problem& p, const Device& device) {
  if (rank_of(device.arch) > rank_of(isa.name)) return "needs " + std::string(isa.name) + ", the device has " + device.arch;
  if (p.head_dim > kMaxHeadDim) return "head_dim " + std::to_string(p.head_dim) + " is above " + std::to_string(kMaxHeadDim);
  if (p.head_dim_v > kMaxHeadDim) return "head_dim_v " + std::to_string(p.head_dim_v) + " is above " + std::to_string(kMaxHeadDim);
  return {};
}

int64_t rows_per_head_group(const Problem& p) { return p.seqlen_q * (p.num_heads_q / p.num_heads_kv); }

// Keys whose scores take half of L1, in one tile or, backward, in two. It depends on the machine only, so that a row's
// result never depends on the batch.
int64_t near_keys(const Isa& isa, const Device& device, int tiles) {
  return std::clamp<int64_t>(device.near_bytes / 2 / tiles / (3 * isa.lanes * 4) / 8 * 8, 32, 128);
}

// block_m: Q, O and one tile of K and V take half of L2, and every thread gets four items where the problem has them; a
// row's result does not depend on it.
TileShape forward_shape(const Isa& isa, const Problem& p, const Device& device) {
  const int64_t tile_rows = 3 * isa.lanes, block_n = near_keys(isa, device, 1);
  const int64_t keys_bytes = block_n * (p.head_dim + p.head_dim_v) * 4;
  const int64_t tile_bytes = tile_rows * (p.head_dim + p.head_dim_v) * 4;
  const int64_t most = std::clamp<int64_t>((device.desk_bytes / 2 - keys_bytes) / tile_bytes, 1, 8);
  const int64_t rows = std::max<int64_t>(rows_per_head_group(p), 1), groups = std::max<int64_t>(p.batch * p.num_heads_kv, 1);
  const int64_t blocks_wanted = ceil_div<int64_t>(4 * device.units, groups);
  const int64_t block_m = std::clamp<int64_t>(round_up(ceil_div(rows, blocks_wanted), tile_rows), tile_rows, most * tile_rows);
  // Equal blocks: 512 rows in three blocks are 176 + 176 + 160, not 192 + 192 + 128.
  const int64_t even = round_up<int64_t>(ceil_div(rows, ceil_div(rows, block_m)), isa.lanes);
  return {static_cast<int>(even), static_cast<int>(block_n), static_cast<int>(block_n)};
}

// block_n: K, V, dK and dV of a block take half of L2.
TileShape backward_shape(const Isa& isa, const Problem& p, const Device& device) {
  const int64_t tile_n = near_keys(isa, device, 2);
  const int64_t most = device.desk_bytes / 2 / (2 * 4 * (p.head_dim + p.head_dim_v));
  const int64_t block_n = std::clamp<int64_t>(most / tile_n, 1, 8) * tile_n;
  return {3 * isa.lanes, static_cast<int>(block_n), static_cast<int>(tile_n)};
}

Tensor tensor(const TensorView& t) {
  if (t.rank == 3) return {t.data, 0, t.stride[0], t.stride[1]};
  return {t.data, t.stride[0], t.stride[1], t.stride[2]};
}
RowTensor row_tensor(const TensorView& t) {
  float* data = static_cast<float*>(t.data);
  if (t.rank == 2) return {data, 0, t.stride[0]};
  return {data, t.stride[0], t.stride[1]};
}

// No sequence of the problem has more blocks of keys.
int most_blocks(const Params& p) { return std::max(ceil_div(p.seqlen_k, p.tile.block_n), 1); }

Params make_params(const Isa& isa, const Problem& p, const Device& device, const Arguments& a) {
  Params r{};
  r.element = p.dtype == DataType::kFloat32 ? Element::kFloat32 : p.dtype == DataType::kBFloat16 ? Element::kBFloat16 : Element::kFloat16;
  r.batch = static_cast<int>(p.batch);
  r.seqlen_q = static_cast<int>(p.seqlen_q);
  r.seqlen_k = static_cast<int>(p.seqlen_k);
  r.num_heads_q = static_cast<int>(p.num_heads_q);
  r.num_heads_kv = static_cast<int>(p.num_heads_kv);
  r.group = r.num_heads_q / r.num_heads_kv;
  r.head_dim = static_cast<int>(p.head_dim);
  r.head_dim_v = static_cast<int>(p.head_dim_v);
  r.scale = p.scale();
  r.softcap = p.softcap;
  r.window_left = p.window_left;
  r.window_right = p.window_right;
  r.top_left = p.alignment == Alignment::kTopLeft;
  r.accumulate = p.accumulate;
  r.cu_seqlens_q = static_cast<const int*>(a.cu_seqlens_q.data);
  r.cu_seqlens_k = static_cast<const int*>(a.cu_seqlens_k.data);
  r.seqused_k = static_cast<const int*>(a.seqused_k.data);
  r.alibi_slopes = static_cast<const float*>(a.alibi_slopes.data);
  r.alibi_batch = a.alibi_slopes.rank == 2 ? a.alibi_slopes.stride[0] : 0;
  r.sink = static_cast<const float*>(a.sink.data);
  r.q = tensor(a.q);
  r.k = tensor(a.k);
  r.v = tensor(a.v);
  r.o = tensor(a.o);
  r.lse = row_tensor(a.lse);
  r.do_ = tensor(a.do_);
  r.dq = tensor(a.dq);
  r.dk = tensor(a.dk);
  r.dv = tensor(a.dv);
  r.dlse = row_tensor(a.dlse);
  r.total_rows = p.packed ? p.total_q : p.batch * p.seqlen_q;
  r.dq_tiles = r.total_rows * r.group / (3 * isa.lanes) + p.batch;
  r.tile = p.pass == Pass::kForward ? forward_shape(isa, p, device) : backward_shape(isa, p, device);
  // As many blocks of keys at once as keep every thread busy, since each costs a buffer.
  const int64_t heads = std::max<int64_t>(p.batch * p.num_heads_kv, 1);
  r.blocks_at_once = static_cast<int>(std::clamp<int64_t>(ceil_div<int64_t>(device.units, heads), 1, most_blocks(r)));
  return r;
}

// Packed lengths are the caller's data: a wrong one would lead outside the tensors.
Status check_lengths(const char* name, const char* above, const int* cu_seqlens, int64_t batch, int64_t longest, int64_t total) {
  if (!cu_seqlens) return {};
  for (int64_t b = 0; b <= batch; ++b) {
    const int64_t begin = b == 0 ? 0 : cu_seqlens[b - 1], end = cu_seqlens[b];
    const char* rule = end < begin                      ? ", below the one before it: "
                       : end > total                    ? ", above the rows of the tensor: "
                       : b > 0 && end - begin > longest ? above
                                                        : nullptr;
    if (!rule) continue;
    const int64_t bound = end < begin ? begin : end > total ? total : longest;
    return invalid_argument(std::string(name) + "[" + std::to_string(b) + "] is " + std::to_string(end) + rule + std::to_string(bound));
  }
  return {};
}

Status check_lengths(const Problem& p, const Params& params) {
  Status status = check_lengths("cu_seqlens_q", ", a sequence longer than max_seqlen_q (the problem's q): ", params.cu_seqlens_q, p.batch,
                                p.seqlen_q, p.total_q);
  return status.ok() ? check_lengths("cu_seqlens_k", ", a sequence longer than max_seqlen_k (the problem's k): ", params.cu_seqlens_k,
                                     p.batch, p.seqlen_k, p.total_k)
                     : status;
}

// Calls work(item, scratch of this thread) for every item, in order of the items, each by whichever thread is free.
template <class Work>
void for_each_item(int64_t items, int threads, char* scratch, size_t scratch_bytes, Work work) {
#pragma omp parallel num_threads(threads)
  {
    char* mine = scratch + static_cast<size_t>(omp_get_thread_num()) * scratch_bytes;
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) work(item, mine);
  }
}

size_t page_round(size_t bytes) { return round_up(bytes, size_t{4096}); }  // threads share no page

size_t forward_workspace(const Isa& isa, const Problem& p, const Device& device) {
  return page_round(isa.forward_scratch(make_params(isa, p, device, {}))) * static_cast<size_t>(device.units);
}

Status forward(const Isa& isa, const Problem& p, const Device& device, const Arguments& a) {
  const Params params = make_params(isa, p, device, a);
  if (Status status = check_lengths(p, params); !status.ok()) return status;
  // Within a head the last rows come first: under a causal mask they are the longest, and short ones fill the end.
  const int64_t m_blocks = ceil_div<int64_t>(rows_per_head_group(p), params.tile.block_m);
  for_each_item(p.batch * p.num_heads_kv * m_blocks, device.units, static_cast<char*>(a.workspace), page_round(isa.forward_scratch(params)),
                [&](int64_t item, char* scratch) {
                  const int64_t head = item / m_blocks, m_block = m_blocks - 1 - item % m_blocks;
                  isa.forward_item(params, static_cast<int>(head / p.num_heads_kv), static_cast<int>(head % p.num_heads_kv), m_block,
                                   scratch);
                });
  return {};
}

// Backward's workspace: scratch of the threads, delta, and the sums of dq.
struct BackwardWorkspace {
  size_t scratch, delta, dq_sum, bytes;

  BackwardWorkspace(const Isa& isa, const Params& p, const Device& device) {
    const int64_t buffers = p.blocks_at_once == 1 ? 1 : 1 + p.blocks_at_once;
    const int64_t dq_floats = buffers * p.num_heads_kv * p.dq_tiles * round_up(p.head_dim, 8) * 3 * isa.lanes;
    scratch = page_round(isa.backward_scratch(p));
    delta = scratch * static_cast<size_t>(device.units);
    dq_sum = delta + page_round(static_cast<size_t>(p.num_heads_q * p.total_rows) * sizeof(float));
    bytes = dq_sum + static_cast<size_t>(dq_floats) * sizeof(float);
  }
};

// dsink_h = -sum over rows of exp(sink - lse) * delta, row after row.
void sink_gradients(const Problem& problem, const Params& p, int threads, float* dsink) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int head = 0; head < p.num_heads_q; ++head) {
    double sum = 0;
    for (int b = 0; b < p.batch; ++b) {
      const Sequence seq = sequence(p, b);
      const float* lse = p.lse.data + b * p.lse.batch + head * p.lse.head + seq.q_row;
      const float* delta = p.delta + head * p.total_rows + (problem.packed ? seq.q_row : static_cast<int64_t>(b) * p.seqlen_q);
      for (int i = 0; i < seq.seqlen_q; ++i) {
        const float sink = p.sink[head];
        if (sink != -std::numeric_limits<float>::infinity()) sum -= std::exp(static_cast<double>(sink) - lse[i]) * delta[i];
      }
    }
    dsink[head] = static_cast<float>(sum);
  }
}

Status backward(const Isa& isa, const Problem& p, const Device& device, const Arguments& a) {
  Params params = make_params(isa, p, device, a);
  if (Status status = check_lengths(p, params); !status.ok()) return status;
  char* workspace = static_cast<char*>(a.workspace);
  const BackwardWorkspace at(isa, params, device);
  params.delta = reinterpret_cast<float*>(workspace + at.delta);
  params.dq_sum = reinterpret_cast<float*>(workspace + at.dq_sum);

  const int heads = params.num_heads_kv, at_once = params.blocks_at_once;
  const int64_t groups = p.batch * p.num_heads_kv, tiles = ceil_div<int64_t>(rows_per_head_group(p), 3 * isa.lanes);
  // work(batch index, head, i, scratch) for every head and every i below `count`.
  const auto for_each = [&](int64_t count, auto work) {
    for_each_item(groups * count, device.units, workspace, at.scratch, [&](int64_t item, char* scratch) {
      const int64_t group = item / count;
      work(static_cast<int>(group / heads), static_cast<int>(group % heads), item % count, scratch);
    });
  };
  for_each(tiles, [&](int b, int head, int64_t tile, char*) { isa.backward_delta(params, b, head, tile); });
  if (a.dsink) sink_gradients(p, params, device.units, static_cast<float*>(a.dsink.data));
  if (at_once == 1) {
    for_each(1, [&](int b, int head, int64_t, char* scratch) { isa.backward_item(params, b, head, 0, most_blocks(params), scratch); });
  } else {
    for (int begin = 0; begin < most_blocks(params); begin += at_once) {
      for_each(at_once, [&](int b, int head, int64_t i, char* scratch) {
        const int block = begin + static_cast<int>(i);
        isa.backward_item(params, b, head, block, block + 1, scratch);
      });
      for_each(tiles, [&](int b, int head, int64_t tile, char*) { isa.backward_add(params, b, head, tile, begin); });
    }
  }
  for_each(tiles, [&](int b, int head, int64_t tile, char* scratch) { isa.backward_dq(params, b, head, tile, scratch); });
  return {};
}

template <const Isa& kIsa>
Kernel forward_row(std::string_view name) {
  return {name,
          DeviceType::kCpu,
          Pass::kForward,
          [](const Problem& p, const Device& d) { return refusal(kIsa, p, d); },
          [](const Problem& p, const Device& d) {
            constexpr int64_t kColumns = 8;  // of O at once, as in forward.cc
            const Params params = make_params(kIsa, p, d, {});
            return TilePlan{.block_m = params.tile.block_m,
                            .block_n = params.tile.block_n,
                            .desk_bytes = static_cast<int64_t>(kIsa.forward_scratch(params)),
                            .units = d.units,
                            .grouped = true,
                            .head_dim = p.head_dim,
                            .head_dim_v = round_up<int64_t>(p.head_dim_v, kColumns)};
          },
          [](const Problem& p, const Device& d) { return forward_workspace(kIsa, p, d); },
          [](const Problem& p, const Device& d, const Arguments& a, Stream) { return forward(kIsa, p, d, a); }};
}

template <const Isa& kIsa>
Kernel backward_row(std::string_view name) {
  return {name,
          DeviceType::kCpu,
          Pass::kBackward,
          [](const Problem& p, const Device& d) { return refusal(kIsa, p, d); },
          [](const Problem& p, const Device& d) {
            // S and dP take the dimensions as they are; dQ, dK and dV have whole vectors of them, which is not counted.
            const Params params = make_params(kIsa, p, d, {});
            return TilePlan{.block_m = params.tile.block_m,
                            .block_n = params.tile.block_n,
                            .desk_bytes = static_cast<int64_t>(kIsa.backward_scratch(params)),
                            .units = d.units,
                            .grouped = true,
                            .head_dim = p.head_dim,
                            .head_dim_v = p.head_dim_v};
          },
          [](const Problem& p, const Device& d) { return BackwardWorkspace(kIsa, make_params(kIsa, p, d, {}), d).bytes; },
          [](const Problem& p, const Device& d, const Arguments& a, Stream) { return backward(kIsa, p, d, a); }};
}

}  // namespace

int most_threads() { return std::max(64, 4 * omp_get_num_procs()); }

Status check_threads(const Device& device) {
  const std::string threads = std::to_string(device.units), what = "Device::cpu(" + threads + "): threads " + threads;
  if (device.units < 0) return invalid_argument(what + " is negative");
  if (device.units <= most_threads()) return {};
  return invalid_argument(what + " is above " + std::to_string(most_threads()) + ", the larger of 64 and 4 for each of the " +
                          std::to_string(omp_get_num_procs()) + " cores that this process may use");
}

const Isa* best_isa_of(const Device& device) {
  for (const Isa* isa : kIsas) {
    if (rank_of(device.arch) <= rank_of(isa->name)) return isa;
  }
  return nullptr;
}

const std::vector<Kernel>& kernels() {
  static const std::vector<Kernel> rows {
#if defined(__x86_64__)
    forward_row<avx512::kIsa>("forward_avx512"), forward_row<avx2::kIsa>("forward_avx2"), forward_row<sse4::kIsa>("forward_sse4"),
        backward_row<avx512::kIsa>("backward_avx512"), backward_row<avx2::kIsa>("backward_avx2"), backward_row<sse4::kIsa>("backward_sse4"),
#else
    forward_row<neon::kIsa>("forward_neon"), backward_row<neon::kIsa>("backward_neon"),
#endif
  };
  return rows;
}

}  // namespace tilewise::cpu
