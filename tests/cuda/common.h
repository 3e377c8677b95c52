// Tests on the first GPU. Where there is none, or not a Hopper, they are skipped.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <initializer_list>
#include <string>
#include <vector>

#include "reference/attention.h"
#include "reference/trial.h"
#include "tilewise/memory.hpp"
#include "tilewise/tilewise.hpp"

namespace tilewise {

using reference::Trial;

inline Problem parse(std::string_view line) { return Problem::parse(line).value(); }

class Cuda : public testing::Test {
 protected:
  void SetUp() override {
    const Result<Device> device = Device::cuda();
    if (!device) GTEST_SKIP() << device.status().message();
    if (device->arch != "sm_90") GTEST_SKIP() << device->name << " is " << device->arch << ", kernels are for sm_90";
    device_ = *device;
  }

  // Verifies the problem, or returns false where every row refuses it.
  bool verify(const Problem& problem, uint64_t seed, reference::Layout layout) {
    if (!Plan::make(problem, device_)) return false;
    const Result<reference::Report> report = reference::verify(problem, device_, seed, layout);
    EXPECT_TRUE(report.ok() && report->pass) << (report.ok() ? report->first_failure : std::string(report.status().message())) << "\n  "
                                             << reference::verify_line(problem, seed, layout) << " --device cuda, here on " << device_.units
                                             << " SMs";
    return true;
  }

  Trial trial(std::string_view line, reference::Layout layout = reference::Layout::kBshd) {
    Result<Trial> made = Trial::make(parse(line), device_, 3, layout);
    made.status().check();
    return std::move(*made);
  }
  static std::vector<char> output(Trial& t) {
    t.run().check();
    return written(t);
  }
  static size_t bytes_of(const TensorView& view) {
    int64_t last = 0;
    for (int i = 0; i < view.rank; ++i) last += (view.shape[i] - 1) * view.stride[i];
    return static_cast<size_t>(last + 1) * (view.dtype == DataType::kFloat32 ? 4 : 2);
  }
  // What the pass writes, or these tensors, bit by bit, as they lie on the device.
  static std::vector<char> written(Trial& t) {
    const bool forward = t.plan().problem().pass == Pass::kForward;
    return forward ? written(t, {&Arguments::o, &Arguments::lse})
                   : written(t, {&Arguments::dq, &Arguments::dk, &Arguments::dv, &Arguments::dsink});
  }
  static std::vector<char> written(Trial& t, std::initializer_list<TensorView Arguments::*> members) {
    t.download().check();
    std::vector<char> bytes;
    for (auto member : members) {
      const TensorView& view = t.host_arguments().*member;
      if (!view.data) continue;
      const auto* data = static_cast<const char*>(view.data);
      bytes.insert(bytes.end(), data, data + bytes_of(view));
    }
    return bytes;
  }
  static void set_row(const TensorView& view, int64_t b, int64_t row, int64_t head, float value) {
    for (int64_t d = 0; d < view.shape[3]; ++d)
      reference::write_element(view.data, view.dtype, b * view.stride[0] + row * view.stride[1] + head * view.stride[2] + d, value);
  }
  static float get(const TensorView& view, int64_t b, int64_t row, int64_t head, int64_t d) {
    return reference::read_element(view.data, view.dtype, b * view.stride[0] + row * view.stride[1] + head * view.stride[2] + d);
  }

  Device device_;
};

}  // namespace tilewise
