// What the sampler needs of each instruction set: its passes over many ids, written in
// sampler_loops.h, and the constants that they share.
#pragma once
#include <cstdint>

namespace llmserve {

// Ids that are passed over, summed or weighed together; and in each of them the columns of which
// the largest logit is noted: column j of a chunk holds its ids j, j + 16, j + 32, ...
constexpr int64_t kChunk = 512;
constexpr int64_t kColumns = 16;
// Ids and floats that `collect` may write beyond the last one it keeps.
constexpr int64_t kSlack = 16;

// All but `masses` give the same on every path, to the bit.
struct SamplerLoops {
  // Largest of each column, [chunks, kColumns], minus infinity where there is no id. Returns the
  // largest of all, or NaN if one is NaN: then the maxima mean nothing.
  float (*column_maxima)(const float* values, int64_t n, float* maxima);
  // Index of the first value that is at least `least`, or n.
  int64_t (*first_at_least)(const float* values, int64_t n, float least);
  int64_t (*count_at_least)(const float* values, int64_t n, float least);
  // Ascending ids of the values that are at least `least`, and those values; returns how many.
  int64_t (*collect)(const float* values, int64_t n, const float* maxima, float least,
                     int32_t* ids, float* kept);
  // Steps x and weights w of docs/sampling.md, step 6; `scale` is its s.
  void (*weigh)(const float* values, int64_t n, double largest, double scale, double* steps,
                int64_t* weights);
  // Of each chunk the sum of 2^((value - largest) * scale), within 1e-10 of itself; less than
  // 2^-1000 counts as that.
  void (*masses)(const float* values, int64_t n, double largest, double scale, double* sums);
  // Likewise in eight lanes, without fused operations, joined in a fixed order.
  void (*exact_masses)(const float* values, int64_t n, double largest, double scale, double* sums);
};

// P[0] to P[511] of docs/sampling.md: the double nearest to 2^(42 - n / 512).
struct Powers {
  double at[512];
};

constexpr Powers make_powers() {
  // 2^(-1/512) and its powers as fractions of 2^128, off by at most 2^-118; no power lies closer
  // than 2^-64 to where its rounding changes.
  using Wide = unsigned __int128;
  const uint64_t root[2] = {0x9f3a1b48fb94c589u, 0xffa756521c8daed1u};
  Powers powers{};
  powers.at[0] = 0x1p42;
  Wide power = Wide{root[1]} << 64 | root[0];
  for (int n = 1; n < 512; ++n) {
    powers.at[n] = static_cast<double>(power) * 0x1p-86;
    const Wide low = static_cast<uint64_t>(power), high = power >> 64;
    const Wide middle = high * root[0] + (low * root[0] >> 64);
    const Wide other = low * root[1] + static_cast<uint64_t>(middle);
    power = high * root[1] + (middle >> 64) + (other >> 64);
  }
  return powers;
}

inline constexpr Powers kPowers = make_powers();

}  // namespace llmserve
