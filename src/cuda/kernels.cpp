// THE table of CUDA kernels: names, what each accepts, how it is launched.
#include <algorithm>
#include <array>
#include <atomic>
#include <limits>

#include "cuda/arguments.h"
#include "cuda/backend.h"
#include "cuda/forward_rows.h"

namespace tilewise::cuda {
namespace {

// The narrowest row that fits is the fastest; every row computes smaller head dimensions by zero fill.
constexpr int kForwardRows = 32;
const std::array<ForwardRow, kForwardRows>& forward_table() {
  static const std::array<ForwardRow, kForwardRows> kTable = [] {
    std::array<ForwardRow, kForwardRows> table;
    auto next = table.begin();
    for (const auto& rows :
         {forward_rows<Forward64Short>(), forward_rows<Forward64Pair>(), forward_rows<Forward64>(), forward_rows<Forward96>(),
          forward_rows<Forward128>(), forward_rows<Forward192x128>(), forward_rows<Forward192>(), forward_rows<Forward256>()})
      next = std::copy(rows.begin(), rows.end(), next);
    return table;
  }();
  return kTable;
}

// Head dimension 64 has three shapes. Four warpgroups of 64 queries leave fewer rows unused at the end of a sequence than three and hide
// more of a tile's beginning and end; three with larger blocks have less to do for each key; two leave the least unused under a causal
// mask, where those of the upper rows wait for the others. Measured: docs/kernels/forward_sm90_tried.md.
constexpr int kShort = 4, kPair = 2;
std::string refuse_length(const ForwardConfig& c, const Problem& p) {
  if (c.head_dim != 64 || (c.consumers != kShort && c.consumers != kPair)) return {};
  const bool causal = p.window_right >= 0;
  const int64_t least = c.consumers == kShort && causal ? 768 : 0, most = c.consumers == kPair ? 767 : causal ? 4096 : 1536;
  if (!p.packed && (causal || c.consumers == kShort) && p.seqlen_q >= least && p.seqlen_q <= most) return {};
  return "is for dense tensors of " + std::to_string(least) + " to " + std::to_string(most) + " queries" +
         (c.consumers == kPair ? " with a bound on the right" : "") + ", where it is faster than the next";
}

std::string forward_name(const ForwardConfig& c) {
  std::string name = c.element == ptx::Element::kBFloat16 ? "forward_sm90_bf16_d" : "forward_sm90_fp16_d";
  name += std::to_string(c.head_dim);
  if (c.head_dim_v != c.head_dim) name += "_" + std::to_string(c.head_dim_v);
  if (c.head_dim == 64 && c.consumers == kShort) name += "_short";
  if (c.head_dim == 64 && c.consumers == kPair) name += "_pair";
  return c.modified ? name + "_modified" : name;
}

constexpr float kSmallestScale = 1e-30f;  // below it, products would be flushed to 0

// A bound on the tiles. A packed batch has at most one that is not full for each sequence.
int64_t tiles_of(const Problem& p, int block_m) {
  const int64_t rows = p.packed ? p.total_q + p.batch * block_m : p.seqlen_q;
  return p.num_heads_q * ((rows + block_m - 1) / block_m) * (p.packed ? 1 : p.batch);
}

// Under a causal mask the last tiles come one by one, falling in size, and fill what pairs would leave idle. Those of as many heads as
// leave whole rounds of pairs, and at least a round and a half of tiles (one where tiles are few); but only as many heads as L2 holds: with
// four rounds of head dimension 256 and no such bound the H200 was 2 to 5 % slower. A model of the schedule then finds 98 to 99.9 % of the
// CTAs' time used, 97 % with pairs alone; measured: +0.7 % on average, +2 % at s1024.
int64_t falling_heads(const Problem& p, int block_m, int64_t ctas) {
  constexpr int64_t kFewTiles = 16, kBytes = 40 << 20;
  const int64_t m_blocks = (p.seqlen_q + block_m - 1) / block_m, pairs = (m_blocks + 1) / 2, heads = p.batch * p.num_heads_q;
  const int64_t head_bytes = std::max<int64_t>(p.seqlen_k * (p.head_dim + p.head_dim_v) * 2 / (p.num_heads_q / p.num_heads_kv), 1);
  const int64_t most = std::max<int64_t>(kBytes / head_bytes, 1), least = (m_blocks < kFewTiles ? 2 : 3) * ctas / 2;
  int64_t rounds = heads * pairs / ctas;
  const auto falling = [&] { return heads - rounds * ctas / pairs; };
  while (rounds > 0 && falling() * m_blocks < least && heads - (rounds - 1) * ctas / pairs <= most) --rounds;
  return std::min({falling(), most, heads});
}

std::string forward_refusal(const ForwardRow& row, const Problem& p, const Device& device) {
  const ForwardConfig& c = row.config;
  if (std::string reason = refuse_shape(c.head_dim, c.head_dim_v, row.shared_bytes, c.element, p, device); !reason.empty()) return reason;
  // A maximum of scores is the maximum of scaled scores, and -inf stays -inf, only where the scale is above 0.
  const bool modified = p.softcap > 0 || p.alibi || !(p.scale() >= kSmallestScale);
  if (modified != c.modified)
    return c.modified ? "is for softcap, alibi and scales that are not positive" : "has no softcap, no alibi and only positive scales";
  if (std::string reason = refuse_length(c, p); !reason.empty()) return reason;
  if (const int64_t tiles = tiles_of(p, c.block_m()); tiles > std::numeric_limits<int>::max() - 2 * device.units)
    return "batch, heads and seqlen_q make " + std::to_string(tiles) + " tiles, more than fit into 32 bits";
  return {};
}

Status launch_forward(int index, const Problem& p, const Device& device, const Arguments& a, Stream stream) {
  const ForwardRow& row = forward_table()[index];
  const bool bfloat16 = row.config.element == ptx::Element::kBFloat16;
  if (!has_rows(a.q) || p.seqlen_q == 0 || p.batch == 0) return {};  // nothing to write
  if (Status status = check_rows({{"q", &a.q}, {"k", &a.k}, {"v", &a.v}, {"o", &a.o}}); !status.ok()) return status;
  const Current current(device);
  if (Status status = status_of(current.error(), "cudaSetDevice"); !status.ok()) return status;

  ForwardParams r{};
  if (Status status = make_tensor_map(map_source(a.q, bfloat16), 64, r.q_map); !status.ok()) return status;
  if (has_rows(a.k)) {
    if (Status status = make_tensor_map(map_source(a.k, bfloat16), row.config.block_n, r.k_map); !status.ok()) return status;
    if (Status status = make_tensor_map(map_source(a.v, bfloat16), row.config.block_n, r.v_map); !status.ok()) return status;
  }
  if (Status status = make_tensor_map(map_source(a.o, bfloat16), 64, r.o_map); !status.ok()) return status;
  r.q = elements(a.q);
  r.k = elements(a.k);
  r.v = elements(a.v);
  r.o = elements(a.o);
  r.lse = static_cast<float*>(a.lse.data);
  r.lse_batch = a.lse.rank == 3 ? a.lse.stride[0] : 0;
  r.lse_head = a.lse.rank == 3 ? a.lse.stride[1] : a.lse.stride[0];
  r.cu_seqlens_q = static_cast<const int*>(a.cu_seqlens_q.data);
  r.cu_seqlens_k = static_cast<const int*>(a.cu_seqlens_k.data);
  r.seqused_k = static_cast<const int*>(a.seqused_k.data);
  r.alibi_slopes = static_cast<const float*>(a.alibi_slopes.data);
  r.alibi_batch = a.alibi_slopes.rank == 2 ? a.alibi_slopes.stride[0] : 0;
  r.sink = static_cast<const float*>(a.sink.data);
  r.window_left = p.window_left;
  r.window_right = p.window_right;
  r.batch = static_cast<int>(p.batch);
  r.num_heads = static_cast<int>(p.num_heads_q);
  r.group = static_cast<int>(p.num_heads_q / p.num_heads_kv);
  r.seqlen_q = static_cast<int>(p.seqlen_q);
  r.seqlen_k = static_cast<int>(p.seqlen_k);
  r.head_dim = static_cast<int>(p.head_dim);
  r.head_dim_v = static_cast<int>(p.head_dim_v);
  r.scale = p.scale();
  r.softcap = p.softcap;
  r.top_left = p.alignment == Alignment::kTopLeft;
  r.falling = p.window_right >= 0 && p.window_left < 0;
  r.paired_heads = r.falling ? static_cast<int>(p.batch * p.num_heads_q - falling_heads(p, row.config.block_m(), device.units)) : 0;
  const auto ctas = static_cast<unsigned>(std::min<int64_t>(device.units, tiles_of(p, row.config.block_m())));
  void* arguments[] = {&r};
  return status_of(
      cudaLaunchKernel(row.function, dim3(ctas), dim3(static_cast<unsigned>(row.config.threads())), arguments, row.shared_bytes, stream),
      "cudaLaunchKernel");
}

// A Kernel is plain functions, so each row has its own set.
template <int kIndex>
Kernel forward_kernel() {
  static const std::string kName = forward_name(forward_table()[kIndex].config);
  return {
      .name = kName,
      .device = DeviceType::kCuda,
      .pass = Pass::kForward,
      .refusal = [](const Problem& p, const Device& device) { return forward_refusal(forward_table()[kIndex], p, device); },
      .tile_plan =
          [](const Problem&, const Device& device) {
            const ForwardRow& row = forward_table()[kIndex];
            return TilePlan{.block_m = row.config.block_m(),
                            .block_n = row.config.block_n,
                            .desk_bytes = static_cast<int64_t>(row.shared_bytes),
                            .units = device.units,
                            .grouped = false,
                            .head_dim = row.config.head_dim,
                            .head_dim_v = row.config.head_dim_v};
          },
      .workspace_bytes = [](const Problem&, const Device&) { return size_t{0}; },
      .launch = [](const Problem& p, const Device& device, const Arguments& a,
                   Stream stream) { return launch_forward(kIndex, p, device, a, stream); },
      .prepare =
          [](const Device& device) {
            static std::atomic<uint64_t> loaded{0};
            const ForwardRow& row = forward_table()[kIndex];
            return prepare(loaded, device, row.shared_bytes, {row.function});
          },
  };
}

}  // namespace

const std::vector<Kernel>& kernels() {
  static const std::vector<Kernel> kKernels = []<size_t... kIndex>(std::index_sequence<kIndex...>) {
    std::vector<Kernel> rows{forward_kernel<static_cast<int>(kIndex)>()...};
    rows.insert(rows.end(), backward_kernels().begin(), backward_kernels().end());
    return rows;
  }
  (std::make_index_sequence<kForwardRows>());
  return kKernels;
}

}  // namespace tilewise::cuda
