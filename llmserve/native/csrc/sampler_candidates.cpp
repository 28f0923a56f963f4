#include "sampler_candidates.h"

#include <algorithm>
#include <cmath>

#include "sampler_numbers.h"

namespace llmserve {

Candidates::Candidates(const SamplerLoops& loops, int64_t vocab_size)
    : loops_(loops), vocab_size_(vocab_size) {
  const auto room = static_cast<size_t>(vocab_size + kSlack);
  ids_.reset(new int32_t[room]);
  logits_.reset(new float[room]);
  steps_.reset(new double[room]);
  weights_.reset(new int64_t[room]);
  ranked_.reset(new Ranked[room]);
}

void Candidates::collect(const float* logits, const float* maxima, float least) {
  size_ = loops_.collect(logits, vocab_size_, maxima, least, ids_.get(), logits_.get());
}

void Candidates::weigh(float largest, double scale) {
  loops_.weigh(logits_.get(), size_, largest, scale, steps_.get(), weights_.get());
}

int64_t Candidates::weight() const {
  int64_t sum = 0;
  for (int64_t i = 0; i < size_; ++i) sum += weights_[i];
  return sum;
}

void Candidates::keep_largest(int64_t count) {
  if (size_ <= count) return;
  for (int64_t i = 0; i < size_; ++i) {
    weights_[i] = 1;
    steps_[i] = 0.0;  // not known yet; it moves along
  }
  const auto key = [&](int64_t i) { return descending_key(logits_[i]); };
  keep_within(key, find_border(key, 0, UINT32_MAX, count), count);
}

bool Candidates::keep_mass(Range least) {
  const auto key = [&](int64_t i) { return descending_key(weights_[i]); };
  const uint64_t lowest = descending_key(kOne), highest = descending_key(int64_t{0});
  const Border border = find_border(key, lowest, highest, least.low);
  if (border.within < least.high) return false;
  keep_within(key, border, least.low);
  return true;
}

void Candidates::keep_ratio(double min_p) {
  const int64_t least = part(min_p, kOne);
  filter([&](int64_t i) { return weights_[i] >= least; });
}

// Meister et al. 2022, arXiv:2202.00666, section 4.
void Candidates::keep_typical(double typical_p) {
  const int64_t total = weight();
  int64_t surprise = 0;
  for (int64_t i = 0; i < size_; ++i)
    surprise += rounded(static_cast<double>(weights_[i]) * (steps_[i] * (1.0 / 512)));
  const double mean = static_cast<double>(surprise) / static_cast<double>(total);
  const auto key = [&](int64_t i) {
    return ascending_key(std::fabs(steps_[i] * (1.0 / 512) - mean));
  };
  const int64_t least = part(typical_p, total);
  keep_within(key, find_border(key, 0, ascending_key(kMostSteps), least), least);
}

int64_t Candidates::draw(uint64_t random) const {
  const int64_t place = place_of(random, weight());
  int64_t i = 0, sum = weights_[0];
  while (sum <= place) sum += weights_[++i];
  return ids_[i];
}

void Candidates::sort_ids() {
  for (int64_t i = 0; i < size_; ++i) ranked_[i] = {descending_key(logits_[i]), ids_[i]};
  std::sort(ranked_.get(), ranked_.get() + size_, [](const Ranked& a, const Ranked& b) {
    return a.key != b.key ? a.key < b.key : a.weight < b.weight;
  });
  for (int64_t i = 0; i < size_; ++i) ids_[i] = static_cast<int32_t>(ranked_[i].weight);
}

// Finds how far to go, from the lowest key up, to come to a weight of `least`; all the candidates
// weigh that much. O(n): their weights are summed in buckets of keys, then those of the right
// bucket, and so on. `key(i)` is candidate i's, from `lowest` to `highest`.
template <class Key>
Candidates::Border Candidates::find_border(Key key, uint64_t lowest, uint64_t highest,
                                           int64_t least) {
  Span span{lowest, highest, size_, 0};
  narrow([&](int64_t i) { return Ranked{key(i), weights_[i]}; }, least, span);
  while (span.lowest < span.highest)
    narrow([&](int64_t i) { return ranked_[i]; }, least, span);
  int64_t within = span.before;
  for (int64_t i = 0; within < least; ++i) within += ranked_[i].weight;
  return {span.lowest, span.before, within};
}

// One round: leaves the right bucket in `ranked_`, its order unchanged.
template <class Source>
void Candidates::narrow(Source source, int64_t least, Span& span) {
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
  while (span.before + sums[0][bucket] + sums[1][bucket] < least) {
    span.before += sums[0][bucket] + sums[1][bucket];
    ++bucket;
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
void Candidates::keep_within(Key key, const Border& border, int64_t least) {
  int64_t missing = least - border.before;
  filter([&](int64_t i) {
    const bool is_before = key(i) < border.key, is_on = key(i) == border.key;
    const bool is_kept = is_before | (is_on & (missing > 0));
    missing -= is_on ? weights_[i] : 0;
    return is_kept;
  });
}

template <class Keep>
void Candidates::filter(Keep keep) {
  int64_t count = 0;
  for (int64_t i = 0; i < size_; ++i) {
    const bool is_kept = keep(i);
    ids_[count] = ids_[i];
    logits_[count] = logits_[i];
    steps_[count] = steps_[i];
    weights_[count] = weights_[i];
    count += is_kept;
  }
  size_ = count;
}

}  // namespace llmserve
