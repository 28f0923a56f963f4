// Loops that do nothing but read, or nothing but multiply and add. Included inside a path's
// namespace after its simd_*.h. Sums are in chains that do not wait for each other, as many as stay
// in registers; weights come from a few lines in the first cache, so that no product is the same as
// the one before and none can be moved out of the loop.

constexpr int kDotChains = PATH_VECTOR_BYTES == 64 ? 12 : 4;
constexpr int kFloatChains = PATH_VECTOR_BYTES == 64 ? 12 : 6;

static float read_bytes(const uint8_t* memory, int64_t num_bytes) {
  constexpr int kChains = 4;
  F sums[kChains];
  for (int c = 0; c < kChains; ++c) sums[c] = zero();
  for (int64_t at = 0; at + 64 * kChains <= num_bytes; at += 64 * kChains)
    for (int c = 0; c < kChains; ++c) {
      __builtin_prefetch(memory + at + 64 * c + 1024);
      sums[c] = max(sums[c], load(reinterpret_cast<const float*>(memory + at + 64 * c)));
    }
  for (int c = 1; c < kChains; ++c) sums[0] = max(sums[0], sums[c]);
  return reduce_max(sums[0]);
}

template <int BITS>
static float multiply_integers(const Operands& operands) {
  I sums[kDotChains];
  for (int c = 0; c < kDotChains; ++c) sums[c] = iset1(c);
  for (int64_t i = 0; i < kRounds; ++i) {
    const W weights = load_weights(operands.weights + i % kLines * 64);
    for (int c = 0; c < kDotChains; ++c)
      sums[c] = BITS == 4 ? dot4_small(sums[c], weights, operands.rows[c])
                          : dot4(sums[c], weights, operands.rows[c]);
  }
  for (int c = 1; c < kDotChains; ++c) sums[0] = iadd(sums[0], sums[c]);
  return static_cast<float>(reduce_add(sums[0]));
}

static float multiply_floats(const Operands& operands) {
  F sums[kFloatChains];
  for (int c = 0; c < kFloatChains; ++c) sums[c] = set1(static_cast<float>(c));
  const F x = set1(operands.factor);
  for (int64_t i = 0; i < kRounds; ++i) {
    const F weights = load(operands.floats + i % kLines * 16);
    for (int c = 0; c < kFloatChains; ++c) sums[c] = fma(weights, x, sums[c]);
  }
  for (int c = 1; c < kFloatChains; ++c) sums[0] = add(sums[0], sums[c]);
  return reduce_add(sums[0]);
}

static const MachineLoops kMachineLoops = {
    read_bytes, multiply_integers<4>, multiply_integers<8>, multiply_floats,
    64.0 * kRounds * kDotChains, 16.0 * kRounds * kFloatChains};
