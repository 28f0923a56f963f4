// Sixteen lanes in four registers: NEON with its dot products (Arm v8.2). See simd_avx512.h.

struct F { float32x4_t v[4]; };
struct I { int32x4_t v[4]; };
struct W { uint8x16_t v[4]; };

#define QUARTERS for (int q = 0; q < 4; ++q)

INLINE F set1(float a) { const float32x4_t v = vdupq_n_f32(a); return {{v, v, v, v}}; }
INLINE F zero() { return set1(0.0f); }
INLINE F load(const float* p) { F r; QUARTERS r.v[q] = vld1q_f32(p + 4 * q); return r; }
INLINE void store(float* p, F a) { QUARTERS vst1q_f32(p + 4 * q, a.v[q]); }
INLINE F add(F a, F b) { F r; QUARTERS r.v[q] = vaddq_f32(a.v[q], b.v[q]); return r; }
INLINE F sub(F a, F b) { F r; QUARTERS r.v[q] = vsubq_f32(a.v[q], b.v[q]); return r; }
INLINE F mul(F a, F b) { F r; QUARTERS r.v[q] = vmulq_f32(a.v[q], b.v[q]); return r; }
INLINE F div(F a, F b) { F r; QUARTERS r.v[q] = vdivq_f32(a.v[q], b.v[q]); return r; }
INLINE F fma(F a, F b, F c) { F r; QUARTERS r.v[q] = vfmaq_f32(c.v[q], a.v[q], b.v[q]); return r; }
// b where one is NaN: vmaxq would give NaN.
INLINE F max(F a, F b) {
  F r;
  QUARTERS r.v[q] = vbslq_f32(vcgtq_f32(a.v[q], b.v[q]), a.v[q], b.v[q]);
  return r;
}
INLINE F min(F a, F b) {
  F r;
  QUARTERS r.v[q] = vbslq_f32(vcltq_f32(a.v[q], b.v[q]), a.v[q], b.v[q]);
  return r;
}
INLINE F abs(F a) { F r; QUARTERS r.v[q] = vabsq_f32(a.v[q]); return r; }

INLINE I iset1(int32_t a) { const int32x4_t v = vdupq_n_s32(a); return {{v, v, v, v}}; }
INLINE I iadd(I a, I b) { I r; QUARTERS r.v[q] = vaddq_s32(a.v[q], b.v[q]); return r; }
INLINE I imul(I a, I b) { I r; QUARTERS r.v[q] = vmulq_s32(a.v[q], b.v[q]); return r; }
INLINE I to_int(F a) { I r; QUARTERS r.v[q] = vcvtnq_s32_f32(a.v[q]); return r; }
INLINE F to_float(I a) { F r; QUARTERS r.v[q] = vcvtq_f32_s32(a.v[q]); return r; }
INLINE F power_of_two(I n) {
  F r;
  QUARTERS r.v[q] = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n.v[q], vdupq_n_s32(127)), 23));
  return r;
}

INLINE F load_bf16(const uint16_t* p) {
  F r;
  QUARTERS r.v[q] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * q), 16));
  return r;
}
INLINE void store_bf16(uint16_t* p, F a) {
  QUARTERS {
    const uint32x4_t bits = vreinterpretq_u32_f32(a.v[q]);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    const uint32x4_t is_number = vceqq_f32(a.v[q], a.v[q]);
    vst1_u16(p + 4 * q, vshrn_n_u32(vbslq_u32(is_number, up, quiet), 16));
  }
}
INLINE F load_int8(const int8_t* p) {
  const int8x16_t bytes = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
  return to_float({{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)),
                    vmovl_s16(vget_low_s16(high)), vmovl_s16(vget_high_s16(high))}});
}
INLINE I load_uint8(const uint8_t* p) {
  const uint8x16_t bytes = vld1q_u8(p);
  const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes)));
  const int16x8_t high = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(bytes)));
  return {{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)),
           vmovl_s16(vget_low_s16(high)), vmovl_s16(vget_high_s16(high))}};
}
INLINE void store_int8(int8_t* p, I a) {
  const int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
  const int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}
INLINE F choose(int first, int last, F a, F b) {
  constexpr int32_t kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int32x4_t from = vdupq_n_s32(first), to = vdupq_n_s32(last);
  F r;
  QUARTERS {
    const int32x4_t lane = vld1q_s32(kLanes + 4 * q);
    r.v[q] = vbslq_f32(vandq_u32(vcgeq_s32(lane, from), vcltq_s32(lane, to)), a.v[q], b.v[q]);
  }
  return r;
}
INLINE F even_bf16(W w) {
  F r;
  QUARTERS r.v[q] = vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u8(w.v[q]), 16));
  return r;
}
INLINE F odd_bf16(W w) {
  F r;
  QUARTERS r.v[q] = vreinterpretq_f32_u32(
      vandq_u32(vreinterpretq_u32_u8(w.v[q]), vdupq_n_u32(0xffff0000u)));
  return r;
}
INLINE W load_weights(const uint8_t* p) { W r; QUARTERS r.v[q] = vld1q_u8(p + 16 * q); return r; }
INLINE W low_nibbles(W w) {
  W r;
  QUARTERS r.v[q] = vandq_u8(w.v[q], vdupq_n_u8(15));
  return r;
}
INLINE W high_nibbles(W w) { W r; QUARTERS r.v[q] = vshrq_n_u8(w.v[q], 4); return r; }
INLINE I dot4_small(I sum, W w, int32_t x) {
  const int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(x));
  I r;
  QUARTERS r.v[q] = vdotq_s32(sum.v[q], vreinterpretq_s8_u8(w.v[q]), four);
  return r;
}
// Weights of 8 bits are stored with 128 on top; without it they are signed, as the instruction asks.
INLINE I dot4(I sum, W w, int32_t x) {
  W value;
  QUARTERS value.v[q] = veorq_u8(w.v[q], vdupq_n_u8(0x80));
  return dot4_small(sum, value, x);
}
constexpr int32_t kByteOffset = 0;

// The sum of the lanes, added in halves: i and i + 8, i and i + 4, i and i + 2, then the last two.
INLINE float reduce_add(F a) {
  const float32x4_t four =
      vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
INLINE float reduce_max(F a) {
  const auto larger = [](float32x4_t x, float32x4_t y) INLINE_LAMBDA {
    return vbslq_f32(vcgtq_f32(x, y), x, y);
  };
  const float32x4_t four = larger(larger(a.v[0], a.v[2]), larger(a.v[1], a.v[3]));
  const float x = vgetq_lane_f32(four, 0), y = vgetq_lane_f32(four, 1);
  const float z = vgetq_lane_f32(four, 2), w = vgetq_lane_f32(four, 3);
  const float left = x > z ? x : z, right = y > w ? y : w;
  return left > right ? left : right;
}
INLINE int32_t reduce_add(I a) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[2]), vaddq_s32(a.v[1], a.v[3])));
}
#undef QUARTERS
