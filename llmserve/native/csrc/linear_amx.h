// Products on the matrix unit (Intel AMX): tiles of 16 rows times 16 outputs. A group's products are
// summed as integers there, so these are the bits of linear.h. Weights are used as they are packed:
// 16 chunks of 8-bit ones are a tile; 4-bit ones are spread out first, once for all rows.

namespace tile {

// Tiles 0-3 are sums, 4 and 5 rows, 6 and 7 weights; of 64 inputs, or of 32 where groups ask for it.
constexpr int64_t kInputs = 64;

static void configure(int64_t num_inputs) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int t = 0; t < 8; ++t) config.row_bytes[t] = 64, config.rows[t] = 16;
  for (int t = 4; t < 6; ++t) config.row_bytes[t] = static_cast<uint16_t>(num_inputs);
  for (int t = 6; t < 8; ++t) config.rows[t] = static_cast<uint8_t>(num_inputs / 4);
  asm volatile("" ::: "memory");  // GCC 12 may drop the stores above
  _tile_loadconfig(&config);
}

}  // namespace tile

// Groups whose sums are made before the first of them is scaled: the unit works ahead.
constexpr int64_t kAhead = 8;
// Inputs of 4-bit weights that are spread out at a time: two blocks of them, the sums and a tile's
// rows fit the first cache.
constexpr int64_t kSpreadInputs = 512;
constexpr int64_t kLine = 64;

// Room of a thread, made when first needed and kept.
struct TileScratch {
  alignas(64) int32_t dots[kAhead][kTileRows * 16];
  alignas(64) float sums[kPanelBlocks][kTileRows * 16];
  alignas(64) uint8_t tail[kPanelBlocks][1024];
  Aligned<int8_t> weights;     // [blocks, inputs, 16]
  Aligned<float> row_sums;     // [rows, blocks, 16]
};

static TileScratch& tile_scratch() {
  static thread_local std::unique_ptr<TileScratch> scratch;
  if (scratch == nullptr) scratch = std::make_unique<TileScratch>();
  return *scratch;
}

// Lines that will be read soon, asked for a few at a time.
struct Ahead {
  const uint8_t* at;
  const uint8_t* end;

  INLINE_LAMBDA void ask(int64_t num_lines) {
    for (; num_lines > 0 && at < end; --num_lines, at += kLine) __builtin_prefetch(at, 0, 2);
  }
};

// Groups first..last-1 of a block of 4-bit weights as signed bytes, what stands for zero taken off,
// in rows of four inputs.
static void spread_int4(const Linear& w, int64_t block, int64_t first, int64_t last, int8_t* out) {
  const int64_t chunks = w.padded_group / 8;
  const uint8_t* q = w.values + (block * w.num_groups + first) * chunks * 64;
  for (int64_t g = first; g < last; ++g) {
    __m512i zero_byte = _mm512_set1_epi8(8);
    if (w.zeros != nullptr)
      zero_byte = _mm512_mullo_epi32(load_uint8(w.zeros + (block * w.num_groups + g) * 16),
                                     _mm512_set1_epi32(0x01010101));
    for (int64_t c = 0; c < chunks; ++c, q += 64, out += 128) {
      const W both = load_weights(q);
      _mm512_store_si512(out, _mm512_sub_epi8(low_nibbles(both), zero_byte));
      _mm512_store_si512(out + 64, _mm512_sub_epi8(high_nibbles(both), zero_byte));
    }
  }
}

