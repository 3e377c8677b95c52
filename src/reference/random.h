// Random numbers by position, so that they do not depend on the order of drawing; the same one after the other.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>

namespace tilewise::reference {

inline uint64_t hash(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}
inline double uniform(uint64_t seed, uint64_t index) { return static_cast<double>(hash(seed + hash(index)) >> 11) * 0x1p-53; }
inline float normal(uint64_t seed, uint64_t index) {
  const uint64_t bits = hash(seed + hash(index));
  const float radius = static_cast<float>((bits >> 40) + 1) * 0x1p-24f, angle = static_cast<float>(bits & 0xffffff) * 0x1p-24f;
  return std::sqrt(-2 * std::log(radius)) * std::cos(2 * std::numbers::pi_v<float> * angle);
}

struct Random {
  uint64_t seed, count = 0;
  double next() { return uniform(seed, count++); }
  int64_t integer(int64_t low, int64_t high) { return low + static_cast<int64_t>(next() * static_cast<double>(high - low + 1)); }
  bool chance(double probability) { return next() < probability; }
};

}  // namespace tilewise::reference
