// From a row of the residual stream to what a product reads: norm, then int8 with a scale for each
// group. Sums are made in 64 virtual lanes (four vectors) and joined in one written order, so a
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

// One group of a row → integers with zeros up to `padded` or beyond, its scale, its sum.
// A NaN or an infinity makes the scale NaN, so that it is not lost.
INLINE void quantize_group(const float* x, int64_t size, int64_t padded, int8_t* integers,
                           float* scale, int32_t* sum) {
  F largest = zero(), probe = zero();
  for (int64_t i = 0; i < size; i += 16) {
    const int n = static_cast<int>(size - i < 16 ? size - i : 16);
    const F v = choose(0, n, load(x + i), zero());
    largest = max(largest, abs(v));
    probe = fma(v, zero(), probe);
  }
  const float most = reduce_max(largest);
  const float step = most / 127.0f;
  const bool is_zero = !(most > 1e-30f);
  const F inverse = set1(is_zero ? 0.0f : 127.0f / most);
  I total = iset1(0);
  for (int64_t i = 0; i < padded; i += 16) {
    const int n = static_cast<int>(size - i < 0 ? 0 : size - i < 16 ? size - i : 16);
    const I q = to_int(mul(choose(0, n, load(x + i), zero()), inverse));
    store_int8(integers + i, q);
    total = iadd(total, q);
  }
  int32_t lanes[16];
  memcpy(lanes, &total, sizeof lanes);
  *sum = reduce_add(lanes);
  *scale = (is_zero ? 0.0f : step) + reduce_add(probe);
}

// Rows first..last-1 of the input; row r becomes row r - shift of `out`.
static void prepare(const PrepareCall& call, const Prepared& out, int64_t first, int64_t last,
                    int64_t shift) {
  for (int64_t row = first; row < last; ++row) {
    const float* x = call.input + row * call.stride;
    const int64_t place = row - shift;
    float* values = out.values == nullptr ? nullptr : out.values + place * out.stride;
    if (call.norm.kind != NormKind::kNone) {
      norm_row(x, values, call.width, call.norm);
      x = values;
    } else if (call.has_values) {
      const int64_t padded = (call.width + 15) / 16 * 16;
      memcpy(values, x, static_cast<size_t>(padded) * 4);
      x = values;
    }
    if (!call.has_integers) continue;
    if (call.order != nullptr) {
      float* ordered = values + out.stride / 2;
      for (int64_t i = 0; i < call.width; ++i) ordered[i] = x[call.order[i]];
      x = ordered;
    }
    int8_t* integers = out.integers + place * out.integer_stride;
    for (int64_t g = 0; g < call.num_groups; ++g)
      quantize_group(x + g * call.group_size, group_length(call.width, call.group_size, g),
                     call.padded_group, integers + g * call.padded_group, out.scales + place * call.num_groups + g,
                     out.sums + place * call.num_groups + g);
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