// Sums of one group, [16 rows, 16 outputs]. ODD: with the other three tiles, so that neighbours do
// not wait for each other.
template <bool ODD, int64_t INPUTS>
INLINE void group_dots(const int8_t* rows, int64_t row_stride, const int8_t* weights,
                       int64_t num_inputs, int32_t* out) {
  if constexpr (ODD) _tile_zero(1);
  else _tile_zero(0);
  for (int64_t k = 0; k < num_inputs; k += INPUTS) {
    if constexpr (ODD) {
      _tile_loadd(5, rows + k, row_stride);
      _tile_loadd(7, weights + 16 * k, 64);
      _tile_dpbssd(1, 5, 7);
    } else {
      _tile_loadd(4, rows + k, row_stride);
      _tile_loadd(6, weights + 16 * k, 64);
      _tile_dpbssd(0, 4, 6);
    }
  }
  if constexpr (ODD) _tile_stored(1, out, 64);
  else _tile_stored(0, out, 64);
}

// Groups first..last-1 of a block that were spread out, and what comes after them.
struct Spread {
  int64_t block, first, last;
  const int8_t* weights;
  Ahead ahead;
};

// MR rows from `row` on times groups of a block of 4-bit weights, added to sums [MR, stride].
template <int64_t INPUTS, int MR>
static void int4_block(const Linear& w, const Prepared& x, int64_t row, Spread& spread,
                       TileScratch& scratch, float* sums, int64_t stride) {
  const int64_t size = w.padded_group, groups = w.num_groups;
  const int8_t* rows = x.integers + row * x.integer_stride + spread.first * size;
  F sum[MR];
  for (int m = 0; m < MR; ++m) sum[m] = spread.first == 0 ? zero() : load(sums + m * stride);
  for (int64_t first = spread.first; first < spread.last; first += kAhead) {
    const int64_t count = spread.last - first < kAhead ? spread.last - first : kAhead;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t at = (first - spread.first + j) * size;
      const auto dots = j % 2 == 0 ? group_dots<false, INPUTS> : group_dots<true, INPUTS>;
      dots(rows + at, x.integer_stride, spread.weights + 16 * at, size, scratch.dots[j]);
      spread.ahead.ask(size / 8);
    }
    for (int64_t j = 0; j < count; ++j) {
      const F scale = load_scale(w, spread.block, first + j);
      const float* row_scales = x.scales + row * groups + first + j;
      for (int m = 0; m < MR; ++m) {
        const F factor = mul(scale, set1(row_scales[m * groups]));
        const I dots = _mm512_load_si512(scratch.dots[j] + 16 * m);
        sum[m] = fma(to_float(dots), factor, sum[m]);
      }
    }
  }
  for (int m = 0; m < MR; ++m) store(sums + m * stride, sum[m]);
}

template <int64_t INPUTS>
static void int4_rows(const Linear& w, const Prepared& x, int64_t row, int64_t count,
                      Spread& spread, TileScratch& scratch, float* sums, int64_t stride) {
  const auto run = count > 12  ? int4_block<INPUTS, 16>
                   : count > 8 ? int4_block<INPUTS, 12>
                   : count > 4 ? int4_block<INPUTS, 8>
                               : int4_block<INPUTS, 4>;
  run(w, x, row, spread, scratch, sums, stride);
}

template <int NB>
static void finish_rows(const LinearCall& call, int64_t row, int64_t count, int64_t block,
                        const float* sums) {
  for (int64_t m = 0; m < count; ++m) {
    F sum[1][NB];
    for (int b = 0; b < NB; ++b) sum[0][b] = load(sums + (NB * m + b) * 16);
    finish(call, row + m, block, sum);
  }
}

