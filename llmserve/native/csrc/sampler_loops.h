// The sampler's passes over many ids, for one instruction set: see SamplerLoops in sampler_table.h.
// Included inside a path's namespace, which defines PATH_VECTOR_BYTES, the size of its registers.
//
// Vectors are those of the compiler (GCC and clang), so one text serves every instruction set, and
// -ffp-contract=off keeps each operation apart. Only picking out lanes needs intrinsics.

typedef float SampleFloats __attribute__((vector_size(PATH_VECTOR_BYTES)));
typedef int32_t SampleBits __attribute__((vector_size(PATH_VECTOR_BYTES)));
typedef float SampleHalf __attribute__((vector_size(PATH_VECTOR_BYTES / 2)));
typedef double SampleDoubles __attribute__((vector_size(PATH_VECTOR_BYTES)));
typedef int64_t SampleInts __attribute__((vector_size(PATH_VECTOR_BYTES)));

constexpr int kSampleFloats = PATH_VECTOR_BYTES / 4;   // lanes
constexpr int kSampleDoubles = PATH_VECTOR_BYTES / 8;
constexpr int kSampleRegisters = 16 / kSampleFloats;   // of one of 16 columns each
constexpr double kSampleMagic = 0x1.8p52;  // added, it leaves a whole number in the low bits
constexpr int64_t kSampleMagicBits = 0x4338000000000000;

template <class Vector, class Number>
INLINE Vector sample_load(const Number* p) {
  Vector v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class Vector, class Number>
INLINE void sample_store(Number* p, const Vector& v) {
  memcpy(p, &v, sizeof v);
}

// The `count` values from `from` on, and minus infinity up to `room`.
INLINE void sample_pad(const float* from, int64_t count, float* to, int64_t room) {
  for (int64_t i = 0; i < room; ++i) to[i] = i < count ? from[i] : -__builtin_inff();
}

// Largest of each column of a chunk, and so far of the magnitudes, as bits: beyond infinity is NaN.
// Two halves side by side: one alone would wait for itself.
INLINE void chunk_maxima(const float* chunk, SampleFloats* most, SampleBits* magnitudes) {
  const SampleBits magnitude = SampleBits{} + 0x7fffffff;
  SampleFloats halves[2 * kSampleRegisters];
  for (auto& v : halves) v = SampleFloats{} - __builtin_inff();
  for (int64_t i = 0; i < kChunk / 2; i += kColumns) {
    for (int r = 0; r < 2 * kSampleRegisters; ++r) {
      const int64_t column = r % kSampleRegisters * kSampleFloats;
      const int64_t half = r / kSampleRegisters * (kChunk / 2);
      const auto v = sample_load<SampleFloats>(chunk + half + i + column);
      const SampleBits bits = (SampleBits)v & magnitude;
      halves[r] = v > halves[r] ? v : halves[r];
      magnitudes[r] = bits > magnitudes[r] ? bits : magnitudes[r];
    }
  }
  for (int r = 0; r < kSampleRegisters; ++r) {
    const SampleFloats other = halves[r + kSampleRegisters];
    most[r] = other > halves[r] ? other : halves[r];
  }
}

static float column_maxima(const float* values, int64_t n, float* maxima) {
  SampleFloats all[kSampleRegisters], most[kSampleRegisters];
  SampleBits magnitudes[2 * kSampleRegisters] = {};
  for (auto& v : all) v = SampleFloats{} - __builtin_inff();
  for (int64_t start = 0; start < n; start += kChunk, maxima += kColumns) {
    float tail[kChunk];
    const bool is_whole = n - start >= kChunk;
    if (!is_whole) sample_pad(values + start, n - start, tail, kChunk);
    chunk_maxima(is_whole ? values + start : tail, most, magnitudes);
    for (int r = 0; r < kSampleRegisters; ++r) {
      sample_store(maxima + r * kSampleFloats, most[r]);
      all[r] = most[r] > all[r] ? most[r] : all[r];
    }
  }
  float largest = -__builtin_inff();
  for (int lane = 0; lane < kSampleFloats; ++lane) {
    for (const SampleBits& bits : magnitudes)
      if (bits[lane] > 0x7f800000) return __builtin_nanf("");
    for (const SampleFloats& v : all)
      if (v[lane] > largest) largest = v[lane];
  }
  return largest;
}

// Which of 16 values are at least `least`, a bit for each.
INLINE uint32_t lanes_at_least(const float* values, float least) {
#if PATH_VECTOR_BYTES == 64
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(values), _mm512_set1_ps(least), _CMP_GE_OQ);
#elif PATH_VECTOR_BYTES == 32
  const __m256 bound = _mm256_set1_ps(least);
  const __m256 low = _mm256_cmp_ps(_mm256_loadu_ps(values), bound, _CMP_GE_OQ);
  const __m256 high = _mm256_cmp_ps(_mm256_loadu_ps(values + 8), bound, _CMP_GE_OQ);
  return static_cast<uint32_t>(_mm256_movemask_ps(low) | _mm256_movemask_ps(high) << 8);
#else
  uint32_t lanes = 0;
  for (int i = 0; i < 16; ++i) lanes |= static_cast<uint32_t>(values[i] >= least) << i;
  return lanes;
#endif
}

