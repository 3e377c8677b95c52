// bfloat16 and float16 against their definition: every value, every tie and both neighbours of every tie.
#include <gtest/gtest.h>

#include <cmath>

#include "reference/attention.h"

namespace tilewise::reference {
namespace {

template <class From, class To>
void check_rounding(From from, To to, uint16_t infinity, float overflow_tie) {
  for (int bits = 0; bits < infinity; ++bits) {
    const uint16_t low = static_cast<uint16_t>(bits), high = static_cast<uint16_t>(bits + 1), even = bits % 2 ? high : low;
    const float a = from(low), b = from(high);
    ASSERT_LT(a, b);
    const float tie = high == infinity ? overflow_tie : static_cast<float>((static_cast<double>(a) + b) / 2);
    for (uint16_t sign : {uint16_t{0}, uint16_t{0x8000}}) {
      const float s = sign ? -1.0f : 1.0f;
      ASSERT_EQ(to(s * a), sign | low);
      ASSERT_EQ(to(s * tie), sign | even) << "tie " << tie;
      ASSERT_EQ(to(s * std::nextafter(tie, 0.0f)), sign | low) << "below the tie " << tie;
      ASSERT_EQ(to(s * std::nextafter(tie, INFINITY)), sign | high) << "above the tie " << tie;
    }
  }
  EXPECT_EQ(to(INFINITY), infinity);
  EXPECT_EQ(to(-INFINITY), infinity | 0x8000);
  EXPECT_TRUE(std::isinf(from(infinity)));
  for (int bits = infinity + 1; bits < 0x8000; ++bits) {
    ASSERT_TRUE(std::isnan(from(static_cast<uint16_t>(bits))));
    ASSERT_TRUE(std::isnan(from(to(from(static_cast<uint16_t>(bits))))));
  }
  for (uint32_t bits : {0x7f800001u, 0x7fffffffu, 0xff800001u, 0xffc00000u})
    EXPECT_TRUE(std::isnan(from(to(std::bit_cast<float>(bits))))) << std::hex << bits;
}

TEST(Rounding, Float16) { check_rounding(from_float16, to_float16, 0x7c00, 65520.0f); }
TEST(Rounding, BFloat16) { check_rounding(from_bfloat16, to_bfloat16, 0x7f80, std::bit_cast<float>(0x7f7f8000u)); }
TEST(Rounding, KnownValues) {
  EXPECT_EQ(from_float16(0x3c00), 1.0f);
  EXPECT_EQ(from_float16(0x0001), 0x1p-24f);
  EXPECT_EQ(from_float16(0x7bff), 65504.0f);
  EXPECT_EQ(from_bfloat16(0xc000), -2.0f);
  EXPECT_EQ(to_float16(0.1f), 0x2e66);
  EXPECT_EQ(to_bfloat16(0.1f), 0x3dcd);
}

}  // namespace
}  // namespace tilewise::reference