// NB blocks of 4-bit weights, spread out once for all rows, `most` groups at a time.
template <int64_t INPUTS, int NB>
static void int4_panel(const LinearCall& call, int64_t first, int64_t last, int64_t block,
                       TileScratch& scratch) {
  const Linear& w = *call.weight;
  const int64_t size = w.padded_group, group_bytes = size * 8;
  const int64_t block_bytes = w.num_groups * group_bytes;
  const int64_t most = std::max<int64_t>(1, kSpreadInputs / size), room = most * size * 16;
  int8_t* weights = scratch.weights.reserve(NB * room);
  float* sums = scratch.row_sums.reserve((last - first + kTileRows) * NB * 16);
  for (int64_t g = 0; g < w.num_groups; g += most) {
    const int64_t end = std::min(g + most, w.num_groups);
    const bool is_last = end == w.num_groups;
    Spread spreads[NB];
    for (int b = 0; b < NB; ++b) {
      spread_int4(w, block + b, g, end, weights + b * room);
      // The groups behind these; behind the last ones come the next panel's first.
      const uint8_t* next = w.values + (block + b + (is_last ? NB - 1 : 0)) * block_bytes;
      next += end * group_bytes;
      spreads[b] = {block + b, g, end, weights + b * room, {next, next + most * group_bytes}};
    }
    for (int64_t row = first; row < last; row += kTileRows) {
      const int64_t count = std::min(last - row, kTileRows);
      float* tile_sums = sums + (row - first) * NB * 16;
      for (int b = 0; b < NB; ++b)
        int4_rows<INPUTS>(w, call.input, row, count, spreads[b], scratch, tile_sums + 16 * b,
                          NB * 16);
      if (is_last) finish_rows<NB>(call, row, count, block, tile_sums);
    }
  }
}

template <int64_t INPUTS>
static void int4_panels(const LinearCall& call, int64_t first, int64_t last, int64_t first_panel,
                        int64_t last_panel, TileScratch& scratch) {
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const int64_t block = panel * kPanelBlocks;
    if (block + 2 <= call.weight->num_blocks())
      int4_panel<INPUTS, 2>(call, first, last, block, scratch);
    else
      int4_panel<INPUTS, 1>(call, first, last, block, scratch);
  }
}

// The sums of NB blocks: tiles 0 and 1 of the first part or digit, 2 and 3 of the second.
template <int NB>
INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(2);
  if constexpr (NB == 2) {
    _tile_zero(1);
    _tile_zero(3);
  }
}

template <int NB>
INLINE void store_sums(TileScratch& scratch) {
  _tile_stored(0, scratch.dots[0], 64);
  _tile_stored(2, scratch.dots[2], 64);
  if constexpr (NB == 2) {
    _tile_stored(1, scratch.dots[1], 64);
    _tile_stored(3, scratch.dots[3], 64);
  }
}

// Both digits of 16 rows times NB blocks of 8-bit weights, inputs first..first+num_inputs-1.
template <int NB>
INLINE void int8_dots(const int8_t* rows, const Prepared& x, const uint8_t* const (&weights)[NB],
                      int64_t num_inputs, TileScratch& scratch, Ahead (&ahead)[NB]) {
  zero_sums<NB>();
  for (int64_t k = 0; k < num_inputs; k += tile::kInputs) {
    for (int b = 0; b < NB; ++b) ahead[b].ask(16);
    const uint8_t* place[NB];
    for (int b = 0; b < NB; ++b) place[b] = weights[b] + 16 * k;
    if (k + tile::kInputs > num_inputs)  // the rows have zeros there, the weights another block
      for (int b = 0; b < NB; ++b) {
        memcpy(scratch.tail[b], place[b], static_cast<size_t>(16 * (num_inputs - k)));
        place[b] = scratch.tail[b];
      }
    _tile_loadd(4, rows + k, x.integer_stride);
    _tile_loadd(6, place[0], 64);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(5, rows + x.digit_stride + k, x.integer_stride);
    _tile_dpbsud(2, 5, 6);
    if constexpr (NB == 2) {
      _tile_loadd(7, place[1], 64);
      _tile_dpbsud(1, 4, 7);
      _tile_dpbsud(3, 5, 7);
    }
  }
  store_sums<NB>(scratch);
}

