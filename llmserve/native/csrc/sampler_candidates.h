// The ids of a row that may be drawn, and the cuts of docs/sampling.md that they pass through.
#pragma once
#include <cstdint>
#include <memory>

#include "sampler_table.h"

namespace llmserve {

// Whole numbers between which one lies.
struct Range {
  int64_t low, high;
};

// Ids in ascending order, their logits, and once they are weighed their steps and weights. Room
// for a whole vocabulary: 40 bytes for each of its ids.
class Candidates {
 public:
  Candidates(const SamplerLoops& loops, int64_t vocab_size);

  int64_t size() const { return size_; }
  int32_t id(int64_t i) const { return ids_[i]; }

  // Takes the ids whose logit is at least `least`; `maxima` are the columns' of these logits.
  void collect(const float* logits, const float* maxima, float least);
  void weigh(float largest, double scale);
  int64_t weight() const;

  // Cuts: each keeps some of the candidates. All but the first ask for weights.
  void keep_largest(int64_t count);
  // The fewest, heaviest of at least that weight. False if it depends on where in the range the
  // least is; then all stay.
  bool keep_mass(Range least);
  void keep_ratio(double min_p);
  void keep_typical(double typical_p);

  // The id that a random number falls on.
  int64_t draw(uint64_t random) const;
  // Puts the ids, and nothing else, into the order of their logits: largest first, ties to the
  // lowest id.
  void sort_ids();

 private:
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
  // Keys among which the border is; `count` candidates have one of them.
  struct Span {
    uint64_t lowest, highest;
    int64_t count;
    int64_t before;  // weight of all with a lower key
  };

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
  int64_t size_ = 0;
  std::unique_ptr<int32_t[]> ids_;
  std::unique_ptr<float[]> logits_;
  std::unique_ptr<double[]> steps_;
  std::unique_ptr<int64_t[]> weights_;
  std::unique_ptr<Ranked[]> ranked_;  // some of them, while a border is looked for
};

}  // namespace llmserve
