// Functions of 16 floats from additions, products and fused ones alone: the same bits on every
// path, for each lane apart.

// e to the x for x up to 88, within 2 units in the last place; x under -87 counts as -87.
INLINE F exp(F x) {
  x = max(set1(-87.0f), x);  // in this order NaN stays NaN
  x = min(set1(88.0f), x);
  const I n = to_int(mul(x, set1(1.44269504088896341f)));
  const F whole = to_float(n);
  F r = fma(whole, set1(-0.693145751953125f), x);           // ln 2, its first bits,
  r = fma(whole, set1(-1.42860682030941723e-6f), r);        // and the rest
  F p = set1(1.3981999507e-3f);                             // near 1 / 6!
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(mul(r, r), p, r);
  return mul(add(p, set1(1.0f)), power_of_two(n));
}

INLINE F sigmoid(F x) {
  return div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), x))));
}

INLINE F silu(F x) { return div(x, add(set1(1.0f), exp(sub(zero(), x)))); }

// tanh by e to the 2x: 1 - 2 / (e^2x + 1); absolute error under 2e-7.
INLINE F tanh(F x) {
  const F doubled = min(set1(40.0f), max(set1(-40.0f), add(x, x)));
  return sub(set1(1.0f), div(set1(2.0f), add(exp(doubled), set1(1.0f))));
}

INLINE F gelu_tanh(F x) {
  const F cube = mul(mul(x, x), x);
  const F inner = mul(set1(0.7978845608028654f), fma(set1(0.044715f), cube, x));
  return mul(mul(set1(0.5f), x), add(set1(1.0f), tanh(inner)));
}

// The complementary error function of |x| by Abramowitz and Stegun 7.1.26, which is within 1.5e-7.
INLINE F gelu(F x) {
  const F z = mul(abs(x), set1(0.7071067811865476f));
  const F t = div(set1(1.0f), fma(set1(0.3275911f), z, set1(1.0f)));
  F p = fma(set1(1.061405429f), t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  const F tail = mul(mul(p, t), exp(sub(zero(), mul(z, z))));  // erfc(z)
  const F half = mul(set1(0.5f), mul(x, tail));
  float in[16], negative[16], out[16];
  store(in, x);
  store(negative, half);
  // x * (1 - erfc / 2) for positive x, x * erfc / 2 for negative.
  store(out, sub(x, half));
  for (int i = 0; i < 16; ++i) out[i] = in[i] < 0.0f ? negative[i] : out[i];
  return load(out);
}
