// From a row of logits to a token: docs/sampling.md, to the bit, and its log-probabilities.
//
// Sums over the vocabulary have to be exact, and exact weights cost many times what it takes to
// read the logits. So they are first bounded: `masses` gives every weight to 1e-10 and a fraction
// of a unit in a third of the time, and nearly always that decides which id the random number
// falls on, or where a cut is. Where it does not, all weights are computed. Otherwise only ids that
// may matter get exact ones: those above a bound on their logit.
#pragma once
#include <cstdint>
#include <memory>

#include "sample_row.h"
#include "sampler_candidates.h"
#include "sampler_table.h"

namespace llmserve {

// Where the log-probabilities of a row go.
struct RowLogprobs {
  double* logprob;       // of the given id; NaN for a row that is not usable
  int32_t* num_top;      // how many of those asked for there are
  int32_t* top_ids;      // best first, ties to the lowest id
  double* top_logprobs;
};

// What draws rows in one thread, one after another, without allocating. Its scratch is 44 bytes for
// each id of the vocabulary and a little more; only what is used becomes resident.
class Sampler {
 public:
  Sampler(const SamplerLoops& loops, int64_t vocab_size);

  // The row's token, or -1 if the row is not usable. The row's edits are made in place, unless its
  // log-probabilities are asked for: then the logits stay as they are.
  int64_t draw(float* logits, const SampleRow& row);

  // Log-softmax of the logits at `token_id` and at the `num_top` largest but those of minus
  // infinity. The numbers depend on nothing but the logits.
  void logprobs(const float* logits, int64_t token_id, int64_t num_top, const RowLogprobs& out);

 private:
  bool scan(const float* logits);
  int64_t likeliest(const float* logits) const;
  int64_t draw_by_chance(const float* logits, const SampleRow& row);

  int64_t draw_surely(const float* logits, uint64_t random);
  int64_t draw_exactly(const float* logits, uint64_t random);
  double bound_weights(const float* logits);
  double mass_error(double mass) const;
  int64_t weigh_all(const float* logits);
  int64_t weigh_chunk(const float* logits, int64_t chunk);

  void choose(const float* logits, const SampleRow& row);
  void collect_largest(const float* logits, int64_t count);
  void choose_mass(const float* logits, double top_p);
  void collect_weights(const float* logits, int64_t least);
  float bound_of_largest(const float* logits, int64_t count) const;
  float bound_of_weight(int64_t weight) const;

  const SamplerLoops& loops_;
  const int64_t vocab_size_;
  const int64_t num_chunks_;
  Candidates candidates_;
  std::unique_ptr<float[]> edited_;   // [V] edited logits, where the row's own must stay
  // Of the row under way:
  float largest_ = 0.0f;
  double scale_ = 0.0;                // s of docs/sampling.md
  std::unique_ptr<float[]> maxima_;   // [chunks, kColumns]
  std::unique_ptr<double[]> masses_;  // [chunks] their weights, bounded or exact
  double steps_[kChunk];              // of one chunk
  int64_t weights_[kChunk];
};

}  // namespace llmserve
