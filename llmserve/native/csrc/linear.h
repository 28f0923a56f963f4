// Products of a few rows with a weight packed in blocks of 16 outputs. Lane = output, so nothing is
// summed across lanes, and a row's sums do not know how many rows go beside it:
//
// - integers: inside a group int32 sums of each digit, exact in any order; groups one after another
//   in float32, sum = fma(integer, weight scale * row scale, sum), where the integer of two digits is
//   fma(high, kDigitBase, low);
// - floats: inputs one after another, sum = fma(weight, x, sum).
//
// The error against the exact product of the stored numbers is that of these float32 operations:
// at most (groups + 2) * 2^-24 of the sum of magnitudes for integers, width * 2^-24 for floats.

INLINE F load_scale(const Linear& w, int64_t block, int64_t group) {
  const int64_t place = (block * w.num_groups + group) * 16;
  if (w.scale_kind == Number::kBfloat16)
    return load_bf16(reinterpret_cast<const uint16_t*>(w.scales) + place);
  return load(reinterpret_cast<const float*>(w.scales) + place);
}

// The integer of two digits' sums.
INLINE F join_digits(F high, F low) { return fma(high, set1(kDigitBase), low); }

INLINE int32_t four_bytes(const int8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return x;
}

// What a group's dots begin with: what the stored weights carry on top of their values, taken off.
template <int BITS>
INLINE I group_start(const Linear& w, int64_t block, int64_t group, int32_t total) {
  // The middle of the range, less what the dots themselves take off.
  constexpr int32_t kMiddle = BITS == 4 ? 8 : 128, kTaken = BITS == 4 ? 0 : 128 - kByteOffset;
  if (w.zeros == nullptr) return iset1(-total * (kMiddle - kTaken));
  const I zero_points = load_uint8(w.zeros + (block * w.num_groups + group) * 16);
  return imul(iadd(zero_points, iset1(-kTaken)), iset1(-total));
}

// A row or a few wait for weights more than they multiply: so many bytes of each block are asked for
// before they are needed, that enough lines are under way for the memory's latency.
constexpr int64_t kBytesAhead = 4096;
constexpr int64_t kScaleBytesAhead = 1024;

// Asks for the weights of a panel's NB blocks line by line, `kBytesAhead` before they are read. Behind
// a block come those of the block that lies at its place in the next panel. Where nothing is left to
// ask for, lines are that have been read.
template <int NB>
struct Lookahead {
  const uint8_t* line;
  int64_t block_bytes;
  int64_t unit_bytes;   // between two calls of `pass`
  int64_t units_left;   // of the block
  int64_t panels_left;  // behind it

  // `num_panels`, this one and those that are read after it; 0: it was read before, for other rows.
  Lookahead(const uint8_t* weights, int64_t block_bytes, int64_t unit_bytes, int64_t num_panels)
      : line(weights), block_bytes(block_bytes), unit_bytes(unit_bytes) {
    const int64_t panels = kBytesAhead / block_bytes;
    const int64_t units = (kBytesAhead - panels * block_bytes) / unit_bytes;
    units_left = block_bytes / unit_bytes;
    panels_left = num_panels - 1 - panels;
    if (panels_left < 0) return;
    line += panels * NB * block_bytes + units * unit_bytes;
    units_left -= units;
  }

  INLINE_LAMBDA void ask() {
    for (int b = 0; b < NB; ++b) __builtin_prefetch(line + b * block_bytes);
    line += 64;
  }

  INLINE_LAMBDA void pass() {
    if (--units_left > 0) return;
    units_left = block_bytes / unit_bytes;
    line += (--panels_left < 0 ? -1 : NB - 1) * block_bytes;
  }
};

