// Tilewise: exact attention, forward and backward, on CPUs and NVIDIA GPUs.
//
//   describe   Problem: shapes, types and features; no pointer.
//   plan       Plan::make(problem, device): everything that can fail or costs time. Immutable and thread-safe.
//   run        plan.run(arguments, stream): allocates nothing and never synchronises.
//
// For batch b, query i, key j, query head h and key/value head g = h / (num_heads_q / num_heads_kv):
//   s_ij  = softmax_scale * <q_i, k_j>;  softcap * tanh(s_ij / softcap) if softcap > 0
//         - alibi_slope_h * |i + offset - j|;  visible(i, j) decides which j take part
//   lse_i = log(sum_j exp(s_ij) [+ exp(sink_h)]);  o_i = sum_j exp(s_ij - lse_i) v_j
// A row that sees no key: o = 0, lse = -inf (its sink where there is one), gradients 0. docs/numerics.md has the guarantees.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tilewise/status.hpp"

#if defined(_WIN32)
#define TW_API __declspec(dllexport)
#else
#define TW_API __attribute__((visibility("default")))
#endif

struct CUstream_st;

namespace tilewise {

using Stream = CUstream_st*;  // a cudaStream_t, with no CUDA header; nullptr is the default stream and all that a CPU takes

enum class DataType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt32 = 3 };
enum class Pass : int32_t { kForward = 0, kBackward = 1 };
// Where the diagonal of a causal or windowed mask ends: offset = seqlen_k - seqlen_q (FlashAttention), or 0 (torch's is_causal).
enum class Alignment : int32_t { kBottomRight = 0, kTopLeft = 1 };
enum class DeviceType : int32_t { kCpu = 0, kCuda = 1 };

// What is to be computed. Prints and parses as one line: "fwd b2 q4096 k4096 h32/8 d128 bf16 causal".
struct TW_API Problem {
  Pass pass = Pass::kForward;
  DataType dtype = DataType::kFloat32;  // of q, k, v, o and their gradients
  int64_t batch = 1;
  int64_t seqlen_q = 0, seqlen_k = 0;         // packed: the upper bound of a sequence's length
  int64_t num_heads_q = 1, num_heads_kv = 1;  // num_heads_q is a multiple of num_heads_kv
  int64_t head_dim = 0, head_dim_v = 0;
  std::optional<float> softmax_scale;           // 1/sqrt(head_dim) where not given
  float softcap = 0;                            // 0: none
  int64_t window_left = -1, window_right = -1;  // inclusive, -1: unbounded; causal is window_right = 0
  Alignment alignment = Alignment::kBottomRight;
  bool packed = false;                                  // sequences lie one after the other; cu_seqlens says where
  int64_t total_q = 0, total_k = 0;                     // packed: rows of q and o, and of k and v
  bool seqused_k = false, alibi = false, sink = false;  // the argument of that name is given
  bool deterministic = false;                           // bitwise repeatable gradients; on the CPU they always are
  bool accumulate = false;  // backward: dq, dk and dv are float32, and the gradients are added to what they hold

  static Result<Problem> parse(std::string_view text);
  std::string to_string() const;
  Status validate() const;
  float scale() const;  // softmax_scale or its default
  bool operator==(const Problem&) const = default;
};

// A processor, as a value.
struct TW_API Device {
  DeviceType type = DeviceType::kCpu;
  int index = 0;
  std::string name;          // "AMD EPYC 9755", "NVIDIA H200"
  std::string arch;          // the best instruction set: "avx512", "avx2", "neon", "sm_90"
  int units = 1;             // threads that a plan uses, or SMs
  int64_t near_bytes = 0;    // L1 data cache of a core, registers of an SM
  int64_t desk_bytes = 0;    // fast memory of one unit: L2 cache of a core, shared memory of an SM
  int64_t memory_bytes = 0;  // the warehouse: DRAM, HBM

  // 0: OMP_NUM_THREADS, or every core this process may use. A plan takes up to 64 threads, or 4 for each of those cores.
  static Device cpu(int threads = 0);
  static Result<Device> cuda(int index = 0);
  static std::vector<Device> all();
};

// A tensor of the caller. Inputs are never written. The last dimension is contiguous, all other strides are free (on a GPU rows of q, k, v,
// o and their gradients also begin at multiples of 16 bytes).
struct TW_API TensorView {
  void* data = nullptr;
  DataType dtype = DataType::kFloat32;
  int rank = 0;
  std::array<int64_t, 4> shape{}, stride{};  // in elements

