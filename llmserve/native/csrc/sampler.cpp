#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "sampler_rank.h"

namespace llmserve {
namespace {

constexpr int64_t kOne = int64_t{1} << 42;    // weight of the likeliest id
constexpr double kMostSteps = 43 * 512;       // here a weight rounds to 0
constexpr double kBitsPerNat = 0x1.71547652b82fep+0;
constexpr double kStepsPerNat = 512 * kBitsPerNat;
constexpr double kLeastTemperature = 1e-9;
constexpr double kMassError = 1e-10;          // of `masses`, of itself
constexpr double kWeightError = 0.6;          // of a weight, in units
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The weight that reaches a share of a total.
int64_t part(double share, int64_t total) {
  using Wide = unsigned __int128;
  const Wide product = static_cast<Wide>(static_cast<uint64_t>(share * 0x1p32)) *
                       static_cast<uint64_t>(total);
  return std::max<int64_t>(1, static_cast<int64_t>((product + 0xffffffffu) >> 32));
}

// Where a random number falls when weights of that total are laid end to end.
int64_t place_of(uint64_t random, int64_t total) {
  return static_cast<int64_t>(static_cast<unsigned __int128>(random) *
                                  static_cast<uint64_t>(total) >> 53);
}

}  // namespace

Sampler::Sampler(const SamplerLoops& loops, int64_t vocab_size)
    : loops_(loops), vocab_size_(vocab_size), num_chunks_((vocab_size + kChunk - 1) / kChunk) {
  const auto room = static_cast<size_t>(num_chunks_ * kChunk + kSlack);
  maxima_.reset(new float[static_cast<size_t>(num_chunks_ * kColumns)]);
  masses_.reset(new double[static_cast<size_t>(num_chunks_)]);
  edited_.reset(new float[room]);
  ids_.reset(new int32_t[room]);
  values_.reset(new float[room]);
  steps_.reset(new double[room]);
  weights_.reset(new int64_t[room]);
  ranked_.reset(new Ranked[room]);
}

int64_t Sampler::draw(float* logits, const SampleRow& row) {
  if (!scan(logits)) return -1;
  if (row.has_edits) {
    if (row.num_logprobs >= 0) {
      std::memcpy(edited_.get(), logits, static_cast<size_t>(vocab_size_) * sizeof(float));
      logits = edited_.get();
    }
    edit_logits(logits, vocab_size_, row, values_.get());
    if (!scan(logits)) return -1;
  }
  return row.temperature == 0.0 ? likeliest(logits) : draw_by_chance(logits, row);
}

// Whether the row is usable.
bool Sampler::scan(const float* logits) {
  largest_ = loops_.column_maxima(logits, vocab_size_, maxima_.get());
  return std::isfinite(largest_);
}

int64_t Sampler::likeliest(const float* logits) const {
  const int64_t column = loops_.first_at_least(maxima_.get(), num_chunks_ * kColumns, largest_);
  const int64_t start = column / kColumns * kChunk;
  return start + loops_.first_at_least(logits + start, vocab_size_ - start, largest_);
}

int64_t Sampler::draw_by_chance(const float* logits, const SampleRow& row) {
  scale_ = kStepsPerNat / std::max(row.temperature, kLeastTemperature);
  const uint64_t random = random_number(row);
  const bool has_top_k = 0 < row.top_k && row.top_k < vocab_size_;
  if (!has_top_k && row.top_p >= 1.0 && row.min_p <= 0.0 && row.typical_p >= 1.0)
    return draw_from_all(logits, random);
  choose(logits, row);
  return draw_from_candidates(random);
}

// Draws from the whole vocabulary.

int64_t Sampler::draw_from_all(const float* logits, uint64_t random) {
  const int64_t id = draw_surely(logits, random);
  return id >= 0 ? id : draw_exactly(logits, random);
}

// By bounds on the weights; -1 if they leave a doubt.
int64_t Sampler::draw_surely(const float* logits, uint64_t random) {
  const double total = bound_weights(logits);
  const double place = static_cast<double>(random) * 0x1p-53 * total;
  // Both the place and the weight before an id may be off.
  const double margin = 2 * mass_error(total);
  double before = 0.0;
  int64_t chunk = 0;
  while (chunk < num_chunks_ - 1 && before + masses_[chunk] <= place) before += masses_[chunk++];
  if (chunk > 0 && before + margin > place) return -1;
  weigh_chunk(logits, chunk);
  const int64_t start = chunk * kChunk, count = std::min(kChunk, vocab_size_ - start);
  int64_t sum = 0, i = 0;
  while (i < count && before + static_cast<double>(sum + weights_[i]) <= place)
    sum += weights_[i++];
  if (i == count) return -1;
  const double low = before + static_cast<double>(sum);
  const double high = low + static_cast<double>(weights_[i]);
  const bool is_first = chunk == 0 && sum == 0;  // nothing lies before it
  return (is_first || low + margin <= place) && high - margin > place ? start + i : -1;
}

int64_t Sampler::draw_exactly(const float* logits, uint64_t random) {
  const int64_t place = place_of(random, weigh_all(logits));
  int64_t chunk = 0, sum = 0;
  while (sum + static_cast<int64_t>(masses_[chunk]) <= place)
    sum += static_cast<int64_t>(masses_[chunk++]);
  weigh_chunk(logits, chunk);
  int64_t i = 0;
  while (sum + weights_[i] <= place) sum += weights_[i++];
  return chunk * kChunk + i;
}

// The chunks' weights, bounded, and their sum.
double Sampler::bound_weights(const float* logits) {
  loops_.masses(logits, vocab_size_, largest_, scale_ / 512, masses_.get());
  double total = 0.0;
  for (int64_t chunk = 0; chunk < num_chunks_; ++chunk) {
    masses_[chunk] *= static_cast<double>(kOne);
    total += masses_[chunk];
  }
  return total;
}

// By how much a sum of bounded weights may be off, at most.
double Sampler::mass_error(double mass) const {
  return kWeightError * static_cast<double>(vocab_size_) + kMassError * mass + 1.0;
}

// The exact weights of a chunk go where the first candidates' are. Returns their sum.
int64_t Sampler::weigh_chunk(const float* logits, int64_t chunk) {
  const int64_t start = chunk * kChunk, count = std::min(kChunk, vocab_size_ - start);
  loops_.weigh(logits + start, count, largest_, scale_, steps_.get(), weights_.get());
  int64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += weights_[i];
  return sum;
}

// The chunks' exact weights, which a double holds, and their sum.
int64_t Sampler::weigh_all(const float* logits) {
  int64_t total = 0;
  for (int64_t chunk = 0; chunk < num_chunks_; ++chunk) {
    const int64_t sum = weigh_chunk(logits, chunk);
    masses_[chunk] = static_cast<double>(sum);
    total += sum;
  }
  return total;
}

// Cuts.

void Sampler::choose(const float* logits, const SampleRow& row) {
  if (0 < row.top_k && row.top_k < vocab_size_) {
    keep_largest(logits, row.top_k);
    weigh_candidates();
    if (row.top_p < 1.0) {
      const int64_t least = part(row.top_p, candidate_weight());
      keep_mass({least, least});
    }
  } else if (row.top_p < 1.0) {
    keep_mass_of_all(logits, row.top_p);
  } else {
    collect(logits, bound_of_weight(row.min_p > 0.0 ? part(row.min_p, kOne) : 1));
    weigh_candidates();
  }
  if (row.min_p > 0.0) keep_ratio(row.min_p);
  if (row.typical_p < 1.0) keep_typical(row.typical_p);
}

void Sampler::keep_largest(const float* logits, int64_t count) {
  collect(logits, bound_of_largest(count));
  if (num_candidates_ == count) return;
  for (int64_t i = 0; i < num_candidates_; ++i) {
    weights_[i] = 1;
    steps_[i] = 0.0;  // not known yet; it moves along
  }
  const auto key = [&](int64_t i) { return descending_key(values_[i]); };
  keep_within(key, find_border(key, 0, UINT32_MAX, count), count);
}

void Sampler::keep_mass_of_all(const float* logits, double top_p) {
  const double mass = bound_weights(logits), error = mass_error(mass);
  Range total{static_cast<int64_t>(mass - error), static_cast<int64_t>(mass + error)};
  for (;;) {
    // So light an id is never needed: all of them together weigh no more than what may be missing.
    const int64_t light = (total.low - part(top_p, total.low)) / vocab_size_;
    collect(logits, bound_of_weight(light + 1));
    weigh_candidates();
    if (keep_mass({part(top_p, total.low), part(top_p, total.high)})) return;
    total.low = total.high = weigh_all(logits);
  }
}

// Keeps the fewest, heaviest candidates of at least that weight. False if it depends on where in
// the range the least is; then all stay.
bool Sampler::keep_mass(Range least) {
  const auto key = [&](int64_t i) { return descending_key(weights_[i]); };
  const uint64_t lowest = descending_key(kOne), highest = descending_key(int64_t{0});
  const Border border = find_border(key, lowest, highest, least.low);
  if (border.within < least.high) return false;
  keep_within(key, border, least.low);
  return true;
}

void Sampler::keep_ratio(double min_p) {
  const int64_t least = part(min_p, kOne);
  filter([&](int64_t i) { return weights_[i] >= least; });
}

// Meister et al. 2022, arXiv:2202.00666, section 4.
void Sampler::keep_typical(double typical_p) {
  filter([&](int64_t i) { return weights_[i] > 0; });
  const int64_t total = candidate_weight();
  int64_t surprise = 0;
  for (int64_t i = 0; i < num_candidates_; ++i)
    surprise += rounded(static_cast<double>(weights_[i]) * (steps_[i] * (1.0 / 512)));
  const double mean = static_cast<double>(surprise) / static_cast<double>(total);
  const auto key = [&](int64_t i) {
    return ascending_key(std::fabs(steps_[i] * (1.0 / 512) - mean));
  };
  const int64_t least = part(typical_p, total);
  keep_within(key, find_border(key, 0, ascending_key(kMostSteps), least), least);
}

int64_t Sampler::draw_from_candidates(uint64_t random) const {
  const int64_t place = place_of(random, candidate_weight());
  int64_t i = 0, sum = weights_[0];
  while (sum <= place) sum += weights_[++i];
  return ids_[i];
}

// Candidates.

void Sampler::collect(const float* logits, float least) {
  num_candidates_ =
      loops_.collect(logits, vocab_size_, maxima_.get(), least, ids_.get(), values_.get());
}

void Sampler::weigh_candidates() {
  loops_.weigh(values_.get(), num_candidates_, largest_, scale_, steps_.get(), weights_.get());
}

int64_t Sampler::candidate_weight() const {
  int64_t sum = 0;
  for (int64_t i = 0; i < num_candidates_; ++i) sum += weights_[i];
  return sum;
}

// A logit that at least `count` ids reach, and not many more where count is small: if so many
// columns have one that does, so many ids do.
float Sampler::bound_of_largest(int64_t count) const {
  const int64_t num_columns = num_chunks_ * kColumns;
  if (count >= num_columns) return -kInfinity;
  int64_t low = ordered(-kInfinity), high = int64_t{ordered(largest_)} + 1;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    const float bound = float_at(static_cast<int32_t>(middle));
    const int64_t reached = loops_.count_at_least(maxima_.get(), num_columns, bound);
    (reached >= count ? low : high) = middle;
    if (reached >= count && reached <= count + count / 8) break;
  }
  return float_at(static_cast<int32_t>(low));
}

