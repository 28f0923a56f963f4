// How one row of logits becomes a token (docs/sampling.md): the row's parameters, packed in Python
// by llmserve/runners/native_sampling.py, which writes down the same two layouts.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace llmserve {

struct SampleRow {
  double temperature;
  double top_p;
  double min_p;
  double typical_p;
  double presence_penalty;
  double frequency_penalty;
  double repetition_penalty;
  uint64_t seed;
  int64_t position;             // of the token to be drawn
  int32_t top_k;                // 0 or -1: all
  int32_t num_logprobs;         // largest logits to report; -1: no log-probabilities are asked for
  uint32_t choice_index;
  bool has_edits;               // penalties, bias or masks: what follows
  const double* bias;           // [num_bias]
  const int32_t* bias_ids;      // [num_bias]
  int64_t num_bias;
  const int32_t* allowed_ids;   // [num_allowed] ascending
  int64_t num_allowed;          // -1: all ids are allowed
  const int32_t* banned_ids;    // [num_banned]
  int64_t num_banned;
  const int32_t* seen_ids;      // [num_seen] the sequence's, each once; none without the penalty
  int64_t num_seen;
  const int32_t* generated_ids;  // [num_generated] likewise of what was generated
  const int32_t* counts;        // [num_generated]
  int64_t num_generated;
};

// What Python hands over for R rows.
struct PackedRows {
  // [R, kRowBytes]: the fields of SampleRow from temperature to choice_index but the position, and
  // 4 bytes more.
  const uint8_t* constants;
  size_t num_constant_bytes;
  const int64_t* positions;  // [R]
  size_t num_positions;
  // For each row with edits: row, num_bias, num_allowed, num_banned, num_seen, num_generated; bias
  // (two words each), bias ids, allowed ids, banned ids, seen ids, generated ids, counts; a word
  // more where the number of words is odd. Begins at a multiple of 8 bytes.
  const int32_t* edits;
  size_t num_edit_words;
};

constexpr size_t kRowBytes = 80;

// Fills `rows`, which point into the edits. Returns null, or what is wrong with the buffers: every
// id of the edits is checked to be one of the vocabulary's.
const char* decode_rows(const PackedRows& packed, int64_t vocab_size, std::vector<SampleRow>& rows);

// Penalties, bias and masks, in place.
void edit_logits(float* logits, int64_t vocab_size, const SampleRow& row);

// The 53 bits that draw the row's token.
uint64_t random_number(const SampleRow& row);

}  // namespace llmserve
