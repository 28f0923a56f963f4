#include "sample_row.h"

#include <cstring>
#include <limits>

namespace llmserve {
namespace {

// Takes one thing after another from the edits, and remembers if they were too short.
class Reader {
 public:
  Reader(const int32_t* words, size_t num_words) : at_(words), end_(words + num_words) {}

  bool is_at_end() const { return at_ == end_; }
  bool is_whole() const { return is_whole_; }

  const int32_t* words(int64_t count) {
    if (count < 0 || count > end_ - at_) is_whole_ = false;
    if (!is_whole_) return nullptr;
    const int32_t* first = at_;
    at_ += count;
    return first;
  }

 private:
  const int32_t* at_;
  const int32_t* end_;
  bool is_whole_ = true;
};

SampleRow decode_constants(const uint8_t* record) {
  SampleRow row{};
  double* const doubles[] = {&row.temperature,      &row.top_p,
                             &row.min_p,            &row.typical_p,
                             &row.presence_penalty, &row.frequency_penalty,
                             &row.repetition_penalty};
  for (double* value : doubles) {
    std::memcpy(value, record, 8);
    record += 8;
  }
  std::memcpy(&row.seed, record, 8);
  std::memcpy(&row.top_k, record + 8, 4);
  std::memcpy(&row.num_logprobs, record + 12, 4);
  std::memcpy(&row.choice_index, record + 16, 4);
  row.num_allowed = -1;
  return row;
}

bool are_ids(const int32_t* ids, int64_t count, int64_t vocab_size) {
  bool are = true;
  for (int64_t i = 0; i < count; ++i) are &= ids[i] >= 0 && ids[i] < vocab_size;
  return are;
}

// The edits of one row, behind its number.
const char* decode_edits(Reader& reader, int64_t vocab_size, SampleRow& row) {
  const int32_t* counts = reader.words(5);
  if (counts == nullptr) return "the edits of the rows end early";
  row.has_edits = true;
  row.num_bias = counts[0];
  row.num_allowed = counts[1];
  row.num_banned = counts[2];
  row.num_seen = counts[3];
  row.num_generated = counts[4];
  const int64_t num_listed = row.num_allowed < 0 ? 0 : row.num_allowed;
  const int32_t* bias = reader.words(2 * row.num_bias);
  row.bias_ids = reader.words(row.num_bias);
  row.allowed_ids = reader.words(num_listed);
  row.banned_ids = reader.words(row.num_banned);
  row.seen_ids = reader.words(row.num_seen);
  row.generated_ids = reader.words(row.num_generated);
  row.counts = reader.words(row.num_generated);
  const int64_t num_words =
      row.num_bias + num_listed + row.num_banned + row.num_seen + 2 * row.num_generated;
  reader.words(num_words % 2);
  if (!reader.is_whole()) return "the edits of the rows end early";
  for (int64_t i = 1; i < num_listed; ++i)
    if (row.allowed_ids[i - 1] >= row.allowed_ids[i]) return "allowed ids do not ascend";
  row.bias = reinterpret_cast<const double*>(bias);
  if (!are_ids(row.bias_ids, row.num_bias, vocab_size) ||
      !are_ids(row.allowed_ids, num_listed, vocab_size) ||
      !are_ids(row.banned_ids, row.num_banned, vocab_size) ||
      !are_ids(row.seen_ids, row.num_seen, vocab_size) ||
      !are_ids(row.generated_ids, row.num_generated, vocab_size))
    return "an id of a row is not one of the vocabulary's";
  return nullptr;
}

}  // namespace

const char* decode_rows(const PackedRows& packed, int64_t vocab_size,
                        std::vector<SampleRow>& rows) {
  rows.clear();
  if (packed.num_constant_bytes != packed.num_positions * kRowBytes)
    return "constants and positions are not of equally many rows";
  if (reinterpret_cast<uintptr_t>(packed.edits) % 8 != 0)
    return "the edits of the rows do not begin at a multiple of 8 bytes";
  for (size_t i = 0; i < packed.num_positions; ++i) {
    rows.push_back(decode_constants(packed.constants + i * kRowBytes));
    rows.back().position = packed.positions[i];
  }
  Reader reader(packed.edits, packed.num_edit_words);
  while (!reader.is_at_end()) {
    const int32_t index = *reader.words(1);
    if (index < 0 || static_cast<size_t>(index) >= rows.size())
      return "the edits are of a row that is not there";
    const char* fault = decode_edits(reader, vocab_size, rows[static_cast<size_t>(index)]);
    if (fault != nullptr) return fault;
  }
  return nullptr;
}

void edit_logits(float* logits, int64_t vocab_size, const SampleRow& row) {
  constexpr float kOut = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < row.num_seen; ++i) {
    float& logit = logits[row.seen_ids[i]];
    const double value = logit, penalty = row.repetition_penalty;
    logit = static_cast<float>(value > 0 ? value / penalty : value * penalty);
  }
  for (int64_t i = 0; i < row.num_generated; ++i) {
    float& logit = logits[row.generated_ids[i]];
    const double penalty = row.presence_penalty + row.frequency_penalty * row.counts[i];
    logit = static_cast<float>(logit - penalty);
  }
  for (int64_t i = 0; i < row.num_bias; ++i) {
    float& logit = logits[row.bias_ids[i]];
    logit = static_cast<float>(logit + row.bias[i]);
  }
  if (row.num_allowed >= 0) {
    int64_t next = 0;
    for (int64_t i = 0; i < row.num_allowed; ++i) {
      for (; next < row.allowed_ids[i]; ++next) logits[next] = kOut;
      ++next;
    }
    for (; next < vocab_size; ++next) logits[next] = kOut;
  }
  for (int64_t i = 0; i < row.num_banned; ++i) logits[row.banned_ids[i]] = kOut;
}

// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3).
uint64_t random_number(const SampleRow& row) {
  const uint64_t position = static_cast<uint64_t>(row.position);
  uint32_t x0 = static_cast<uint32_t>(position), x1 = static_cast<uint32_t>(position >> 32);
  uint32_t x2 = row.choice_index, x3 = 0;
  uint32_t k0 = static_cast<uint32_t>(row.seed), k1 = static_cast<uint32_t>(row.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * x0, p1 = uint64_t{0xCD9E8D57} * x2;
    x0 = static_cast<uint32_t>(p1 >> 32) ^ x1 ^ k0;
    x1 = static_cast<uint32_t>(p1);
    x2 = static_cast<uint32_t>(p0 >> 32) ^ x3 ^ k1;
    x3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return uint64_t{x0} << 21 | x1 >> 11;
}

}  // namespace llmserve