// 4-bit weights times rows of one digit.
template <int MR, int NB>
static inline void int4_tile(const Linear& w, const Prepared& x, int64_t row, int64_t block,
                             int64_t num_panels, F (&sum)[MR][NB]) {
  const int64_t chunks = w.padded_group / 8;  // of 64 bytes
  const int64_t block_bytes = w.num_groups * chunks * 64;
  const uint8_t* q = w.values + block * block_bytes;
  Lookahead<NB> ahead(q, block_bytes, chunks * 64, num_panels);
  const int64_t scale_bytes = 16 * bytes_of(w.scale_kind);
  const uint8_t* scales_ahead = w.scales + block * w.num_groups * scale_bytes + kScaleBytesAhead;
  const int8_t* row_bytes = x.integers + row * x.integer_stride;
  for (int m = 0; m < MR; ++m)
    for (int b = 0; b < NB; ++b) sum[m][b] = zero();
  for (int64_t g = 0; g < w.num_groups; ++g) {
    I dots[MR][NB];
    for (int m = 0; m < MR; ++m)
      for (int b = 0; b < NB; ++b)
        dots[m][b] = group_start<4>(w, block + b, g, x.sums[(row + m) * w.num_groups + g]);
    for (int64_t c = 0; c < chunks; ++c, q += 64, row_bytes += 8) {
      W low[NB], high[NB];
      ahead.ask();
      for (int b = 0; b < NB; ++b) {
        const W both = load_weights(q + b * block_bytes);
        low[b] = low_nibbles(both);
        high[b] = high_nibbles(both);
      }
      for (int m = 0; m < MR; ++m) {
        const int32_t x0 = four_bytes(row_bytes + m * x.integer_stride);
        const int32_t x1 = four_bytes(row_bytes + m * x.integer_stride + 4);
        for (int b = 0; b < NB; ++b) dots[m][b] = dot4_small(dots[m][b], low[b], x0);
        for (int b = 0; b < NB; ++b) dots[m][b] = dot4_small(dots[m][b], high[b], x1);
      }
    }
    ahead.pass();
    for (int b = 0; b < NB; ++b) __builtin_prefetch(scales_ahead + b * w.num_groups * scale_bytes);
    scales_ahead += scale_bytes;
    for (int b = 0; b < NB; ++b) {
      const F scale = load_scale(w, block + b, g);
      for (int m = 0; m < MR; ++m) {
        const F factor = mul(scale, set1(x.scales[(row + m) * w.num_groups + g]));
        sum[m][b] = fma(to_float(dots[m][b]), factor, sum[m][b]);
      }
    }
  }
}

// 8-bit weights times rows of two digits.
template <int MR, int NB>
static inline void int8_tile(const Linear& w, const Prepared& x, int64_t row, int64_t block,
                             int64_t num_panels, F (&sum)[MR][NB]) {
  const int64_t chunks = w.padded_group / 4;
  const int64_t block_bytes = w.num_groups * chunks * 64;
  const uint8_t* q = w.values + block * block_bytes;
  Lookahead<NB> ahead(q, block_bytes, 64, num_panels);
  const int8_t* row_bytes = x.integers + row * x.integer_stride;
  for (int m = 0; m < MR; ++m)
    for (int b = 0; b < NB; ++b) sum[m][b] = zero();
  for (int64_t g = 0; g < w.num_groups; ++g) {
    I high[MR][NB], low[MR][NB];
    for (int m = 0; m < MR; ++m) {
      const int32_t* totals = x.sums + (row + m) * 2 * w.num_groups + g;
      for (int b = 0; b < NB; ++b) {
        high[m][b] = group_start<8>(w, block + b, g, totals[0]);
        low[m][b] = group_start<8>(w, block + b, g, totals[w.num_groups]);
      }
    }
    for (int64_t c = 0; c < chunks; ++c, q += 64, row_bytes += 4) {
      W weights[NB];
      ahead.ask();
      ahead.pass();
      for (int b = 0; b < NB; ++b) weights[b] = load_weights(q + b * block_bytes);
      for (int m = 0; m < MR; ++m) {
        const int32_t x0 = four_bytes(row_bytes + m * x.integer_stride);
        const int32_t x1 = four_bytes(row_bytes + m * x.integer_stride + x.digit_stride);
        for (int b = 0; b < NB; ++b) high[m][b] = dot4(high[m][b], weights[b], x0);
        for (int b = 0; b < NB; ++b) low[m][b] = dot4(low[m][b], weights[b], x1);
      }
    }
    for (int b = 0; b < NB; ++b) {
      const F scale = load_scale(w, block + b, g);
      for (int m = 0; m < MR; ++m) {
        const F factor = mul(scale, set1(x.scales[(row + m) * w.num_groups + g]));
        sum[m][b] = fma(join_digits(to_float(high[m][b]), to_float(low[m][b])), factor, sum[m][b]);
      }
    }
  }
}