// A logit that every id reaches whose weight is at least `weight`, which is 1 or more. A step more
// than it takes makes up for every rounding here.
float Sampler::bound_of_weight(int64_t weight) const {
  const double lightest = static_cast<double>(weight) - kWeightError;
  const double steps = std::min(512 * (42 - std::log2(lightest)), kMostSteps) + 1;
  const double bound = static_cast<double>(largest_) - steps / scale_;
  const float nearest = static_cast<float>(bound);
  return nearest > bound ? std::nextafter(nearest, -kInfinity) : nearest;
}

// Finds how far to go, from the lowest key up, to come to a weight of `least`; all the candidates
// weigh that much. O(n): their weights are summed in buckets of keys, then those of the right
// bucket, and so on. `key(i)` is candidate i's, from `lowest` to `highest`.
template <class Key>
Sampler::Border Sampler::find_border(Key key, uint64_t lowest, uint64_t highest, int64_t least) {
  Span span{lowest, highest, num_candidates_, 0};
  narrow([&](int64_t i) { return Ranked{key(i), weights_[i]}; }, least, span);
  while (span.lowest < span.highest)
    narrow([&](int64_t i) { return ranked_[i]; }, least, span);
  int64_t within = span.before;
  for (int64_t i = 0; within < least; ++i) within += ranked_[i].weight;
  return {span.lowest, span.before, within};
}

