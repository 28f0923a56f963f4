// Attention over the paged cache: softmax(q k / sqrt(D)) v, online (arXiv 2205.14135, algorithm 1).
//
// Lanes are tokens where keys are read ([D, 16 tokens]) and dimensions where values are ([token, D]):
// nothing is summed across lanes but a tile's weights, once. For a query the order is written:
// tiles of 64 tokens counted from position 0, a rescaling after each; partitions of 256 tokens made
// apart and joined in their order. It follows from the query's position and window alone, so decode,
// a chunk of any size, and any share of the work between threads give the same bits.
//
// Error against exact attention of the stored keys and values: scores to (D + 4) * 2^-24 of the sum
// of |q k|, weights to 3 * 2^-23, their sums to (tokens + 4) * 2^-24.

template <Number KIND>
INLINE F load_item(const uint8_t* data, int64_t place) {
  if constexpr (KIND == Number::kFloat32) return load(reinterpret_cast<const float*>(data) + place);
  if constexpr (KIND == Number::kBfloat16)
    return load_bf16(reinterpret_cast<const uint16_t*>(data) + place);
  return load_int8(reinterpret_cast<const int8_t*>(data) + place);
}

// One tile of a sequence's keys and values of one head.
struct Tile {
  const uint8_t* keys[4];    // of 16 tokens each, [D, 16]
  const uint8_t* values[4];  // of 16 tokens each, [16, D]
  const float* key_scales[4];
  const float* value_scales[4];
  int64_t num_pieces;
  int64_t start;             // position of the first token
};

INLINE Tile find_tile(const LayerCache& cache, const int64_t* block_table, int64_t kv_head,
                      int64_t start, int64_t end) {
  Tile tile;
  tile.start = start;
  tile.num_pieces = 0;
  const int64_t bytes = cache.item_bytes(), width = cache.head_dim;
  for (int64_t at = start; at < end && at < start + kTileTokens; at += 16) {
    const uint8_t* head = cache.head(block_table[at / cache.block_size], kv_head);
    const int64_t place = at % cache.block_size;
    const int64_t p = tile.num_pieces++;
    tile.keys[p] = head + place * width * bytes;
    tile.values[p] = head + (cache.block_size + place) * width * bytes;
    const float* scales = reinterpret_cast<const float*>(head + 2 * cache.block_size * width);
    tile.key_scales[p] = scales + place;
    tile.value_scales[p] = scales + cache.block_size + place;
  }
  return tile;
}

// A tile as float32: keys [4][D][16] and values [64][D]; what is behind the last piece stays.
template <Number KIND>
static void widen_tile(const Tile& tile, int64_t width, int64_t num_tokens, float* keys,
                       float* values) {
  for (int64_t p = 0; p < tile.num_pieces; ++p) {
    F scales = set1(1.0f);
    if constexpr (KIND == Number::kInt8) scales = load(tile.key_scales[p]);
    for (int64_t d = 0; d < width; ++d) {
      F k = load_item<KIND>(tile.keys[p], 16 * d);
      if constexpr (KIND == Number::kInt8) k = mul(k, scales);
      store(keys + (p * width + d) * 16, k);
    }
    const int64_t count = num_tokens - 16 * p < 16 ? num_tokens - 16 * p : 16;
    for (int64_t t = 0; t < count; ++t) {
      float* out = values + (16 * p + t) * width;
      for (int64_t d = 0; d < width; d += 16) {
        F v = load_item<KIND>(tile.values[p], t * width + d);
        if constexpr (KIND == Number::kInt8) v = mul(v, set1(tile.value_scales[p][t]));
        store(out + d, v);  // beyond a row: into the next one, which comes later, or the slack
      }
    }
  }
}

// One vector's worth of a piece that is read soon: a context of many sequences comes from memory, in
// pieces too short for the processor to see where they go on.
template <Number KIND>
INLINE void ask_for(const uint8_t* piece, int64_t vector) {
  constexpr int64_t kLine = 64, kVectorBytes = 16 * bytes_of(KIND);
  if (vector * kVectorBytes % kLine == 0) __builtin_prefetch(piece + vector * kVectorBytes);
}

// What a row has seen, its state: the largest score (of 16 floats the first), the weights' sum in
// 16 lanes, the weighted values, [32 + D padded to a multiple of 16].

