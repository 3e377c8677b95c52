// Tests on the first GPU. Where there is none that has a row, they are skipped.
#pragma once

#include <gtest/gtest.h>

#include <fstream>
#include <string>
#include <vector>

#include "reference/trial.h"
#include "tilewise/tilewise.hpp"

namespace tilewise {

inline Problem parse(std::string_view line) { return Problem::parse(line).value(); }

class Cuda : public testing::Test {
 protected:
  void SetUp() override {
    const Result<Device> device = Device::cuda();
    if (!device) GTEST_SKIP() << device.status().message();
    if (!Plan::make(parse("q64 d64 bf16"), *device)) GTEST_SKIP() << device->name << " (" << device->arch << ") has no rows";
    device_ = *device;
  }

  // Verifies the problem, or returns false where every row refuses it.
  bool verify(const Problem& problem, uint64_t seed, reference::Layout layout) {
    if (!Plan::make(problem, device_)) return false;
    const Result<reference::Report> report = reference::verify(problem, device_, seed, layout);
    EXPECT_TRUE(report.ok()) << report.status().message();
    if (report.ok()) {
      EXPECT_TRUE(report->pass) << report->first_failure << "\n  " << reference::verify_line(problem, seed, layout) << " --device cuda";
    }
    return true;
  }

  Device device_;
};

}  // namespace tilewise
