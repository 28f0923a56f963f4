// Mixtures of experts, beside the products themselves: the router's shares and weighted sums.

static void softmax(const float* values, float* out, int64_t count) {
  F largest = set1(-__builtin_inff());
  for (int64_t i = 0; i < count; i += 16) {
    const int n = static_cast<int>(count - i < 16 ? count - i : 16);
    largest = max(choose(0, n, load(values + i), largest), largest);
  }
  const F most = set1(reduce_max(largest));
  F sum = zero();
  for (int64_t i = 0; i < count; i += 16) {
    const int n = static_cast<int>(count - i < 16 ? count - i : 16);
    const F weight = choose(0, n, exp(sub(load(values + i), most)), zero());
    store(out + i, weight);
    sum = add(sum, weight);
  }
  const F factor = set1(1.0f / reduce_add(sum));
  for (int64_t i = 0; i < count; i += 16) store(out + i, mul(load(out + i), factor));
}

static void add_scaled(const float* input, float factor, float* out, int64_t width,
                       bool is_added) {
  for (int64_t i = 0; i < width; i += 16) {
    const F before = is_added ? load(out + i) : zero();
    store(out + i, fma(load(input + i), set1(factor), before));
  }
}

static void add_gated(const float* input, const float* gates, int64_t gate_stride, float* out,
                      int64_t stride, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    float factors[16];
    store(factors, sigmoid(set1(gates[row * gate_stride])));
    add_scaled(input + row * stride, factors[0], out + row * stride, stride, true);
  }
}