// Scores of R rows with one tile, [R][4] vectors.
// ASKS: the tile's values are asked for meanwhile.
template <Number KIND, bool ASKS, int R>
INLINE void score_tile(const float* const (&q)[R], const Tile& tile, int64_t width, F (&s)[R][4]) {
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < 4; ++p) s[r][p] = zero();
  const uint8_t* k[4];
  // Pieces that are not there read the first one's keys again and are cut off by the mask.
  for (int p = 0; p < 4; ++p) k[p] = tile.keys[p < tile.num_pieces ? p : 0];
  for (int64_t d = 0; d < width; ++d) {
    F keys[4];
    for (int p = 0; p < 4; ++p) keys[p] = load_item<KIND>(k[p], 16 * d);
    if constexpr (ASKS)
      for (int64_t p = 0; p < tile.num_pieces; ++p) ask_for<KIND>(tile.values[p], d);
    for (int r = 0; r < R; ++r) {
      const F x = set1(q[r][d]);
      for (int p = 0; p < 4; ++p) s[r][p] = fma(keys[p], x, s[r][p]);
    }
  }
}

// Scores to weights in `weights` [64]; the row's largest score and sum move on. Returns the factor
// for what the row gathered before. first..last: the tokens of the tile that the row sees.
INLINE float weigh(const AttendCall& call, F (&s)[4], int64_t first, int64_t last, float* state,
                   float* weights) {
  const F lowest = set1(-__builtin_inff());
  F largest = lowest;
  for (int p = 0; p < 4; ++p) {
    s[p] = mul(s[p], set1(call.scale));
    if (call.cap > 0.0f) s[p] = mul(set1(call.cap), tanh(mul(s[p], set1(1.0f / call.cap))));
    const int from = static_cast<int>(first - 16 * p), to = static_cast<int>(last - 16 * p);
    s[p] = choose(from < 0 ? 0 : from, to < 0 ? 0 : to, s[p], lowest);
    largest = max(s[p], largest);
  }
  const float before = state[0];
  const float found = reduce_max(largest);
  const float now = before > found ? before : found;
  F parts[4];
  for (int p = 0; p < 4; ++p) {
    const int from = static_cast<int>(first - 16 * p), to = static_cast<int>(last - 16 * p);
    parts[p] = choose(from < 0 ? 0 : from, to < 0 ? 0 : to, exp(sub(s[p], set1(now))), zero());
    store(weights + 16 * p, parts[p]);
  }
  float factor = 0.0f;
  if (before > -__builtin_inff()) {
    float lanes[16];
    store(lanes, exp(set1(before - now)));
    factor = before == now ? 1.0f : lanes[0];
  }
  state[0] = now;
  store(state + 16, add(mul(load(state + 16), set1(factor)), join(parts[0], parts[1], parts[2],
                                                                 parts[3])));
  return factor;
}

struct RowRange { int64_t first, last; };  // positions that a row sees

// Values of R rows: gathered = gathered * factor + weights x values, four vectors of dimensions at
// a time, tokens one after another. Those that not every row sees are skipped by the others: a
// weight of 0 would still carry over a NaN.
template <Number KIND, bool ASKS, int R>
INLINE void gather_values(const Tile& tile, const Tile& next, int64_t width,
                          const RowRange (&seen)[R], const float* weights,
                          const float (&factor)[R], float* const (&out)[R]) {
  RowRange any = seen[0], all = seen[0];
  for (int r = 1; r < R; ++r) {
    any = {seen[r].first < any.first ? seen[r].first : any.first,
           seen[r].last > any.last ? seen[r].last : any.last};
    all = {seen[r].first > all.first ? seen[r].first : all.first,
           seen[r].last < all.last ? seen[r].last : all.last};
  }
  if (all.first >= all.last) all = {any.last, any.last};
  struct Yes { constexpr operator bool() const { return true; } };
  struct No { constexpr operator bool() const { return false; } };
  for (int64_t d = 0; d < width; d += 64) {
    const int64_t count = (width - d + 15) / 16 < 4 ? (width - d + 15) / 16 : 4;
    F sum[R][4];
    for (int r = 0; r < R; ++r)
      for (int64_t j = 0; j < count; ++j)
        sum[r][j] = mul(load(out[r] + d + 16 * j), set1(factor[r]));
    const auto add_tokens = [&](auto whole, auto is_edge, int64_t first, int64_t last)
                                INLINE_LAMBDA {
      for (int64_t t = first; t < last; ++t) {
        const uint8_t* values = tile.values[t / 16];
        F v[4];
        const int64_t n = whole ? 4 : count;
        for (int64_t j = 0; j < n; ++j) v[j] = load_item<KIND>(values, t % 16 * width + d + 16 * j);
        if (ASKS && t / 16 < next.num_pieces)
          for (int64_t j = 0; j < n; ++j)
            ask_for<KIND>(next.keys[t / 16], (t % 16 * width + d) / 16 + j);
        for (int r = 0; r < R; ++r) {
          if (is_edge && (t < seen[r].first || t >= seen[r].last)) continue;
          const F weight = set1(weights[r * kTileTokens + t]);
          for (int64_t j = 0; j < n; ++j) sum[r][j] = fma(v[j], weight, sum[r][j]);
        }
      }
    };
    const auto add_all = [&](auto whole) INLINE_LAMBDA {
      add_tokens(whole, Yes{}, any.first, all.first);
      add_tokens(whole, No{}, all.first, all.last);
      add_tokens(whole, Yes{}, all.last, any.last);
    };
    if (count == 4) add_all(Yes{});
    else add_all(No{});
    for (int r = 0; r < R; ++r)
      for (int64_t j = 0; j < count; ++j) store(out[r] + d + 16 * j, sum[r][j]);
  }
}

