// Exact arithmetic of docs/sampling.md, and numbers as whole ones of the same order, to be ranked.
#pragma once
#include <cstdint>
#include <cstring>

namespace llmserve {

constexpr int64_t kOne = int64_t{1} << 42;  // weight of the likeliest id
constexpr double kMostSteps = 43 * 512;     // here a weight rounds to 0

// The weight that reaches a share of a total.
inline int64_t part(double share, int64_t total) {
  using Wide = unsigned __int128;
  const Wide product = static_cast<Wide>(static_cast<uint64_t>(share * 0x1p32)) *
                       static_cast<uint64_t>(total);
  const auto least = static_cast<int64_t>((product + 0xffffffffu) >> 32);
  return least < 1 ? 1 : least;
}

// Where a random number falls when weights of that total are laid end to end.
inline int64_t place_of(uint64_t random, int64_t total) {
  using Wide = unsigned __int128;
  return static_cast<int64_t>(static_cast<Wide>(random) * static_cast<uint64_t>(total) >> 53);
}

// To the nearest whole number, ties to the even one; for magnitudes up to 2^51.
inline int64_t rounded(double value) {
  constexpr double kMagic = 0x1.8p52;
  const double shifted = value + kMagic;
  return static_cast<int64_t>(shifted - kMagic);
}

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

// Of a number that is at least 0.
inline uint64_t ascending_key(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, 8);
  return bits;
}

// Of a weight. As floating-point numbers they fall into buckets of equal ratio.
inline uint64_t descending_key(int64_t weight) {
  return ~ascending_key(static_cast<double>(weight + 1));
}

inline uint64_t descending_key(float value) {
  return static_cast<uint64_t>(INT32_MAX - int64_t{ordered(value)});
}

}  // namespace llmserve
