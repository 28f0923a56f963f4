// Sixteen lanes in one register: AVX-512. Included inside a path's namespace, after <immintrin.h>.
// Every function here has a twin in simd_avx2.h, simd_neon.h and simd_portable.h that gives the same bits.

using F = __m512;   // 16 float
using I = __m512i;  // 16 int32
using W = __m512i;  // 64 bytes of weights

INLINE F zero() { return _mm512_setzero_ps(); }
INLINE F set1(float a) { return _mm512_set1_ps(a); }
INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a); }
INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
// b where one is NaN, as the instruction has it.
INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
INLINE F abs(F a) { return _mm512_abs_ps(a); }

INLINE I iset1(int32_t a) { return _mm512_set1_epi32(a); }
INLINE I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
INLINE I imul(I a, I b) { return _mm512_mullo_epi32(a, b); }
INLINE I to_int(F a) { return _mm512_cvtps_epi32(a); }
INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
// 2 to the power n, for n from -126 to 127.
INLINE F power_of_two(I n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
}

INLINE F load_bf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
INLINE void store_bf16(uint16_t* p, F a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  up = _mm512_mask_or_epi32(up, is_nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}
INLINE F load_int8(const int8_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
INLINE I load_uint8(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// The 16 integers, which must be -128..127, as bytes.
INLINE void store_int8(int8_t* p, I a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
}
// Lanes first..last-1 of a, the others of b.
INLINE F choose(int first, int last, F a, F b) {
  const uint32_t below_last = last >= 16 ? 0xffffu : (1u << last) - 1u;
  const uint32_t below_first = first >= 16 ? 0xffffu : (1u << first) - 1u;
  return _mm512_mask_mov_ps(b, static_cast<__mmask16>(below_last & ~below_first), a);
}
INLINE F even_bf16(W w) { return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)); }
INLINE F odd_bf16(W w) {
  return _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
INLINE W load_weights(const uint8_t* p) { return _mm512_loadu_si512(p); }
INLINE W low_nibbles(W w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
INLINE W high_nibbles(W w) {
  return _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi8(15));
}
// Each lane adds four products of unsigned weights and the four signed bytes of x. In assembly
// because GCC does not keep a sum in one register over the builtin: it copies each.
INLINE I dot4_small(I sum, W w, int32_t x) {
  const __m512i four = _mm512_set1_epi32(x);
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(four));
  return sum;
}
INLINE I dot4(I sum, W w, int32_t x) { return dot4_small(sum, w, x); }
// What an 8-bit weight carries on top of its value in `dot4`.
constexpr int32_t kByteOffset = 128;

// The sum of the lanes, added in halves: i and i + 8, i and i + 4, i and i + 2, then the last two.
INLINE float reduce_add(F a) {
  return fold_add(_mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)));
}
INLINE float reduce_max(F a) {
  return fold_max(_mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)));
}
INLINE int32_t reduce_add(I a) {
  return fold_add(_mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1)));
}
