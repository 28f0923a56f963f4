// Queries and keys turned to their positions, in the halves layout of Hugging Face's Llama (RoPE,
// arXiv 2104.09864), keys and values written to the cache. Attention reads them from there, as
// stored, a token's own included.

static void rotate_head(float* x, int64_t rotary_dim, const float* cosines) {
  const int64_t half = rotary_dim / 2;
  const float* sines = cosines + half;
  int64_t i = 0;
  for (; i + 16 <= half; i += 16) {
    const F a = load(x + i), b = load(x + half + i), c = load(cosines + i), s = load(sines + i);
    store(x + i, sub(mul(a, c), mul(b, s)));
    store(x + half + i, add(mul(b, c), mul(a, s)));
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = a * cosines[i] - b * sines[i];
    x[half + i] = b * cosines[i] + a * sines[i];
  }
}

// A head is any 16-multiple or not: the norm of what is not goes through a padded copy.
static void norm_head(float* x, int64_t width, const Norm& norm) {
  float copy[272];
  memset(copy, 0, sizeof copy);
  memcpy(copy, x, static_cast<size_t>(width) * 4);
  norm_row(copy, copy, width, norm);
  memcpy(x, copy, static_cast<size_t>(width) * 4);
}

static void norm_heads(float* x, int64_t num_heads, int64_t head_dim, const Norm& norm,
                       bool is_whole) {
  if (norm.kind == NormKind::kNone) return;
  if (is_whole) {
    // Over all heads at once, in pieces of whole vectors: sums as in norm_row.
    const int64_t width = num_heads * head_dim;
    const float squares = sum_row(x, width, [none = zero()](F v, F sum, int n) INLINE_LAMBDA {
      const F kept = choose(0, n, v, none);
      return fma(kept, kept, sum);
    });
    const float factor = 1.0f / __builtin_sqrtf(squares / static_cast<float>(width) + norm.eps);
    for (int64_t i = 0; i < width; ++i) x[i] = x[i] * factor * norm.weight[i];
    return;
  }
  for (int64_t h = 0; h < num_heads; ++h) norm_head(x + h * head_dim, head_dim, norm);
}

INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bits = x != x ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  return static_cast<uint16_t>(bits >> 16);
}

// One head's key or value as int8 of scale largest / 127; the scale carries a NaN.
static float quantize_head(const float* x, int64_t width, int8_t* out) {
  float padded[272];
  int8_t integers[272];
  memset(padded, 0, sizeof padded);
  memcpy(padded, x, static_cast<size_t>(width) * 4);
  float scale;
  int32_t sum;
  quantize_row<1>(padded, width, width, width, 1, integers, 0, &scale, &sum);
  memcpy(out, integers, static_cast<size_t>(width));
  return scale;
}

static void write_cache(const LayerCache& cache, int64_t slot, const float* keys,
                        const float* values) {
  const int64_t block = slot / cache.block_size, place = slot % cache.block_size;
  const int64_t width = cache.head_dim;
  for (int64_t h = 0; h < cache.num_kv_heads; ++h) {
    uint8_t* head = cache.head(block, h);
    const float* k = keys + h * width;
    const float* v = values + h * width;
    const int64_t key = place / 16 * 16 * width + place % 16;  // stride 16
    const int64_t value = (cache.block_size + place) * width;
    if (cache.kind == Number::kFloat32) {
      float* data = reinterpret_cast<float*>(head);
      for (int64_t d = 0; d < width; ++d) data[key + 16 * d] = k[d];
      memcpy(data + value, v, static_cast<size_t>(width) * 4);
    } else if (cache.kind == Number::kBfloat16) {
      uint16_t* data = reinterpret_cast<uint16_t*>(head);
      for (int64_t d = 0; d < width; ++d) data[key + 16 * d] = to_bf16(k[d]);
      for (int64_t d = 0; d < width; ++d) data[value + d] = to_bf16(v[d]);
    } else {
      int8_t* data = reinterpret_cast<int8_t*>(head);
      float* scales = reinterpret_cast<float*>(head + 2 * cache.block_size * width);
      int8_t integers[272];
      scales[place] = quantize_head(k, width, integers);
      for (int64_t d = 0; d < width; ++d) data[key + 16 * d] = integers[d];
      scales[cache.block_size + place] = quantize_head(v, width, integers);
      memcpy(data + value, integers, static_cast<size_t>(width));
    }
  }
}

static void rope(const RopeCall& call, int64_t first, int64_t last) {
  const int64_t width = call.cache.head_dim, num_kv_heads = call.cache.num_kv_heads;
  for (int64_t row = first; row < last; ++row) {
    float* q = call.qkv + row * call.stride;
    float* k = q + call.num_heads * width;
    norm_heads(q, call.num_heads, width, call.query_norm, call.is_whole_norm);
    norm_heads(k, num_kv_heads, width, call.key_norm, call.is_whole_norm);
    if (call.rotary_dim > 0) {
      const float* turn = call.table + call.positions[row] * call.rotary_dim;
      for (int64_t h = 0; h < call.num_heads; ++h)
        rotate_head(q + h * width, call.rotary_dim, turn);
      for (int64_t h = 0; h < num_kv_heads; ++h)
        rotate_head(k + h * width, call.rotary_dim, turn);
    }
    write_cache(call.cache, call.slots[row], k, k + num_kv_heads * width);
  }
}