// Integer weights times float rows: a group's sum in float32, then its scale.
template <int BITS, int MR, int NB>
static inline void mixed_tile(const Linear& w, const Prepared& x, int64_t row, int64_t block,
                              F (&sum)[MR][NB]) {
  constexpr int kInputs = BITS == 4 ? 8 : 4;
  const int64_t chunks = w.padded_group / kInputs;
  const int64_t block_bytes = w.num_groups * chunks * 64;
  const uint8_t* q = w.values + block * block_bytes;
  for (int m = 0; m < MR; ++m)
    for (int b = 0; b < NB; ++b) sum[m][b] = zero();
  for (int64_t g = 0; g < w.num_groups; ++g) {
    F part[MR][NB], middle[NB];
    for (int b = 0; b < NB; ++b) {
      middle[b] = set1(BITS == 4 ? 8.0f : 128.0f);
      if (w.zeros != nullptr)
        middle[b] = to_float(load_uint8(w.zeros + ((block + b) * w.num_groups + g) * 16));
      for (int m = 0; m < MR; ++m) part[m][b] = zero();
    }
    const float* in = x.values + row * x.stride + g * w.group_size;
    for (int64_t k = 0; k < group_length(w.width, w.group_size, g); ++k) {
      const uint8_t* chunk = q + (g * chunks + k / kInputs) * 64 + k % 4;
      const int shift = BITS == 4 && k % 8 >= 4 ? 4 : 0;
      for (int b = 0; b < NB; ++b) {
        int32_t lanes[16];
        for (int i = 0; i < 16; ++i) {
          const int32_t byte = chunk[b * block_bytes + 4 * i];
          lanes[i] = BITS == 4 ? (byte >> shift) & 15 : byte;
        }
        I integers;
        memcpy(&integers, lanes, sizeof lanes);
        const F value = sub(to_float(integers), middle[b]);
        for (int m = 0; m < MR; ++m)
          part[m][b] = fma(value, set1(in[m * x.stride + k]), part[m][b]);
      }
    }
    for (int b = 0; b < NB; ++b)
      for (int m = 0; m < MR; ++m)
        sum[m][b] = fma(part[m][b], load_scale(w, block + b, g), sum[m][b]);
  }
}

template <bool IS_BF16, int MR, int NB>
static inline void float_tile(const Linear& w, const Prepared& x, int64_t row, int64_t block,
                              int64_t num_panels, F (&sum)[MR][NB]) {
  const int64_t chunks = IS_BF16 ? (w.width + 1) / 2 : w.width;
  const int64_t block_bytes = chunks * 64;
  const uint8_t* q = w.values + block * block_bytes;
  const float* in = x.values + row * x.stride;
  Lookahead<NB> ahead(q, block_bytes, 64, num_panels);
  for (int m = 0; m < MR; ++m)
    for (int b = 0; b < NB; ++b) sum[m][b] = zero();
  for (int64_t c = 0; c < chunks; ++c, q += 64) {
    ahead.ask();
    ahead.pass();
    if constexpr (IS_BF16) {
      F even[NB], odd[NB];
      for (int b = 0; b < NB; ++b) {
        const W both = load_weights(q + b * block_bytes);
        even[b] = even_bf16(both);
        odd[b] = odd_bf16(both);
      }
      for (int m = 0; m < MR; ++m) {
        const F x0 = set1(in[m * x.stride + 2 * c]), x1 = set1(in[m * x.stride + 2 * c + 1]);
        for (int b = 0; b < NB; ++b) sum[m][b] = fma(even[b], x0, sum[m][b]);
        for (int b = 0; b < NB; ++b) sum[m][b] = fma(odd[b], x1, sum[m][b]);
      }
    } else {
      F value[NB];
      for (int b = 0; b < NB; ++b)
        value[b] = load(reinterpret_cast<const float*>(q + b * block_bytes));
      for (int m = 0; m < MR; ++m) {
        const F x0 = set1(in[m * x.stride + c]);
        for (int b = 0; b < NB; ++b) sum[m][b] = fma(value[b], x0, sum[m][b]);
      }
    }
  }
}

