// Numbers as whole ones of the same order, to be ranked and bisected.
#pragma once
#include <cstdint>
#include <cstring>

namespace llmserve {

// An int32 of the same order as a number that is not NaN; 0 and -0 give the same.
inline int32_t ordered(float value) {
  const float positive_zero = value + 0.0f;
  int32_t bits;
  std::memcpy(&bits, &positive_zero, 4);
  return bits < 0 ? INT32_MIN - bits : bits;
}

inline float float_at(int32_t order) {
  const int32_t bits = order < 0 ? INT32_MIN - order : order;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Of a double that is at least 0, and the other way round.
inline uint64_t ascending_key(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, 8);
  return bits;
}

inline uint64_t descending_key(int64_t weight) {
  return ~ascending_key(static_cast<double>(weight));
}

inline uint64_t descending_key(float value) {
  return static_cast<uint64_t>(INT32_MAX - int64_t{ordered(value)});
}

// To the nearest whole number, ties to the even one; for magnitudes up to 2^51.
inline int64_t rounded(double value) {
  constexpr double kMagic = 0x1.8p52;
  const double shifted = value + kMagic;
  return static_cast<int64_t>(shifted - kMagic);
}

}  // namespace llmserve