static int64_t first_at_least(const float* values, int64_t n, float least) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const uint32_t lanes = lanes_at_least(values + i, least);
    if (lanes != 0) return i + __builtin_ctz(lanes);
  }
  while (i < n && !(values[i] >= least)) ++i;
  return i;
}

static int64_t count_at_least(const float* values, int64_t n, float least) {
  SampleBits counts[kSampleRegisters] = {};
  const SampleFloats bound = SampleFloats{} + least;
  int64_t count = 0, i = 0;
  for (; i + 16 <= n; i += 16)
    for (int r = 0; r < kSampleRegisters; ++r)
      counts[r] -= sample_load<SampleFloats>(values + i + r * kSampleFloats) >= bound;
  for (; i < n; ++i) count += values[i] >= least;
  for (int r = 0; r < kSampleRegisters; ++r)
    for (int lane = 0; lane < kSampleFloats; ++lane) count += counts[r][lane];
  return count;
}

// Adds those of 16 values whose bit is set. May write 16 places.
INLINE int64_t sample_append(uint32_t lanes, const float* values, int32_t first, int32_t* ids,
                             float* kept) {
#if PATH_VECTOR_BYTES == 64
  const __m512i sixteen = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto mask = static_cast<__mmask16>(lanes);
  const __m512i all = _mm512_add_epi32(sixteen, _mm512_set1_epi32(first));
  _mm512_storeu_si512(ids, _mm512_maskz_compress_epi32(mask, all));
  _mm512_storeu_ps(kept, _mm512_maskz_compress_ps(mask, _mm512_loadu_ps(values)));
  return __builtin_popcount(lanes);
#else
  int64_t count = 0;
  for (; lanes != 0; lanes &= lanes - 1, ++count) {
    const int i = __builtin_ctz(lanes);
    ids[count] = first + i;
    kept[count] = values[i];
  }
  return count;
#endif
}

static int64_t collect(const float* values, int64_t n, const float* maxima, float least,
                       int32_t* ids, float* kept) {
  int64_t count = 0;
  for (int64_t start = 0; start < n; start += kChunk, maxima += kColumns) {
    if (lanes_at_least(maxima, least) == 0) continue;
    const int64_t end = n - start < kChunk ? n : start + kChunk;
    int64_t i = start;
    for (; i + 16 <= end; i += 16) {
      const uint32_t lanes = lanes_at_least(values + i, least);
      if (lanes != 0)
        count += sample_append(lanes, values + i, static_cast<int32_t>(i), ids + count,
                               kept + count);
    }
    for (; i < end; ++i) {
      ids[count] = static_cast<int32_t>(i);
      kept[count] = values[i];
      count += values[i] >= least;
    }
  }
  return count;
}

INLINE SampleDoubles sample_widen(const float* p) {
#if PATH_VECTOR_BYTES == 64
  return (SampleDoubles)_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(p));
#else
  return __builtin_convertvector(sample_load<SampleHalf>(p), SampleDoubles);
#endif
}