  static TensorView contiguous(const void* data, DataType dtype, std::initializer_list<int64_t> shape);
  explicit operator bool() const { return data != nullptr; }
};

// Everything that plan.run() reads and writes, in memory of the plan's device. Shapes are dense [or packed]. What is written shares no
// byte with any other tensor; tensors may lie interleaved in one buffer. On a GPU nobody checks what cu_seqlens holds: of a sequence that
// is longer than the problem's seqlen_q or seqlen_k rows may be left out. The workspace may hold anything, and does afterwards: runs that
// follow one another may share it, runs at the same time may not.
struct Arguments {
  TensorView q;               // [batch, seqlen_q, num_heads_q, head_dim]      [total_q, num_heads_q, head_dim]
  TensorView k;               // [batch, seqlen_k, num_heads_kv, head_dim]     [total_k, num_heads_kv, head_dim]
  TensorView v;               // [batch, seqlen_k, num_heads_kv, head_dim_v]   [total_k, num_heads_kv, head_dim_v]
  TensorView o;               // [batch, seqlen_q, num_heads_q, head_dim_v]    [total_q, num_heads_q, head_dim_v]; backward reads it
  TensorView lse;             // float32 [batch, num_heads_q, seqlen_q]        [num_heads_q, total_q]; optional forward, read backward
  TensorView cu_seqlens_q;    // int32 [batch + 1], packed: sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]
  TensorView cu_seqlens_k;    // int32 [batch + 1]
  TensorView seqused_k;       // int32 [batch], caps the keys of a sequence
  TensorView alibi_slopes;    // float32 [num_heads_q] or [batch, num_heads_q]
  TensorView sink;            // float32 [num_heads_q], a logit that takes part in the sum and has no value
  TensorView do_, dlse;       // as o and lse: gradients given to backward; dlse optional
  TensorView dq, dk, dv;      // as q, k, v: gradients that backward writes
  TensorView dsink;           // float32 [num_heads_q], optional
  void* workspace = nullptr;  // plan.workspace_bytes() bytes, aligned to 256
};

// One kernel that was considered for a plan: why it was refused, or empty.
struct Candidate {
  std::string name;
  std::string refusal;
};

class TW_API Plan {
 public:
  // Takes the first kernel that accepts; TILEWISE_KERNEL=name in the environment allows that kernel only.
  static Result<Plan> make(const Problem& problem, const Device& device = Device::cpu());
  // On a GPU it may be captured into a CUDA graph. Addresses (the workspace's too), shapes and strides are then those of the capture; what
  // the tensors hold may change from replay to replay, cu_seqlens, seqused_k, alibi_slopes and sink included: only the GPU reads them.
  Status run(const Arguments& arguments, Stream stream = nullptr) const;
  size_t workspace_bytes() const;
  std::string_view kernel() const;
  const Problem& problem() const;
  const Device& device() const;
  // Every kernel of the device's backend for this pass, best first.
  static std::vector<Candidate> candidates(const Problem& problem, const Device& device = Device::cpu());

 private:
  struct State;
  std::shared_ptr<const State> state_;
};

// One call: makes the problem from the tensors' shapes, allocates the workspace, runs and waits.
struct Options {
  Device device = Device::cpu();
  std::optional<float> softmax_scale;
  float softcap = 0;
  int64_t window_left = -1, window_right = -1;
  bool causal = false;
  Alignment alignment = Alignment::kBottomRight;
  TensorView cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sink;
  // Packed: upper bounds; 0: read from cu_seqlens on a CPU, else the packed rows. Lengths beyond them are an error on a CPU; a GPU does not
  // look, and may leave rows out.
  int64_t max_seqlen_q = 0, max_seqlen_k = 0;
  TensorView dlse, dsink;
  bool deterministic = false, accumulate = false;  // as in Problem
};
// The problem that these tensors and options describe, for a Plan of one's own. Reads shapes, types and, on a CPU, packed lengths.
TW_API Result<Problem> describe(Pass pass, const TensorView& q, const TensorView& k, const TensorView& v, const Options& options = {});
TW_API Status forward(TensorView q, TensorView k, TensorView v, TensorView o, TensorView lse = {}, const Options& options = {});
TW_API Status backward(TensorView do_, TensorView q, TensorView k, TensorView v, TensorView o, TensorView lse, TensorView dq, TensorView dk,
                       TensorView dv, const Options& options = {});

}  // namespace tilewise
