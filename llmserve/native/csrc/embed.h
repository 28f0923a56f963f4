// Token ids to the first rows of the residual stream.

INLINE float number_at(const void* table, Number kind, int64_t place) {
  uint32_t bits;
  float value;
  if (kind == Number::kFloat32) return static_cast<const float*>(table)[place];
  const uint16_t half = static_cast<const uint16_t*>(table)[place];
  if (kind == Number::kBfloat16) {
    bits = static_cast<uint32_t>(half) << 16;
    memcpy(&value, &bits, 4);
    return value;
  }
  // float16: a normal number has its exponent moved, the others are a whole number of 2^-24.
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31u, fraction = half & 1023u;
  if (exponent == 0) {
    value = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    memcpy(&bits, &value, 4);
    bits |= sign;
  } else {
    bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23) | fraction << 13;
  }
  memcpy(&value, &bits, 4);
  return value;
}

static void embed(const EmbedCall& call, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    float* out = call.out + row * call.stride;
    const int64_t start = call.token_ids[row] * call.width;
    for (int64_t i = 0; i < call.width; ++i)
      out[i] = number_at(call.table, call.table_kind, start + i) * call.scale;
    if (call.position_table != nullptr) {
      const int64_t place = call.positions[row] * call.width;
      for (int64_t i = 0; i < call.width; ++i)
        out[i] += number_at(call.position_table, call.position_kind, place + i);
    }
    for (int64_t i = call.width; i < call.stride; ++i) out[i] = 0.0f;
  }
}