template <Number KIND, bool ASKS, int R>
static void attend_rows(const AttendCall& call, const Tile& tile, const Tile& next,
                        const float* const* queries, const RowRange* ranges,
                        float* const* states) {
  const float* q[R];
  float* out[R];
  float factor[R];
  float weights[R * kTileTokens];
  F scores[R][4];
  for (int r = 0; r < R; ++r) q[r] = queries[r];
  score_tile<KIND, ASKS, R>(q, tile, call.cache.head_dim, scores);
  RowRange seen[R];
  for (int r = 0; r < R; ++r) {
    int64_t first = ranges[r].first - tile.start, last = ranges[r].last - tile.start;
    first = first < 0 ? 0 : first;
    last = last > kTileTokens ? kTileTokens : last;
    out[r] = states[r] + 32;
    seen[r] = {first, last};
    if (first >= last) {  // the row sees nothing of this tile
      seen[r] = {0, 0};
      factor[r] = 1.0f;
      continue;
    }
    factor[r] = weigh(call, scores[r], first, last, states[r], weights + r * kTileTokens);
  }
  gather_values<KIND, ASKS, R>(tile, next, call.cache.head_dim, seen, weights, factor, out);
}

// ASKS: the next tile's keys are asked for while this one's values are gathered.
template <Number KIND, bool ASKS>
static void attend_tile(const AttendCall& call, const Tile& tile, const Tile& next,
                        int64_t num_rows, const float* const* queries, const RowRange* ranges,
                        float* const* states) {
  int64_t r = 0;
  for (; r + 6 <= num_rows; r += 6)
    attend_rows<KIND, ASKS, 6>(call, tile, next, queries + r, ranges + r, states + r);
  switch (num_rows - r) {
    case 5: attend_rows<KIND, ASKS, 5>(call, tile, next, queries + r, ranges + r, states + r); break;
    case 4: attend_rows<KIND, ASKS, 4>(call, tile, next, queries + r, ranges + r, states + r); break;
    case 3: attend_rows<KIND, ASKS, 3>(call, tile, next, queries + r, ranges + r, states + r); break;
    case 2: attend_rows<KIND, ASKS, 2>(call, tile, next, queries + r, ranges + r, states + r); break;
    case 1: attend_rows<KIND, ASKS, 1>(call, tile, next, queries + r, ranges + r, states + r); break;
    default: break;
  }
}

// Joins a later partition's state to the row's: both are scaled to the larger of the two maxima.
static void join_states(float* whole, const float* part, int64_t padded) {
  const float now = whole[0] > part[0] ? whole[0] : part[0];
  float lanes[16];
  store(lanes, exp(choose(0, 1, set1(whole[0] - now), set1(part[0] - now))));
  const F a = set1(whole[0] == now ? 1.0f : lanes[0]);
  const F b = set1(part[0] == now ? 1.0f : lanes[1]);
  whole[0] = now;
  for (int64_t i = 16; i < 32 + padded; i += 16)
    store(whole + i, fma(load(part + i), b, mul(load(whole + i), a)));
}

static void write_row(const AttendCall& call, const float* state, float* out) {
  const int64_t width = call.cache.head_dim;
  const F factor = set1(1.0f / reduce_add(load(state + 16)));
  for (int64_t d = 0; d < width; d += 16) {
    const F values = mul(load(state + 32 + d), factor);
    if (width - d >= 16) {
      store(out + d, values);
      continue;
    }
    float lanes[16];
    store(lanes, values);
    memcpy(out + d, lanes, static_cast<size_t>(width - d) * 4);
  }
}

INLINE void reset_state(float* state, int64_t padded) {
  for (int64_t i = 0; i < 32 + padded; i += 16) store(state + i, zero());
  state[0] = -__builtin_inff();
}

