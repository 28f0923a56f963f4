// From a row of logits to a token: docs/sampling.md, to the bit, and its log-probabilities.
//
// Sums over the vocabulary have to be exact, and exact weights cost ten times what it takes to read
// the logits. So they are first bounded: `masses` gives every weight to 1e-10 and a fraction of a
// unit, and nearly always that decides which id the random number falls on, or where a cut is. Where
// it does not, the weights are computed in full. Only ids that may matter get exact weights at once:
// those above a bound on their logit.
#pragma once
#include <cstdint>
#include <memory>

#include "sample_row.h"

namespace llmserve {

// Ids that are passed over, summed or weighed together; and in each of them the columns of which
// the largest logit is noted: column j of a chunk holds its ids j, j + 16, j + 32, ...
constexpr int64_t kChunk = 512;
constexpr int64_t kColumns = 16;
// Floats or ids that `collect` may write beyond the last one it keeps.
constexpr int64_t kSlack = 16;

// The passes over many ids, for each instruction set (sampler_loops.h). All but `masses`
// give the same on each.
struct SamplerLoops {
  // Largest of each column, [chunks, kColumns], minus infinity where there is no id. Returns the
  // largest of all, or NaN if one is NaN: then the maxima mean nothing.
  float (*column_maxima)(const float* values, int64_t n, float* maxima);
  // Index of the first value that is at least `least`, or n.
  int64_t (*first_at_least)(const float* values, int64_t n, float least);
  int64_t (*count_at_least)(const float* values, int64_t n, float least);
  // Ascending ids of the values that are at least `least`, and those values; returns how many.
  int64_t (*collect)(const float* values, int64_t n, const float* maxima, float least,
                     int32_t* ids, float* kept);
  // Steps x and weights w of docs/sampling.md, step 6; `scale` is its s.
  void (*weigh)(const float* values, int64_t n, double largest, double scale, double* steps,
                int64_t* weights);
  // Of each chunk the sum of 2^((value - largest) * scale), within 1e-10 of itself; less than
  // 2^-1000 counts as that.
  void (*masses)(const float* values, int64_t n, double largest, double scale, double* sums);
  // The same to the bit on every path: eight lanes, joined in a fixed order.
  void (*exact_masses)(const float* values, int64_t n, double largest, double scale, double* sums);
};

// P[0] to P[511] of docs/sampling.md: the double nearest to 2^(42 - n / 512).
struct Powers {
  double at[512];
};
constexpr Powers make_powers() {
  // 2^(-1/512) and its powers as fractions of 2^128, off by at most 2^-118; no power lies closer
  // than 2^-66 to where its rounding changes.
  using Wide = unsigned __int128;
  const uint64_t root[2] = {0x9f3a1b48fb94c589u, 0xffa756521c8daed1u};
  Powers powers{};
  powers.at[0] = 0x1p42;
  Wide power = Wide{root[1]} << 64 | root[0];
  for (int n = 1; n < 512; ++n) {
    powers.at[n] = static_cast<double>(power) * 0x1p-86;
    const Wide low = static_cast<uint64_t>(power), high = power >> 64;
    const Wide middle = high * root[0] + (low * root[0] >> 64);
    const Wide other = low * root[1] + static_cast<uint64_t>(middle);
    power = high * root[1] + (middle >> 64) + (other >> 64);
  }
  return powers;
}
inline constexpr Powers kPowers = make_powers();

// Where the log-probabilities of a row go.
struct RowLogprobs {
  double* logprob;       // of the given id; NaN for a row that is not usable
  int32_t* num_top;      // how many of those asked for there are
  int32_t* top_ids;      // best first, ties to the lowest id
  double* top_logprobs;
};

// The scratch of one thread: about 48 bytes for each id of the vocabulary, of which only what is
// used becomes resident.
class Sampler {
 public:
  Sampler(const SamplerLoops& loops, int64_t vocab_size);

  // The row's token, or -1 if the row is not usable. The row's edits are made in place, unless its
  // log-probabilities are asked for: then the logits stay as they are.
  int64_t draw(float* logits, const SampleRow& row);

  // Log-softmax of the logits at `token_id` and at the `num_top` largest. The numbers depend on
  // nothing but the logits.
  void logprobs(const float* logits, int64_t token_id, int64_t num_top, const RowLogprobs& out);

 private:
  // Whole numbers between which one lies.
  struct Range {
    int64_t low, high;
  };
  // Where a cut is: of the candidates with `key`, those stay that are needed beside those `before`.
  struct Border {
    uint64_t key;
    int64_t before;  // weight of all with a lower key
    int64_t within;  // weight of all that stay
  };
  struct Ranked {
    uint64_t key;
    int64_t weight;
  };
  // Keys among which the border is; `count` have one of them.
  struct Span {
    uint64_t lowest, highest;
    int64_t count;
    int64_t before;  // weight of all with a lower key
  };

  bool scan(const float* logits);
  int64_t likeliest(const float* logits) const;
  int64_t draw_by_chance(const float* logits, const SampleRow& row);

  int64_t draw_from_all(const float* logits, uint64_t random);
  int64_t draw_surely(const float* logits, uint64_t random);
  int64_t draw_exactly(const float* logits, uint64_t random);
  double bound_weights(const float* logits);
  double mass_error(double mass) const;
  int64_t weigh_chunk(const float* logits, int64_t chunk);
  int64_t weigh_all(const float* logits);

  void choose(const float* logits, const SampleRow& row);
  void keep_largest(const float* logits, int64_t count);
  void keep_mass_of_all(const float* logits, double top_p);
  bool keep_mass(Range least);
  void keep_ratio(double min_p);
  void keep_typical(double typical_p);
  int64_t draw_from_candidates(uint64_t random) const;

  void collect(const float* logits, float least);
  void weigh_candidates();
  int64_t candidate_weight() const;
  float bound_of_largest(int64_t count) const;
  float bound_of_weight(int64_t weight) const;
  template <class Key>
  Border find_border(Key key, uint64_t lowest, uint64_t highest, int64_t least);
  template <class Source>
  void narrow(Source source, int64_t least, Span& span);
  template <class Key>
  void keep_within(Key key, const Border& border, int64_t least);
  template <class Keep>
  void filter(Keep keep);

  const SamplerLoops& loops_;
  const int64_t vocab_size_;
  const int64_t num_chunks_;
  // Of the row under way:
  float largest_ = 0.0f;
  double scale_ = 0.0;                // steps of docs/sampling.md for one of the logits' units
  std::unique_ptr<float[]> maxima_;   // [chunks, kColumns]
  std::unique_ptr<double[]> masses_;  // [chunks] weights of the chunks, bounded or exact
  std::unique_ptr<float[]> edited_;   // [V] edited logits, where the row's own must stay
  // Ids that may be drawn, ascending, and what is known of them.
  int64_t num_candidates_ = 0;
  std::unique_ptr<int32_t[]> ids_;
  std::unique_ptr<float[]> values_;
  std::unique_ptr<double[]> steps_;
  std::unique_ptr<int64_t[]> weights_;
  std::unique_ptr<Ranked[]> ranked_;  // some of them, while a border is looked for
};

}  // namespace llmserve