// One round: leaves the right bucket in `ranked_`.
template <class Source>
void Sampler::narrow(Source source, int64_t least, Span& span) {
  constexpr int kMostBits = 11;
  const int num_bits = span.count < 4096 ? 8 : kMostBits;
  const uint64_t lowest = span.lowest, width = span.highest - lowest;
  const int shift = std::max(0, 64 - __builtin_clzll(width | 1) - num_bits);
  // Two sets of sums: neighbours often share a bucket, and need not wait for each other.
  int64_t sums[2][1 << kMostBits];
  for (auto& set : sums) std::fill(set, set + (1 << num_bits), 0);
  for (int64_t i = 0; i < span.count; ++i) {
    const Ranked ranked = source(i);
    sums[i & 1][(ranked.key - lowest) >> shift] += ranked.weight;
  }
  uint64_t bucket = 0;
  for (;; ++bucket) {
    const int64_t sum = sums[0][bucket] + sums[1][bucket];
    if (span.before + sum >= least) break;
    span.before += sum;
  }
  int64_t count = 0;
  for (int64_t i = 0; i < span.count; ++i) {
    const Ranked ranked = source(i);
    ranked_[count] = ranked;
    count += (ranked.key - lowest) >> shift == bucket;
  }
  span = {~uint64_t{0}, 0, count, span.before};
  for (int64_t i = 0; i < count; ++i) {
    span.lowest = std::min(span.lowest, ranked_[i].key);
    span.highest = std::max(span.highest, ranked_[i].key);
  }
}