// Scratch: widened keys, widened values, partition states, whole states.
template <Number KIND>
static void attend_kind(const AttendCall& call, const AttendItem& item, float* scratch) {
  const int64_t width = call.cache.head_dim, padded = (width + 15) / 16 * 16;
  const int64_t heads = item.num_heads, num_rows = item.num_rows();
  const int64_t stride = 32 + padded;
  float* wide_keys = scratch;
  float* wide_values = wide_keys + kTileTokens * padded;
  float* parts = wide_values + kTileTokens * padded + 64;
  float* wholes = parts + kMostRows * stride;
  const float* queries[kMostRows];
  RowRange ranges[kMostRows];
  float* states[kMostRows];
  int64_t begin = INT64_MAX, end = 0;
  for (int64_t r = 0; r < num_rows; ++r) {
    const int64_t query = item.first_query + r / heads;
    const int64_t head = item.first_head + r % heads;
    queries[r] = call.queries + (item.first_row + query) * call.stride + head * width;
    const int64_t last = item.first_position + query + 1;
    const int64_t first = call.window > 0 && last > call.window ? last - call.window : 0;
    ranges[r] = {first, last};
    states[r] = parts + r * stride;
    begin = first < begin ? first : begin;
    end = last > end ? last : end;
  }
  const bool is_alone = item.partition >= 0;
  const int64_t first_part = is_alone ? item.partition : begin / kPartitionTokens;
  const int64_t last_part = is_alone ? item.partition + 1
                                     : (end + kPartitionTokens - 1) / kPartitionTokens;
  for (int64_t r = 0; r < num_rows; ++r) reset_state(wholes + r * stride, padded);
  for (int64_t part = first_part; part < last_part; ++part) {
    for (int64_t r = 0; r < num_rows; ++r) reset_state(states[r], padded);
    int64_t start = part * kPartitionTokens;
    const int64_t stop = start + kPartitionTokens < end ? start + kPartitionTokens : end;
    if (start < begin) start = begin / kTileTokens * kTileTokens;
    for (; start < stop; start += kTileTokens) {
      Tile tile = find_tile(call.cache, item.block_table, item.kv_head, start, stop);
      bool is_wide = num_rows > 8;
      if constexpr (KIND == Number::kInt8) is_wide = true;  // its scales are applied there
      if (is_wide) {
        const int64_t count = stop - start < kTileTokens ? stop - start : kTileTokens;
        widen_tile<KIND>(tile, width, count, wide_keys, wide_values);
        for (int64_t p = 0; p < tile.num_pieces; ++p) {
          tile.keys[p] = reinterpret_cast<const uint8_t*>(wide_keys + p * width * 16);
          tile.values[p] = reinterpret_cast<const uint8_t*>(wide_values + p * 16 * width);
        }
        attend_tile<Number::kFloat32, false>(call, tile, tile, num_rows, queries, ranges, states);
      } else if constexpr (KIND != Number::kInt8) {
        const Tile next =
            find_tile(call.cache, item.block_table, item.kv_head, start + kTileTokens, stop);
        attend_tile<KIND, true>(call, tile, next, num_rows, queries, ranges, states);
      }
    }
    if (is_alone) continue;
    for (int64_t r = 0; r < num_rows; ++r) {
      float* whole = wholes + r * stride;
      if (states[r][0] == -__builtin_inff()) continue;  // nothing of this partition was seen
      if (whole[0] == -__builtin_inff()) memcpy(whole, states[r], static_cast<size_t>(stride) * 4);
      else join_states(whole, states[r], padded);
    }
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    if (is_alone) {
      memcpy(item.partial + r * stride, states[r], static_cast<size_t>(stride) * 4);
      continue;
    }
    const int64_t query = item.first_query + r / heads;
    const int64_t head = item.first_head + r % heads;
    write_row(call, wholes + r * stride,
              call.out + (item.first_row + query) * call.out_stride + head * width);
  }
}

static void attend(const AttendCall& call, const AttendItem& item, float* scratch) {
  switch (call.cache.kind) {
    case Number::kFloat32: attend_kind<Number::kFloat32>(call, item, scratch); break;
    case Number::kBfloat16: attend_kind<Number::kBfloat16>(call, item, scratch); break;
    default: attend_kind<Number::kInt8>(call, item, scratch);
  }
}

// What partitions of one item left behind, [partitions, rows, 32 + D], joined in their order.
static void join_partitions(const AttendCall& call, const AttendItem& item, int64_t num_partitions,
                            const float* partials, float* scratch) {
  const int64_t width = call.cache.head_dim, padded = (width + 15) / 16 * 16;
  const int64_t heads = item.num_heads, num_rows = item.num_rows(), stride = 32 + padded;
  for (int64_t r = 0; r < num_rows; ++r) {
    float* whole = scratch;
    reset_state(whole, padded);
    for (int64_t p = 0; p < num_partitions; ++p) {
      const float* part = partials + (p * num_rows + r) * stride;
      if (part[0] == -__builtin_inff()) continue;
      if (whole[0] == -__builtin_inff()) memcpy(whole, part, static_cast<size_t>(stride) * 4);
      else join_states(whole, part, padded);
    }
    const int64_t query = item.first_query + r / heads;
    write_row(call, whole, call.out + (item.first_row + query) * call.out_stride +
                               (item.first_head + r % heads) * width);
  }
}