// a * b + c, rounded once where that is faster.
INLINE SampleDoubles sample_fused(SampleDoubles a, SampleDoubles b, SampleDoubles c) {
#if PATH_VECTOR_BYTES == 64
  return (SampleDoubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif PATH_VECTOR_BYTES == 32
  return (SampleDoubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// Calculations of several registers side by side: one alone would wait for itself.
#define SAMPLE_EACH for (int v = 0; v < N; ++v)

// Polynomials within 4.1e-11 of 2^r, relatively, for r from -0.5 to 0.5 (Remez).
constexpr double kSampleExp2[] = {0x1.fe17856b36eb8p-17, 0x1.446a1fd6f73a4p-13,
                                  0x1.5d8a708707370p-10, 0x1.3b29dc40dc6e6p-7,
                                  0x1.c6b08aaf30084p-5,  0x1.ebfbe0a4be790p-3,
                                  0x1.62e42ff116283p-1,  0x1.ffffffffabbcep-1};

// 2^((value - largest) * scale) of N registers of values.
template <bool IS_FUSED, int N>
INLINE void sample_exp2(const float* values, double largest, double scale, SampleDoubles (&p)[N]) {
  const SampleDoubles least = SampleDoubles{} - 1000.0;
  SampleDoubles x[N], shifted[N], r[N];
  SAMPLE_EACH x[v] = (sample_widen(values + v * kSampleDoubles) - largest) * scale;
  SAMPLE_EACH x[v] = x[v] < least ? least : x[v];
  SAMPLE_EACH shifted[v] = x[v] + kSampleMagic;
  SAMPLE_EACH r[v] = x[v] - (shifted[v] - kSampleMagic);
  SAMPLE_EACH p[v] = SampleDoubles{} + kSampleExp2[0];
  for (int i = 1; i < 8; ++i) {
    const SampleDoubles next = SampleDoubles{} + kSampleExp2[i];
    SAMPLE_EACH p[v] = IS_FUSED ? sample_fused(p[v], r[v], next) : p[v] * r[v] + next;
  }
  SAMPLE_EACH p[v] = (SampleDoubles)((SampleInts)p[v] + ((SampleInts)shifted[v] << 52));
}

template <bool IS_FUSED>
static void sample_masses(const float* values, int64_t n, double largest, double scale,
                          double* sums) {
  constexpr int N = 32 / kSampleDoubles, kSums = 8 / kSampleDoubles;
  for (int64_t start = 0; start < n; start += kChunk, ++sums) {
    const int64_t count = n - start < kChunk ? n - start : kChunk;
    SampleDoubles sum[kSums] = {}, p[N];
    for (int64_t i = 0; i < count; i += 32) {
      float tail[32];
      const bool is_whole = count - i >= 32;
      if (!is_whole) sample_pad(values + start + i, count - i, tail, 32);
      sample_exp2<IS_FUSED>(is_whole ? values + start + i : tail, largest, scale, p);
      SAMPLE_EACH sum[v % kSums] += p[v];
    }
    double lanes[8];
    memcpy(lanes, sum, sizeof lanes);
    for (int half = 4; half >= 1; half /= 2)
      for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    *sums = lanes[0];
  }
}

INLINE SampleDoubles sample_powers(SampleInts places) {
  double powers[kSampleDoubles];
  for (int lane = 0; lane < kSampleDoubles; ++lane) powers[lane] = kPowers.at[places[lane]];
  return sample_load<SampleDoubles>(powers);
}

// Steps and weights of N registers of values.
template <int N>
INLINE void sample_weigh(const float* values, double largest, double scale, double* steps,
                         int64_t* weights) {
  const SampleDoubles most = SampleDoubles{} + 22016.0;
  SampleDoubles x[N], shifted[N], r[N], p[N], power[N];
  SampleInts n[N], place[N];
  SAMPLE_EACH x[v] = (largest - sample_widen(values + v * kSampleDoubles)) * scale;
  SAMPLE_EACH x[v] = x[v] < most ? x[v] : most;
  SAMPLE_EACH shifted[v] = x[v] + kSampleMagic;
  SAMPLE_EACH n[v] = (SampleInts)shifted[v] - kSampleMagicBits;
  SAMPLE_EACH place[v] = n[v] & 511;
  SAMPLE_EACH power[v] = sample_powers(place[v]);
  SAMPLE_EACH r[v] = (shifted[v] - kSampleMagic) - x[v];
  SAMPLE_EACH p[v] = r[v] * 0x1.c6b08d704a0c0p-32 + 0x1.ebfbdff82c58fp-21;
  SAMPLE_EACH p[v] = p[v] * r[v] + 0x1.62e42fefa39efp-10;
  SAMPLE_EACH p[v] = p[v] * r[v] + 1.0;
  // Halved n / 512 times.
  SAMPLE_EACH power[v] = (SampleDoubles)((SampleInts)power[v] - ((n[v] - place[v]) << 43));
  SAMPLE_EACH p[v] = p[v] * power[v] + kSampleMagic;
  SAMPLE_EACH sample_store(steps + v * kSampleDoubles, x[v]);
  SAMPLE_EACH sample_store(weights + v * kSampleDoubles, (SampleInts)p[v] - kSampleMagicBits);
}

static void weigh(const float* values, int64_t n, double largest, double scale, double* steps,
                  int64_t* weights) {
  constexpr int kTogether = PATH_VECTOR_BYTES == 64 ? 4 : 2;
  constexpr int64_t kWidth = kTogether * kSampleDoubles;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth)
    sample_weigh<kTogether>(values + i, largest, scale, steps + i, weights + i);
  if (i == n) return;
  float tail[kWidth];
  double tail_steps[kWidth];
  int64_t tail_weights[kWidth];
  sample_pad(values + i, n - i, tail, kWidth);
  sample_weigh<kTogether>(tail, largest, scale, tail_steps, tail_weights);
  memcpy(steps + i, tail_steps, static_cast<size_t>(n - i) * sizeof(double));
  memcpy(weights + i, tail_weights, static_cast<size_t>(n - i) * sizeof(int64_t));
}

#undef SAMPLE_EACH

static const SamplerLoops kSamplerLoops = {
    column_maxima, first_at_least,       count_at_least,      collect,
    weigh,         sample_masses<true>,  sample_masses<false>};
