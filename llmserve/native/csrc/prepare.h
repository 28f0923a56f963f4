// From a row of the residual stream to what a product reads: norm, then integers of one or two bytes
// with a scale for each group. Sums are made in 64 virtual lanes (four vectors) and joined in one written order, so a
// row's bits depend on nothing but the row.

INLINE F join(F a, F b, F c, F d) { return add(add(a, b), add(c, d)); }

// The sum of `term` of each of the row's vectors, the last one cut to the row's width.
template <typename Term>
INLINE float sum_row(const float* row, int64_t width, Term term) {
  F sums[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 64 <= width; i += 64)
    for (int j = 0; j < 4; ++j) sums[j] = term(load(row + i + 16 * j), sums[j], 16);
  for (int j = 0; i < width; i += 16, ++j) {
    const int count = static_cast<int>(width - i < 16 ? width - i : 16);
    sums[j] = term(load(row + i), sums[j], count);
  }
  return reduce_add(join(sums[0], sums[1], sums[2], sums[3]));
}

// out may be the row itself; pads are written as 0.
static void norm_row(const float* row, float* out, int64_t width, const Norm& norm) {
  const int64_t padded = (width + 15) / 16 * 16;
  float mean = 0.0f;
  const float count = static_cast<float>(width);
  if (norm.kind == NormKind::kLayer)
    mean = sum_row(row, width, [none = zero()](F x, F sum, int n) INLINE_LAMBDA {
             return add(choose(0, n, x, none), sum);
           }) / count;
  const F middle = set1(mean);
  const float squares = sum_row(row, width, [middle](F x, F sum, int n) INLINE_LAMBDA {
    const F off = choose(0, n, sub(x, middle), zero());
    return fma(off, off, sum);
  });
  const F factor = set1(1.0f / __builtin_sqrtf(squares / count + norm.eps));
  for (int64_t i = 0; i < padded; i += 16) {
    const int n = static_cast<int>(width - i < 16 ? width - i : 16);
    F y = mul(mul(sub(load(row + i), middle), factor), load(norm.weight + i));
    if (norm.bias != nullptr) y = add(y, load(norm.bias + i));
    store(out + i, choose(0, n, y, zero()));
  }
}

// The last group of a row may be shorter.
INLINE int64_t group_length(int64_t width, int64_t size, int64_t group) {
  return width - group * size < size ? width - group * size : size;
}

// One group of a row → integers with zeros up to `padded` or beyond, its scale, its digits' sums.
// Low digits lie `digit_stride` bytes and `sum_stride` sums behind the high ones.
template <bool IS_WHOLE, int DIGITS>
INLINE void quantize_group(const float* x, int64_t size, int64_t padded, int8_t* integers,
                           int64_t digit_stride, float* scale, int32_t* sum, int64_t sum_stride) {
  constexpr float kLargest = DIGITS == 1 ? 127.0f : kLargestOfTwo;
  const auto part = [&](int64_t i) INLINE_LAMBDA {
    if constexpr (IS_WHOLE) return load(x + i);
    if (i >= size) return zero();  // what is there may be nobody's memory
    const int n = static_cast<int>(size - i < 16 ? size - i : 16);
    return choose(0, n, load(x + i), zero());
  };
  F largest = zero();
  for (int64_t i = 0; i < size; i += 16) largest = max(largest, abs(part(i)));
  const float most = reduce_max(largest);
  const bool is_zero = !(most > 1e-30f);
  const F inverse = set1(is_zero ? 0.0f : kLargest / most);
  I total = iset1(0), low_total = iset1(0);
  for (int64_t i = 0; i < padded; i += 16) {
    I q = to_int(mul(part(i), inverse));
    if constexpr (DIGITS == 2) {
      const I high = to_int(mul(to_float(q), set1(1.0f / kDigitBase)));
      const I low = iadd(q, imul(high, iset1(-kDigitBase)));
      store_int8(integers + digit_stride + i, low);
      low_total = iadd(low_total, low);
      q = high;
    }
    store_int8(integers + i, q);
    total = iadd(total, q);
  }
  *sum = reduce_add(total);
  if (DIGITS == 2) sum[sum_stride] = reduce_add(low_total);
  *scale = is_zero ? 0.0f : most / kLargest;
}

