// The backward rows of the table: what each accepts, its workspace, and the launches of a run, which overlap.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>

#include "cuda/arguments.h"
#include "cuda/backend.h"
#include "cuda/backward_counts.h"
#include "cuda/backward_rows.h"

namespace tilewise::cuda {
namespace {

// The narrowest row that fits is the fastest; every row computes smaller head dimensions by zero fill.
constexpr int kRows = 24;
const std::array<BackwardRow, kRows>& table() {
  static const std::array<BackwardRow, kRows> kTable = [] {
    std::array<BackwardRow, kRows> rows;
    auto next = rows.begin();
    for (const auto& shape : {backward_rows<Backward64>(), backward_rows<Backward96>(), backward_rows<Backward128>(),
                              backward_rows<Backward192x128>(), backward_rows<Backward192>(), backward_rows<Backward256>()})
      next = std::copy(shape.begin(), shape.end(), next);
    return rows;
  }();
  return kTable;
}

std::string name_of(const BackwardConfig& c) {
  std::string name = c.element == ptx::Element::kBFloat16 ? "backward_sm90_bf16_d" : "backward_sm90_fp16_d";
  name += std::to_string(c.head_dim);
  if (c.head_dim_v != c.head_dim) name += "_" + std::to_string(c.head_dim_v);
  return c.modified ? name + "_modified" : name;
}

struct Workspace {
  size_t rows, addends, dsink_sum, block_order;                 // dq_sum comes first
  size_t turn, spoilt, spoilt_keys, progress, counters, bytes;  // begin with 0, from turn on
  Workspace(const Problem& p, const BackwardConfig& c, const Device& device) {
    const Counts counts(p, c, device);
    const auto count = static_cast<size_t>(counts.all_tiles), head_dim = static_cast<size_t>(c.head_dim);
    const auto aligned = [](size_t bytes_) { return round_up(bytes_, size_t{256}); };
    rows = aligned(static_cast<size_t>(counts.ring * (p.num_heads_q / p.num_heads_kv) * counts.q_tiles) * kBlockM *
                   static_cast<size_t>(c.sum_columns(p.deterministic)) * sizeof(float));
    addends = rows + aligned(c.addends ? 0 : count * kRowFloats * sizeof(float));
    dsink_sum = addends + aligned(c.addends ? count * kAddendBytes : 0);
    block_order = dsink_sum + aligned(2 * count * sizeof(float));
    turn = block_order + aligned(p.packed ? static_cast<size_t>(counts.k_blocks) * sizeof(Place) : 0);
    spoilt = turn + aligned(count * static_cast<size_t>(c.ctas()) * sizeof(int));
    spoilt_keys = spoilt + aligned(count * (head_dim / 32) * sizeof(SpoiltRows));
    progress = spoilt_keys + aligned(static_cast<size_t>(counts.all_key_tiles) * sizeof(SpoiltKeys));
    counters = progress + aligned(static_cast<size_t>(counts.units) * sizeof(Progress));
    bytes = counters + aligned(sizeof(Counters));
  }
};

std::string refusal(const BackwardRow& row, const Problem& p, const Device& device) {
  const BackwardConfig& c = row.config;
  if (std::string reason = refuse_shape(c.head_dim, c.head_dim_v, row.shared_bytes, c.element, p, device); !reason.empty()) return reason;
  if (device.units < c.ctas()) return "needs two SMs";
  if ((p.softcap > 0 || p.alibi) != c.modified) return c.modified ? "is for softcap and alibi" : "has no softcap and no alibi";
  const Counts counts(p, c, device);
  const int64_t tiles = std::max({counts.all_tiles, counts.all_key_tiles, counts.claims + 2 * device.units});
  if (tiles > std::numeric_limits<int>::max() / 2)  // halves of tiles are counted
    return "batch, heads and sequences make " + std::to_string(tiles) + " tiles, more than fit into 31 bits";
  if (!counts.waits_for_earlier_only()) return "would wait for itself, which is an error of its own";
  return {};
}

// Launches kernels one after the other; each but the first may begin while the one before it ends.
class Chain {
 public:
  explicit Chain(Stream stream) : stream_(stream) {}
  void launch(const void* function, int64_t ctas, int threads, size_t shared_bytes, void** arguments, int cluster = 1) {
    if (ctas == 0 || error_ != cudaSuccess) return;
    cudaLaunchAttribute attributes[2]{};
    unsigned count = 0;
    if (!first_) {
      attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
      attributes[count].id = cudaLaunchAttributeClusterDimension;
      attributes[count++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(ctas));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream_;
    config.attrs = attributes;
    config.numAttrs = count;
    error_ = cudaLaunchKernelExC(&config, function, arguments);
    first_ = false;
  }
  Status status() const { return status_of(error_, "cudaLaunchKernelExC"); }

 private:
  Stream stream_;
  bool first_ = true;
  cudaError_t error_ = cudaSuccess;
};

Status launch(int index, const Problem& p, const Device& device, const Arguments& a, Stream stream) {
  const BackwardRow& row = table()[static_cast<size_t>(index)];
  const BackwardConfig& c = row.config;
  const bool bfloat16 = c.element == ptx::Element::kBFloat16;
  const Counts counts(p, c, device);
  if (Status status =
          check_rows({{"q", &a.q}, {"k", &a.k}, {"v", &a.v}, {"o", &a.o}, {"do", &a.do_}, {"dq", &a.dq}, {"dk", &a.dk}, {"dv", &a.dv}});
      !status.ok())
    return status;
  const Current current(device);
  if (Status status = status_of(current.error(), "cudaSetDevice"); !status.ok()) return status;

  BackwardParams r{};
  const auto map = [&](const TensorView& view, int rows, CUtensorMap& to) { return make_tensor_map(map_source(view, bfloat16), rows, to); };
  if (counts.all_tiles > 0 && has_rows(a.q)) {
    if (Status status = map(a.q, c.block_m, r.q_map); !status.ok()) return status;
    if (Status status = map(a.do_, c.block_m, r.do_map); !status.ok()) return status;
  }
  if (counts.works > 0 && has_rows(a.k)) {
    if (Status status = map(a.k, 64, r.k_map); !status.ok()) return status;
    if (Status status = map(a.v, 64, r.v_map); !status.ok()) return status;
  }
  const auto strides = [](const TensorView& t, long long& batch, long long& head) {
    batch = t.rank == 3 ? t.stride[0] : 0;
    head = t.rank == 3 ? t.stride[1] : t.stride[0];
  };
  r.q = elements(a.q);
  r.k = elements(a.k);
  r.v = elements(a.v);
  r.o = elements(a.o);
  r.do_ = elements(a.do_);
  r.dq = elements(a.dq);
  r.dk = elements(a.dk);
  r.dv = elements(a.dv);
  r.lse = static_cast<const float*>(a.lse.data);
  r.dlse = static_cast<const float*>(a.dlse.data);
  strides(a.lse, r.lse_batch, r.lse_head);
  strides(a.dlse, r.dlse_batch, r.dlse_head);
  r.cu_seqlens_q = static_cast<const int*>(a.cu_seqlens_q.data);
  r.cu_seqlens_k = static_cast<const int*>(a.cu_seqlens_k.data);
  r.seqused_k = static_cast<const int*>(a.seqused_k.data);
  r.alibi_slopes = static_cast<const float*>(a.alibi_slopes.data);
  r.alibi_batch = a.alibi_slopes.rank == 2 ? a.alibi_slopes.stride[0] : 0;
  r.sink = static_cast<const float*>(a.sink.data);
  r.dsink = static_cast<float*>(a.dsink.data);
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
  r.scale_log2 = std::abs(r.scale) < 1e-30F ? 1e-30F : r.scale * kLog2e;  // lse is divided by it
  r.softcap_log2 = p.softcap * kLog2e;
  r.tanh_factor = p.softcap > 0 ? 2 * kLog2e * r.scale / p.softcap : 0;
  r.top_left = p.alignment == Alignment::kTopLeft;
  r.deterministic = p.deterministic;
  r.alike = !p.packed && !r.seqused_k;
  r.part = trim(sequence_of(0, r.seqlen_q, r.seqlen_k, nullptr, nullptr, nullptr), r.window_left, r.window_right, r.top_left);
  r.accumulate = p.accumulate;
  r.block_m = c.block_m;
  r.block_n = c.block_n();
  r.q_tiles = static_cast<int>(counts.q_tiles);
  r.k_tiles = static_cast<int>(counts.k_tiles);
  r.k_blocks = static_cast<int>(counts.k_blocks);
  r.works = static_cast<int>(counts.works);
  r.units = static_cast<int>(counts.units);
  r.order = counts.order();
  r.shares = static_cast<int>(counts.shares);
  r.lag = static_cast<int>(counts.lag);
  r.claims = static_cast<int>(counts.claims);
  r.ahead = static_cast<int>(counts.ahead);
  r.ring = static_cast<int>(counts.ring);
  r.tiles = counts.tiles;
  r.sum_columns = c.sum_columns(p.deterministic);
  r.key_tiles = counts.key_tiles;
  char* workspace = static_cast<char*>(a.workspace);
  const Workspace at(p, c, device);
  r.dq_sum = reinterpret_cast<float*>(workspace);
  r.rows = reinterpret_cast<float*>(workspace + at.rows);
  r.addends = c.addends ? reinterpret_cast<unsigned char*>(workspace + at.addends) : nullptr;
  r.dsink_sum = reinterpret_cast<float*>(workspace + at.dsink_sum);
  r.block_order = reinterpret_cast<Place*>(workspace + at.block_order);
  r.turn = reinterpret_cast<int*>(workspace + at.turn);
  r.zeros = static_cast<long long>((at.bytes - at.turn) / 16);
  r.spoilt = reinterpret_cast<SpoiltRows*>(workspace + at.spoilt);
  r.spoilt_keys = reinterpret_cast<SpoiltKeys*>(workspace + at.spoilt_keys);
  r.progress = reinterpret_cast<Progress*>(workspace + at.progress);
  r.counters = reinterpret_cast<Counters*>(workspace + at.counters);

  int head_dim = c.head_dim;
  void* arguments[] = {&r, &head_dim};
  Chain chain(stream);
  const int64_t tiles = std::max(counts.all_tiles, counts.all_key_tiles);
  const bool rest = counts.ahead < counts.units;
  // The first rows may be few, what is set to 0 is not: four CTAs for an SM at least.
  constexpr int kCtaTiles = kPreprocessThreads / 64;
  const int64_t first =
      rest ? std::max(counts.ahead * r.group * counts.q_tiles, std::min<int64_t>(tiles, 4 * kCtaTiles * device.units)) : tiles;
  chain.launch(row.preprocess, std::max<int64_t>(ceil_div<int64_t>(first, kCtaTiles), 1), kPreprocessThreads, 0, arguments);
  if (rest) chain.launch(row.rest, counts.rest_ctas, kRestThreads, 0, arguments);
  const int64_t claimers = counts.works > 0 ? std::min<int64_t>(counts.claims, device.units / c.ctas()) : 0;
  chain.launch(row.function, c.ctas() * claimers, c.threads(), row.shared_bytes, arguments, c.ctas());
  chain.launch(row.postprocess, std::min<int64_t>(tiles, 4 * device.units) + (a.dsink ? p.num_heads_q : 0), kPostprocessThreads, 0,
               arguments);
  return chain.status();
}

// A Kernel is plain functions, so each row has its own set.
template <size_t kIndex>
Kernel kernel() {
  static const std::string kName = name_of(table()[kIndex].config);
  return {
      .name = kName,
      .device = DeviceType::kCuda,
      .pass = Pass::kBackward,
      .refusal = [](const Problem& p, const Device& device) { return refusal(table()[kIndex], p, device); },
      .tile_plan =
          [](const Problem&, const Device& device) {
            const BackwardRow& row = table()[kIndex];
            const BackwardConfig& c = row.config;
            return TilePlan{.block_m = c.block_m,
                            .block_n = 64 * c.own_tiles(),
                            .desk_bytes = static_cast<int64_t>(row.shared_bytes),
                            .units = device.units / c.ctas() * c.ctas(),
                            .grouped = false,
                            .head_dim = c.head_dim,
                            .head_dim_v = c.head_dim_v};
          },
      .workspace_bytes = [](const Problem& p, const Device& device) { return Workspace(p, table()[kIndex].config, device).bytes; },
      .launch = [](const Problem& p, const Device& device, const Arguments& a,
                   Stream stream) { return launch(static_cast<int>(kIndex), p, device, a, stream); },
      .prepare =
          [](const Device& device) {
            static std::atomic<uint64_t> loaded{0};
            const BackwardRow& row = table()[kIndex];
            return prepare(loaded, device, row.shared_bytes, {row.function, row.preprocess, row.rest, row.postprocess});
          },
  };
}

}  // namespace

const std::vector<Kernel>& backward_kernels() {
  static const std::vector<Kernel> kKernels = []<size_t... kIndex>(std::index_sequence<kIndex...>) {
    return std::vector<Kernel>{kernel<kIndex>()...};
  }
  (std::make_index_sequence<kRows>());
  return kKernels;
}

}  // namespace tilewise::cuda
