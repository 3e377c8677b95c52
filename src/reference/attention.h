// Attention in float64, the judge: O(n^2) time, nothing stored but the rows at hand, and of masks it knows only visible().
// Tensors are in host memory with any strides. NaN and infinity go where arithmetic takes them: a score of -inf is a weight
// of 0, one of +inf makes its row NaN, lse too, and so does a sink of +inf in every row that sees a key.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "tilewise/tilewise.hpp"

namespace tilewise::reference {

// Contiguous, in the shapes of Arguments. Rows that belong to no sequence are 0.
struct Outputs {
  std::vector<double> o, lse;             // always
  std::vector<double> dq, dk, dv, dsink;  // backward; dsink with a sink only
};

// Reads q, k, v, the lengths and modifiers; for Pass::kBackward also do_ and, where given, dlse. Never o and lse.
// noise, where given, becomes what one relative rounding error in every term of every sum comes to in each output, as the
// root of the sum of squares and before it is multiplied by the precision: the error that luck alone explains.
Outputs attention(const Problem& problem, const Arguments& arguments, Outputs* noise = nullptr);

// 16-bit floats: rounding is to nearest, ties to even; NaN stays NaN.
inline float from_bfloat16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline float from_float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // As a float of the same fields the value is 2^112 too small; subnormals come out right as well.
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude << 13) * 0x1p112f));
}
inline uint16_t to_float16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 1/2 leaves the value in units of 2^-24 in the low bits, rounded
    const uint32_t rounded = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f);
    return static_cast<uint16_t>(sign | (rounded - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

// Floats in memory of element type dtype: a float32 unless it is one of the 16-bit types.
inline bool is_16bit(DataType dtype) { return dtype == DataType::kBFloat16 || dtype == DataType::kFloat16; }
inline int64_t element_bytes(DataType dtype) { return is_16bit(dtype) ? 2 : 4; }
inline float read_element(const void* data, DataType dtype, int64_t index) {
  if (!is_16bit(dtype)) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return dtype == DataType::kBFloat16 ? from_bfloat16(bits) : from_float16(bits);
}
inline void write_element(void* data, DataType dtype, int64_t index, float value) {
  if (!is_16bit(dtype))
    static_cast<float*>(data)[index] = value;
  else
    static_cast<uint16_t*>(data)[index] = dtype == DataType::kBFloat16 ? to_bfloat16(value) : to_float16(value);
}

}  // namespace tilewise::reference