// The sum of one group: digits joined, offsets taken off, scaled, added to what there was.
INLINE F int8_sum(const Linear& w, const Prepared& x, int64_t row, int64_t block, int64_t group,
                  const int32_t* high_dots, const int32_t* low_dots, F before) {
  const int32_t* totals = x.sums + row * 2 * w.num_groups + group;
  const I high = iadd(_mm512_load_si512(high_dots), group_start<8>(w, block, group, totals[0]));
  const I low =
      iadd(_mm512_load_si512(low_dots), group_start<8>(w, block, group, totals[w.num_groups]));
  const F factor = mul(load_scale(w, block, group), set1(x.scales[row * w.num_groups + group]));
  return fma(join_digits(to_float(high), to_float(low)), factor, before);
}

template <int NB>
static void int8_rows(const LinearCall& call, int64_t row, int64_t count, int64_t block,
                      bool is_first, TileScratch& scratch) {
  const Linear& w = *call.weight;
  const Prepared& x = call.input;
  const int64_t block_bytes = w.num_groups * w.padded_group * 16;
  const int8_t* rows = x.integers + row * x.integer_stride;
  Ahead ahead[NB];  // the next panel, for the first rows: those after them find it in the cache
  for (int b = 0; b < NB; ++b) {
    const uint8_t* start = w.values + (block + NB + b) * block_bytes;
    ahead[b] = {start, start + (is_first ? block_bytes : 0)};
  }
  for (int64_t g = 0; g < w.num_groups; ++g) {
    const uint8_t* weights[NB];
    for (int b = 0; b < NB; ++b)
      weights[b] = w.values + (block + b) * block_bytes + g * w.padded_group * 16;
    int8_dots<NB>(rows + g * w.padded_group, x, weights, w.padded_group, scratch, ahead);
    const bool is_last = g + 1 == w.num_groups;
    for (int64_t m = 0; m < count; ++m) {
      F sum[1][NB];
      for (int b = 0; b < NB; ++b) {
        float* place = scratch.sums[b] + 16 * m;
        sum[0][b] = int8_sum(w, x, row + m, block + b, g, scratch.dots[b] + 16 * m,
                             scratch.dots[2 + b] + 16 * m, g == 0 ? zero() : load(place));
        if (!is_last) store(place, sum[0][b]);
      }
      if (is_last) finish(call, row + m, block, sum);
    }
  }
}