// A row's groups. They are whole vectors where the group size is a multiple of 16. A NaN or an
// infinity has no integer: it makes all of the row's scales NaN, so that it is not lost.
template <int DIGITS>
static void quantize_row(const float* x, int64_t width, int64_t group_size, int64_t padded_group,
                         int64_t num_groups, int8_t* integers, int64_t digit_stride, float* scales,
                         int32_t* sums) {
  const float spoiled = sum_row(x, width, [none = zero()](F v, F sum, int n) INLINE_LAMBDA {
    return fma(choose(0, n, v, none), none, sum);
  });
  if (spoiled != 0.0f) {
    for (int d = 0; d < DIGITS; ++d) {
      memset(integers + d * digit_stride, 0, static_cast<size_t>(num_groups * padded_group));
      memset(sums + d * num_groups, 0, static_cast<size_t>(num_groups) * 4);
    }
    for (int64_t g = 0; g < num_groups; ++g) scales[g] = __builtin_nanf("");
    return;
  }
  const bool is_whole = group_size % 16 == 0 && width % group_size == 0;
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t size = group_length(width, group_size, g);
    const float* in = x + g * group_size;
    int8_t* out = integers + g * padded_group;
    if (is_whole)
      quantize_group<true, DIGITS>(in, size, padded_group, out, digit_stride, scales + g, sums + g,
                                   num_groups);
    else
      quantize_group<false, DIGITS>(in, size, padded_group, out, digit_stride, scales + g, sums + g,
                                    num_groups);
  }
}

// A row's parts: the bfloat16 nearest to each value, and the one nearest to what that leaves.
static void split_row(const float* x, int64_t width, int64_t stride, uint16_t* parts) {
  for (int64_t i = 0; i < stride; i += 16) {
    const int n = static_cast<int>(width - i < 16 ? width - i : 16);
    const F value = n <= 0 ? zero() : choose(0, n, load(x + i), zero());
    store_bf16(parts + i, value);
    store_bf16(parts + stride + i, sub(value, load_bf16(parts + i)));
  }
}

// Rows first..last-1 of the input become those of `out`.
static void prepare(const PrepareCall& call, const Prepared& out, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const float* x = call.input + row * call.stride;
    float* values = out.values == nullptr ? nullptr : out.values + row * out.stride;
    if (call.norm.kind != NormKind::kNone) {
      norm_row(x, values, call.width, call.norm);
      x = values;
    } else if (call.has_values) {
      const int64_t padded = (call.width + 15) / 16 * 16;
      memcpy(values, x, static_cast<size_t>(padded) * 4);
      x = values;
    }
    if (call.has_parts)
      split_row(x, call.width, out.part_stride, out.parts + row * 2 * out.part_stride);
    if (!call.has_integers) continue;
    if (call.order != nullptr) {
      float* ordered = values + out.stride / 2;
      for (int64_t i = 0; i < call.width; ++i) ordered[i] = x[call.order[i]];
      x = ordered;
    }
    int8_t* integers = out.integers + row * out.integer_stride;
    const auto quantize = call.num_digits == 2 ? quantize_row<2> : quantize_row<1>;
    quantize(x, call.width, call.group_size, call.padded_group, call.num_groups, integers,
             out.digit_stride, out.scales + row * call.num_groups,
             out.sums + row * call.num_digits * call.num_groups);
  }
}

static void norm_rows(float* rows, int64_t stride, int64_t width, const Norm& norm, int64_t first,
                      int64_t last) {
  for (int64_t row = first; row < last; ++row)
    norm_row(rows + row * stride, rows + row * stride, width, norm);
}

// out += norm(input), a norm behind a half block (Gemma 2, OLMo 2). The input is not kept.
static void add_norm(float* input, float* out, int64_t stride, int64_t width, const Norm& norm,
                     int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    float* x = input + row * stride;
    float* y = out + row * stride;
    norm_row(x, x, width, norm);
    for (int64_t i = 0; i < width; i += 16) store(y + i, add(load(y + i), load(x + i)));
  }
}
