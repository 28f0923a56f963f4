#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "sampler_numbers.h"

namespace llmserve {
namespace {

constexpr double kBitsPerNat = 0x1.71547652b82fep+0;
constexpr double kStepsPerNat = 512 * kBitsPerNat;
constexpr double kLeastTemperature = 1e-9;
constexpr double kMassError = 1e-10;  // of `masses`, of itself
constexpr double kWeightError = 0.6;  // of a weight, in units
constexpr float kInfinity = std::numeric_limits<float>::infinity();

bool has_top_k(const SampleRow& row, int64_t vocab_size) {
  return 0 < row.top_k && row.top_k < vocab_size;
}

}  // namespace

Sampler::Sampler(const SamplerLoops& loops, int64_t vocab_size)
    : loops_(loops),
      vocab_size_(vocab_size),
      num_chunks_((vocab_size + kChunk - 1) / kChunk),
      candidates_(loops, vocab_size),
      edited_(new float[static_cast<size_t>(vocab_size)]),
      maxima_(new float[static_cast<size_t>(num_chunks_ * kColumns)]),
      masses_(new double[static_cast<size_t>(num_chunks_)]) {}

int64_t Sampler::draw(float* logits, const SampleRow& row) {
  if (!scan(logits)) return -1;
  if (row.has_edits) {
    if (row.num_logprobs >= 0) {
      std::memcpy(edited_.get(), logits, static_cast<size_t>(vocab_size_) * sizeof(float));
      logits = edited_.get();
    }
    edit_logits(logits, vocab_size_, row);
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
  const bool has_cuts = has_top_k(row, vocab_size_) || row.top_p < 1.0 || row.min_p > 0.0 ||
                        row.typical_p < 1.0;
  if (has_cuts) {
    choose(logits, row);
    return candidates_.draw(random);
  }
  const int64_t id = draw_surely(logits, random);
  return id >= 0 ? id : draw_exactly(logits, random);
}

// Draws from the whole vocabulary by bounds on the weights; -1 if they leave a doubt.
int64_t Sampler::draw_surely(const float* logits, uint64_t random) {
  const double total = bound_weights(logits);
  const double place = static_cast<double>(random) * 0x1p-53 * total;
  // Both the place and the weight before an id may be off.
  const double margin = 2 * mass_error(total);
  double before = 0.0;
  int64_t chunk = 0;
  while (chunk < num_chunks_ - 1 && before + masses_[chunk] <= place) before += masses_[chunk++];
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

// By how much a sum of bounded weights may be off, at most, and a unit.
double Sampler::mass_error(double mass) const {
  return kWeightError * static_cast<double>(vocab_size_) + kMassError * mass + 1.0;
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

int64_t Sampler::weigh_chunk(const float* logits, int64_t chunk) {
  const int64_t start = chunk * kChunk, count = std::min(kChunk, vocab_size_ - start);
  loops_.weigh(logits + start, count, largest_, scale_, steps_, weights_);
  return std::accumulate(weights_, weights_ + count, int64_t{0});
}

// Makes the cuts: what may be drawn are then the candidates.
void Sampler::choose(const float* logits, const SampleRow& row) {
  if (has_top_k(row, vocab_size_)) {
    collect_largest(logits, row.top_k);
    candidates_.weigh(largest_, scale_);
    if (row.top_p < 1.0) {
      const int64_t least = part(row.top_p, candidates_.weight());
      candidates_.keep_mass({least, least});
    }
  } else if (row.top_p < 1.0) {
    choose_mass(logits, row.top_p);
  } else {
    collect_weights(logits, row.min_p > 0.0 ? part(row.min_p, kOne) : 1);
  }
  if (row.min_p > 0.0) candidates_.keep_ratio(row.min_p);
  if (row.typical_p < 1.0) candidates_.keep_typical(row.typical_p);
}

void Sampler::collect_largest(const float* logits, int64_t count) {
  candidates_.collect(logits, maxima_.get(), bound_of_largest(logits, count));
  candidates_.keep_largest(count);
}

void Sampler::choose_mass(const float* logits, double top_p) {
  const double mass = bound_weights(logits), error = mass_error(mass);
  Range total{static_cast<int64_t>(mass - error), static_cast<int64_t>(mass + error)};
  for (;;) {
    // So light an id is never needed: all of them together weigh no more than what may be missing.
    const int64_t light = (total.low - part(top_p, total.low)) / vocab_size_;
    collect_weights(logits, light + 1);
    if (candidates_.keep_mass({part(top_p, total.low), part(top_p, total.high)})) return;
    total.low = total.high = weigh_all(logits);
  }
}

// Weighs all ids that weigh `least` or more, and some others.
void Sampler::collect_weights(const float* logits, int64_t least) {
  candidates_.collect(logits, maxima_.get(), bound_of_weight(least));
  candidates_.weigh(largest_, scale_);
}

// A logit that at least `count` ids reach, and not many more. If so many columns have an id that
// reaches it, so many ids do; where that would be most columns, the ids themselves are counted.
float Sampler::bound_of_largest(const float* logits, int64_t count) const {
  const int64_t num_columns = num_chunks_ * kColumns;
  const bool is_by_columns = count <= num_columns / 2;
  const float* values = is_by_columns ? maxima_.get() : logits;
  const int64_t num_values = is_by_columns ? num_columns : vocab_size_;
  int64_t low = ordered(-kInfinity), high = int64_t{ordered(largest_)} + 1;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    const float bound = float_at(static_cast<int32_t>(middle));
    const int64_t reached = loops_.count_at_least(values, num_values, bound);
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
  collect_largest(logits, std::min(num_top, vocab_size_));
  candidates_.sort_ids();
  int32_t count = 0;
  for (; count < candidates_.size() && logits[candidates_.id(count)] > -kInfinity; ++count) {
    out.top_ids[count] = candidates_.id(count);
    out.top_logprobs[count] = logits[candidates_.id(count)] - largest - log_total;
  }
  *out.num_top = count;
}

}  // namespace llmserve