template <int MR, int NB>
INLINE void finish(const LinearCall& call, int64_t row, int64_t block, F (&sum)[MR][NB]) {
  const float* bias = call.weight->bias;
  if (bias != nullptr)
    for (int b = 0; b < NB; ++b)
      for (int m = 0; m < MR; ++m) sum[m][b] = add(sum[m][b], load(bias + (block + b) * 16));
  for (int m = 0; m < MR; ++m) {
    float* out = call.out + (row + m) * call.stride;
    if (call.epilogue == Epilogue::kSwiglu || call.epilogue == Epilogue::kGeglu) {
      if constexpr (NB == 2) {
        const F gate = call.epilogue == Epilogue::kSwiglu ? silu(sum[m][0]) : gelu_tanh(sum[m][0]);
        store(out + block / 2 * 16, mul(gate, sum[m][1]));
      }
      continue;
    }
    for (int b = 0; b < NB; ++b) {
      float* place = out + (block + b) * 16;
      switch (call.epilogue) {
        case Epilogue::kAdd:
          store(place, add(load(place), sum[m][b]));
          break;
        case Epilogue::kGelu:
          store(place, gelu(sum[m][b]));
          break;
        case Epilogue::kGeluTanh:
          store(place, gelu_tanh(sum[m][b]));
          break;
        default:
          if (call.cap > 0.0f)
            sum[m][b] = mul(set1(call.cap), tanh(mul(sum[m][b], set1(1.0f / call.cap))));
          store(place, sum[m][b]);
      }
    }
  }
}

template <int MR, int NB>
static void linear_tile(const LinearCall& call, int64_t row, int64_t block, int64_t num_panels) {
  const Linear& w = *call.weight;
  F sum[MR][NB] = {};
  switch (w.kind) {
    case WeightKind::kInt4:
      if (w.has_float_rows) mixed_tile<4, MR, NB>(w, call.input, row, block, sum);
      else int4_tile<MR, NB>(w, call.input, row, block, num_panels, sum);
      break;
    case WeightKind::kInt8:
      if (w.has_float_rows) mixed_tile<8, MR, NB>(w, call.input, row, block, sum);
      else int8_tile<MR, NB>(w, call.input, row, block, num_panels, sum);
      break;
    case WeightKind::kBfloat16:
      float_tile<true, MR, NB>(w, call.input, row, block, num_panels, sum);
      break;
    case WeightKind::kFloat32:
      float_tile<false, MR, NB>(w, call.input, row, block, num_panels, sum);
      break;
  }
  finish(call, row, block, sum);
}

// Most rows of a tile: what a path's registers hold.
constexpr int kMostTileRows = PATH_VECTOR_BYTES == 64 ? 6 : 3;

// A tile of `height` rows, at most MR.
template <int NB, int MR = kMostTileRows>
static void linear_tile_of(const LinearCall& call, int64_t height, int64_t row, int64_t block,
                           int64_t num_panels) {
  if constexpr (MR > 1)
    if (height < MR) return linear_tile_of<NB, MR - 1>(call, height, row, block, num_panels);
  linear_tile<MR, NB>(call, row, block, num_panels);
}

// `num_panels`, that of `block` and those that come after it.
template <int NB>
static void linear_rows(const LinearCall& call, int64_t first, int64_t last, int64_t block,
                        int64_t num_panels) {
  // Tiles of nearly equal height: the last one is no straggler that loads the weights for one row.
  int64_t tiles = (last - first + kMostTileRows - 1) / kMostTileRows;
  for (int64_t row = first; row < last; --tiles) {
    const int64_t height = (last - row + tiles - 1) / tiles;
    linear_tile_of<NB>(call, height, row, block, row == first ? num_panels : 0);
    row += height;
  }
}

// Rows first_row..last_row-1 and panels of two blocks first_panel..last_panel-1.
static void linear(const LinearCall& call, int64_t first_row, int64_t last_row,
                   int64_t first_panel, int64_t last_panel) {
  const int64_t num_blocks = call.weight->num_blocks();
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const int64_t block = panel * kPanelBlocks;
    const int64_t num_panels = last_panel - panel;
    if (block + 2 <= num_blocks) linear_rows<2>(call, first_row, last_row, block, num_panels);
    else linear_rows<1>(call, first_row, last_row, block, num_panels);
  }
}

// out = activation(gate) * up, or the activation alone; rows of whole vectors.
static void gate(const float* gates, const float* ups, float* out, int64_t stride,
                 Epilogue epilogue, int64_t first, int64_t last) {
  for (int64_t i = first * stride; i < last * stride; i += 16) {
    const F x = load(gates + i);
    switch (epilogue) {
      case Epilogue::kSwiglu: store(out + i, mul(silu(x), load(ups + i))); break;
      case Epilogue::kGeglu: store(out + i, mul(gelu_tanh(x), load(ups + i))); break;
      case Epilogue::kGelu: store(out + i, gelu(x)); break;
      default: store(out + i, gelu_tanh(x));
    }
  }
}