// Both parts of 16 rows times NB blocks of bfloat16 weights; the sums as in `int8_dots`. The unit
// sums 32 inputs, the even and the odd ones each by fused multiply-adds, then adds both to what there was.
// The error is at most 2^-18 (what two parts leave of a value) plus (width + 4) * 2^-24 of the sum of
// the magnitudes.
template <int NB>
INLINE void bf16_dots(const Linear& w, const Prepared& x, int64_t row, int64_t block,
                      TileScratch& scratch) {
  constexpr int64_t kTileInputs = 32;
  const int64_t block_bytes = (w.width + 1) / 2 * 64, row_bytes = 4 * x.part_stride;
  const uint16_t* rows = x.parts + row * 2 * x.part_stride;
  zero_sums<NB>();
  for (int64_t k = 0; k < w.width; k += kTileInputs) {
    const uint8_t* place[NB];
    for (int b = 0; b < NB; ++b) place[b] = w.values + (block + b) * block_bytes + 32 * k;
    if (k + kTileInputs > w.width)  // zeros of the rows would make NaN of what lies behind a block
      for (int b = 0; b < NB; ++b) {
        const int64_t rest = block_bytes - 32 * k;
        memcpy(scratch.tail[b], place[b], static_cast<size_t>(rest));
        memset(scratch.tail[b] + rest, 0, static_cast<size_t>(1024 - rest));
        place[b] = scratch.tail[b];
      }
    _tile_loadd(4, rows + k, row_bytes);
    _tile_loadd(6, place[0], 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, rows + x.part_stride + k, row_bytes);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (NB == 2) {
      _tile_loadd(7, place[1], 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  store_sums<NB>(scratch);
}

template <int NB>
static void bf16_rows(const LinearCall& call, int64_t row, int64_t count, int64_t block, bool,
                      TileScratch& scratch) {
  bf16_dots<NB>(*call.weight, call.input, row, block, scratch);
  const auto sum_of = [&](int tile, int64_t m) INLINE_LAMBDA {
    return _mm512_castsi512_ps(_mm512_load_si512(scratch.dots[tile] + 16 * m));
  };
  for (int64_t m = 0; m < count; ++m) {
    F sum[1][NB];
    for (int b = 0; b < NB; ++b) sum[0][b] = add(sum_of(b, m), sum_of(2 + b, m));
    finish(call, row + m, block, sum);
  }
}

using TileRows = void (*)(const LinearCall&, int64_t row, int64_t count, int64_t block,
                          bool is_first, TileScratch&);

// Weights that come as they lie: a tile's rows stay near, the weights pass by in order.
template <TileRows TWO_BLOCKS, TileRows ONE_BLOCK>
static void rows_and_panels(const LinearCall& call, int64_t first, int64_t last,
                            int64_t first_panel, int64_t last_panel, TileScratch& scratch) {
  for (int64_t row = first; row < last; row += kTileRows) {
    const int64_t count = last - row < kTileRows ? last - row : kTileRows;
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const int64_t block = panel * kPanelBlocks;
      if (block + 2 <= call.weight->num_blocks())
        TWO_BLOCKS(call, row, count, block, row == first, scratch);
      else
        ONE_BLOCK(call, row, count, block, row == first, scratch);
    }
  }
}

// Fewest rows that pay here (docs/lab-log.md, 2026-11-28 and 30); 0: never. A tile's inputs have one scale.
static int64_t least_rows(const Linear& w) {
  if (w.has_float_rows) return 0;
  if (w.kind == WeightKind::kBfloat16) return 1;  // other instructions would round differently
  if (w.kind == WeightKind::kInt8) return w.num_groups == 1 || w.group_size % 64 == 0 ? 4 : 0;
  return w.kind == WeightKind::kInt4 && w.group_size % 32 == 0 ? 16 : 0;
}

// Nothing but products, four sums that do not wait for each other: what the unit does at most.
constexpr int64_t kTileRounds = kRounds / 16;

static float multiply_tiles(const Operands& operands) {
  TileScratch& scratch = tile_scratch();
  tile::configure(tile::kInputs);
  _tile_loadd(4, operands.weights, 0);  // 64 bytes, in every row
  _tile_loadd(5, operands.weights, 0);
  _tile_loadd(6, operands.weights, 0);
  _tile_loadd(7, operands.weights, 0);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < kTileRounds; ++i) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, scratch.dots[0], 64);
  _tile_release();
  return static_cast<float>(scratch.dots[0][0]);
}

static void linear_amx(const LinearCall& call, int64_t first_row, int64_t last_row,
                       int64_t first_panel, int64_t last_panel) {
  const Linear& w = *call.weight;
  const int64_t least = least_rows(w), count = last_row - first_row;
  if (least == 0 || count < least)
    return linear(call, first_row, last_row, first_panel, last_panel);
  const int64_t rest = count % kTileRows < std::min(least, kTileRows / 2) ? count % kTileRows : 0;
  if (rest > 0) linear(call, last_row - rest, last_row, first_panel, last_panel);
  const int64_t last = last_row - rest;
  TileScratch& scratch = tile_scratch();
  const bool is_half = w.kind == WeightKind::kInt4 && w.padded_group % tile::kInputs != 0;
  tile::configure(is_half ? tile::kInputs / 2 : tile::kInputs);
  const auto run = w.kind == WeightKind::kInt8   ? rows_and_panels<int8_rows<2>, int8_rows<1>>
                   : is_half ? int4_panels<tile::kInputs / 2>
                   : w.kind == WeightKind::kInt4 ? int4_panels<tile::kInputs>
                                                 : rows_and_panels<bf16_rows<2>, bf16_rows<1>>;
  run(call, first_row, last, first_panel, last_panel, scratch);
  _tile_release();
}
