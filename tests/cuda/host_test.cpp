// What the CUDA backend decides on the host, for a device as a value: no GPU is needed.
#include <gtest/gtest.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/arguments.h"
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

// Between memory and the SMs stands L2: tiles that are read again come from there.
TEST(Host, ExplainKnowsL2) {
  const Explanation e = explain(Problem::parse("b2 q4096 k4096 h8/4 d128 bf16").value(), hopper()).value();
  const double q = 2.0 * 2 * 4096 * 8 * 128, lse = 4.0 * 2 * 4096 * 8, kv = 2.0 * 2 * 4096 * 4 * 256;
  EXPECT_EQ(e.flash_bytes, 2 * q + lse + kv);
  EXPECT_EQ(e.least_bytes, e.flash_bytes);
  const double blocks = 2.0 * 4096 / static_cast<double>(e.tiles.block_m);  // of a key/value head
  EXPECT_EQ(e.tile_bytes, 2 * q + lse + blocks * kv);
}

}  // namespace
}  // namespace tilewise