// Keeps the candidates before the border, and of those on it the first that are needed.
template <class Key>
void Sampler::keep_within(Key key, const Border& border, int64_t least) {
  int64_t missing = least - border.before;
  filter([&](int64_t i) {
    const bool is_before = key(i) < border.key, is_on = key(i) == border.key;
    const bool is_kept = is_before | (is_on & (missing > 0));
    missing -= is_on ? weights_[i] : 0;
    return is_kept;
  });
}

template <class Keep>
void Sampler::filter(Keep keep) {
  int64_t count = 0;
  for (int64_t i = 0; i < num_candidates_; ++i) {
    const bool is_kept = keep(i);
    ids_[count] = ids_[i];
    values_[count] = values_[i];
    steps_[count] = steps_[i];
    weights_[count] = weights_[i];
    count += is_kept;
  }
  num_candidates_ = count;
}

// Log-probabilities.

void Sampler::logprobs(const float* logits, int64_t token_id, int64_t num_top,
                       const RowLogprobs& out) {
  *out.num_top = 0;
  *out.logprob = std::numeric_limits<double>::quiet_NaN();
  if (!scan(logits)) return;
  const double largest = largest_;
  loops_.exact_masses(logits, vocab_size_, largest, kBitsPerNat, masses_.get());
  const double total = std::accumulate(masses_.get(), masses_.get() + num_chunks_, 0.0);
  const double log_total = std::log(total);
  *out.logprob = logits[token_id] - largest - log_total;
  if (num_top == 0) return;
  keep_largest(logits, std::min(num_top, vocab_size_));
  int64_t count = 0;
  for (int64_t i = 0; i < num_candidates_; ++i)
    if (values_[i] > -kInfinity) ranked_[count++] = {descending_key(values_[i]), ids_[i]};
  std::sort(ranked_.get(), ranked_.get() + count, [](const Ranked& a, const Ranked& b) {
    return a.key != b.key ? a.key < b.key : a.weight < b.weight;
  });
  for (int64_t i = 0; i < count; ++i) {
    out.top_ids[i] = static_cast<int32_t>(ranked_[i].weight);
    out.top_logprobs[i] = logits[ranked_[i].weight] - largest - log_total;
  }
  *out.num_top = static_cast<int32_t>(count);
}

}  // namespace llmserve
