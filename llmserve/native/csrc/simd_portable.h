// Sixteen lanes as plain arrays, for every other processor. See simd_avx512.h.

struct F { float v[16]; };
struct I { int32_t v[16]; };
struct W { uint8_t v[64]; };

#define LANES for (int i = 0; i < 16; ++i)

INLINE F zero() { F r; LANES r.v[i] = 0.0f; return r; }
INLINE F set1(float a) { F r; LANES r.v[i] = a; return r; }
INLINE F load(const float* p) { F r; memcpy(r.v, p, 64); return r; }
INLINE void store(float* p, const F& a) { memcpy(p, a.v, 64); }
INLINE F add(const F& a, const F& b) { F r; LANES r.v[i] = a.v[i] + b.v[i]; return r; }
INLINE F sub(const F& a, const F& b) { F r; LANES r.v[i] = a.v[i] - b.v[i]; return r; }
INLINE F mul(const F& a, const F& b) { F r; LANES r.v[i] = a.v[i] * b.v[i]; return r; }
INLINE F div(const F& a, const F& b) { F r; LANES r.v[i] = a.v[i] / b.v[i]; return r; }

#if defined(__FP_FAST_FMAF) || defined(__aarch64__)
INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
// a * b is exact in double. The sum is rounded to odd before it is rounded to float, so that the
// two roundings together are one (Boldo and Melquiond 2008, "Emulation of a FMA", theorem 1).
INLINE float fused(float a, float b, float c) {
  const double product = static_cast<double>(a) * b, addend = c;
  const double sum = product + addend;
  const double part = sum - product;
  const double error = (product - (sum - part)) + (addend - part);
  uint64_t bits;
  memcpy(&bits, &sum, 8);
  uint64_t error_bits;
  memcpy(&error_bits, &error, 8);
  const bool is_inexact = error != 0.0 && sum - sum == 0.0;
  const bool is_toward_zero = ((bits ^ error_bits) >> 63) == 0;
  if (is_inexact && (bits & 1) == 0) bits += is_toward_zero ? 1 : -1;
  double odd;
  memcpy(&odd, &bits, 8);
  return static_cast<float>(odd);
}
#endif
INLINE F fma(const F& a, const F& b, const F& c) {
  F r;
  LANES r.v[i] = fused(a.v[i], b.v[i], c.v[i]);
  return r;
}
INLINE F max(const F& a, const F& b) { F r; LANES r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return r; }
INLINE F min(const F& a, const F& b) { F r; LANES r.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return r; }
INLINE F abs(const F& a) { F r; LANES r.v[i] = __builtin_fabsf(a.v[i]); return r; }

INLINE I iset1(int32_t a) { I r; LANES r.v[i] = a; return r; }
INLINE I iadd(const I& a, const I& b) { I r; LANES r.v[i] = a.v[i] + b.v[i]; return r; }
INLINE I imul(const I& a, const I& b) { I r; LANES r.v[i] = a.v[i] * b.v[i]; return r; }
// To the nearest, ties to even, whatever the rounding of a cast: adding 1.5 * 2^23 leaves the
// integer in the low bits. For magnitudes up to 2^22; beyond, and NaN, the result means nothing.
INLINE I to_int(const F& a) {
  I r;
  LANES {
    const float shifted = a.v[i] + 12582912.0f;
    int32_t bits;
    memcpy(&bits, &shifted, 4);
    r.v[i] = bits - 0x4b400000;
  }
  return r;
}
INLINE F to_float(const I& a) { F r; LANES r.v[i] = static_cast<float>(a.v[i]); return r; }
INLINE F power_of_two(const I& n) {
  F r;
  LANES { const uint32_t bits = static_cast<uint32_t>(n.v[i] + 127) << 23; memcpy(&r.v[i], &bits, 4); }
  return r;
}

INLINE F load_bf16(const uint16_t* p) {
  F r;
  LANES { const uint32_t bits = static_cast<uint32_t>(p[i]) << 16; memcpy(&r.v[i], &bits, 4); }
  return r;
}
INLINE void store_bf16(uint16_t* p, const F& a) {
  LANES {
    uint32_t bits;
    memcpy(&bits, &a.v[i], 4);
    const bool is_nan = a.v[i] != a.v[i];
    const uint32_t up = is_nan ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
    p[i] = static_cast<uint16_t>(up >> 16);
  }
}
INLINE F load_int8(const int8_t* p) { F r; LANES r.v[i] = static_cast<float>(p[i]); return r; }
INLINE I load_uint8(const uint8_t* p) { I r; LANES r.v[i] = p[i]; return r; }
INLINE void store_int8(int8_t* p, const I& a) { LANES p[i] = static_cast<int8_t>(a.v[i]); }
INLINE F choose(int first, int last, const F& a, const F& b) {
  F r;
  LANES r.v[i] = i >= first && i < last ? a.v[i] : b.v[i];
  return r;
}
INLINE F even_bf16(const W& w) {
  F r;
  LANES {
    const uint32_t bits = (w.v[4 * i] | static_cast<uint32_t>(w.v[4 * i + 1]) << 8) << 16;
    memcpy(&r.v[i], &bits, 4);
  }
  return r;
}
INLINE F odd_bf16(const W& w) {
  F r;
  LANES {
    const uint32_t bits = (w.v[4 * i + 2] | static_cast<uint32_t>(w.v[4 * i + 3]) << 8) << 16;
    memcpy(&r.v[i], &bits, 4);
  }
  return r;
}
INLINE W load_weights(const uint8_t* p) { W r; memcpy(r.v, p, 64); return r; }
INLINE W low_nibbles(const W& w) { W r; for (int i = 0; i < 64; ++i) r.v[i] = w.v[i] & 15; return r; }
INLINE W high_nibbles(const W& w) { W r; for (int i = 0; i < 64; ++i) r.v[i] = w.v[i] >> 4; return r; }
INLINE I dot4_small(const I& sum, const W& w, int32_t x) {
  const int32_t x0 = static_cast<int8_t>(x), x1 = static_cast<int8_t>(x >> 8);
  const int32_t x2 = static_cast<int8_t>(x >> 16), x3 = static_cast<int8_t>(x >> 24);
  I r;
  LANES r.v[i] = sum.v[i] + w.v[4 * i] * x0 + w.v[4 * i + 1] * x1 + w.v[4 * i + 2] * x2 +
                 w.v[4 * i + 3] * x3;
  return r;
}
INLINE I dot4(const I& sum, const W& w, int32_t x) { return dot4_small(sum, w, x); }
constexpr int32_t kByteOffset = 128;

// The sum of the lanes, added in halves: i and i + 8, i and i + 4, i and i + 2, then the last two.
INLINE float reduce_add(F a) {
  for (int half = 8; half >= 1; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] = a.v[i] + a.v[i + half];
  return a.v[0];
}
INLINE float reduce_max(F a) {
  for (int half = 8; half >= 1; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
  return a.v[0];
}
INLINE int32_t reduce_add(const I& a) {
  int32_t sum = 0;
  LANES sum += a.v[i];
  return sum;
}
#undef LANES
