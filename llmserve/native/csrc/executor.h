// Runs a model's program: every operation of a step, for all its tokens, in one call.
//
// The program is a flat list of operations written down once in Python (llmserve/native/program.py,
// whose numbering of codes and arguments this header mirrors). Most are for all tokens of the step
// (`tokens`), those of the head for the rows whose logits are asked for (`rows`). An operation is a
// phase of the team or, where preparing a few rows costs less than meeting, part of the next one:
// each thread then prepares the rows for itself. The same function computes them, so the bits agree.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "sampler.h"
#include "team.h"
#include "aligned.h"
#include "types.h"

namespace llmserve {

enum class Code : int64_t {
  kEmbed = 0,    // out, table, table kind, width, position table, position kind; scale
  kPrepare = 1,  // in, slot, width, norm kind, weight, bias; eps
  kLinear = 2,   // slot, linear, epilogue, out, column; cap
  kRope = 3,     // qkv, layer, rotary_dim, rope table, query norm, key norm, is_whole; eps
  kAttend = 4,   // qkv, layer, out; scale, cap
  kAddNorm = 5,  // in, out, width, norm kind, weight, bias; eps
  kGather = 6,   // in, out: the rows asked for
  kGate = 7,     // gate, up, out, epilogue (a plain one: of the gate alone)
  kNorm = 8,     // in place, width, norm kind, weight, bias; eps
  kSample = 9,   // logits, width
  kLora = 10,    // slot, first entry of the adapters' table, out, column
  kRoute = 11,   // router's logits, experts, experts per token, is_normalized
  kDispatch = 12,  // in, out (routed)
  kExperts = 13,   // slot (routed), first linear, epilogue, out (routed), experts
  kCombine = 14,   // in (routed), out
  kAddGated = 15,  // in, gate, out
  kAdd = 16,       // in, out
};

// What an operation or a buffer has rows for: tokens of the step, rows whose logits are asked for,
// or tokens once for each expert that they go through, expert after expert.
enum class Domain : int64_t { kTokens = 0, kRows = 1, kRouted = 2 };

constexpr int kArguments = 12;

struct Op {
  Code code;
  Domain domain;
  int64_t a[kArguments];
  double r[4];
};

struct Buffer {
  int64_t width;       // floats of a row, padded to 16
  Domain domain;
  Aligned<float> data;
};

// A place for prepared activations, and how they are to be made.
struct Slot {
  Domain domain;
  int64_t has_values;
  int64_t has_integers;
  int64_t width;
  int64_t group_size;
  int64_t padded_group;
  int64_t num_groups;
  int64_t num_digits;
  const int32_t* order;
  bool has_parts = false;  // where the kernels want them

  int64_t value_stride() const { return ((width + 15) / 16 * 16) * (order != nullptr ? 2 : 1); }
  int64_t digit_stride() const { return (num_groups * padded_group + 16 + 63) / 64 * 64; }
  int64_t part_stride() const { return (width + 31) / 32 * 32; }
};

struct PreparedRows {
  Aligned<float> values;
  Aligned<int8_t> integers;
  Aligned<float> scales;
  Aligned<int32_t> sums;
  Aligned<uint16_t> parts;
  Prepared view{};

  void reserve(const Slot& slot, int64_t num_rows);
};

struct Geometry {
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t num_layers;
  int64_t num_groups;  // of the cache
  int64_t num_experts_per_token;  // 0: none
  int64_t num_adapters;
};

struct GroupInput {
  const int64_t* slots;         // [T]
  const int64_t* block_tables;  // [S, table_width]
  int64_t table_width;
  const int64_t* copies;        // [num_copies, 2]
  int64_t num_copies;
};

struct StepInput {
  const int64_t* token_ids;
  const int64_t* positions;
  int64_t num_tokens;
  const int64_t* cu_seqlens;
  const int64_t* context_lens;
  int64_t num_seqs;
  const int64_t* adapter_ids;   // [S] 0: none; or null: none anywhere
  std::vector<GroupInput> groups;
  const int64_t* row_indices;   // packed indices of the rows whose logits are wanted
  int64_t num_rows;
};

// How the rows become tokens, and where these go; width: log-probabilities kept for each row.
struct SampleStep {
  std::vector<SampleRow>* rows;
  int64_t* token_ids;
  uint8_t* is_usable;
  RowLogprobs logprobs;
  int64_t width;
};

// Several rounds of decoding: every sequence has one token and one row, and tables have blocks for
// all rounds. Ids and whether they are usable are written round by round.
struct Rounds {
  int64_t count;       // 1: nothing of this
  const int64_t* ends;  // ids that end every sequence
  int64_t num_ends;
};

class Executor {
 public:
  Executor(const Kernels& kernels, int num_threads, const Geometry& geometry, std::vector<Op> ops,
           std::vector<Linear> linears, std::vector<Buffer> buffers, std::vector<Slot> slots,
           std::vector<int64_t> layer_groups, std::vector<int64_t> windows,
           std::vector<int64_t> adapters);

  // Where each layer's keys and values are.
  void set_cache(std::vector<LayerCache> layers);
  void set_rope_table(int64_t index, const float* table);

  // The whole step; the logits of its rows, edited, are then in the last buffer. Returns the rounds
  // that were computed: no more once a row cannot be used or every sequence has met its end.
  int64_t step(const StepInput& input, const SampleStep& sampling, const Rounds& rounds);
  // The head once more, for other rows of the last step.
  void head(const int64_t* row_indices, int64_t num_rows);
  // The head as far as its norm: the final hidden states of rows of the last step.
  void hidden(const int64_t* row_indices, int64_t num_rows);

  int64_t block_size() const { return layers_.empty() ? 0 : layers_[0].block_size; }
  const Buffer& buffer(int64_t index) const { return buffers_[static_cast<size_t>(index)]; }

 private:
  struct Item {
    AttendItem attend;
    int64_t first_partition, last_partition;  // where the context is split, else both 0
    int64_t partial_offset;                   // of the partition's state in `partials_`
    int64_t counter;                          // of the partitions done, by index
  };

  struct HeadTiles {
    int64_t heads;       // of one key head
    int64_t head_step;   // of them, in one item
    int64_t query_step;  // queries of one item
  };

  HeadTiles head_tiles() const;
  void reserve(int64_t num_tokens, int64_t num_rows);
  void copy_blocks(const StepInput& input);
  bool goes_on(const Rounds& rounds);
  void advance();
  void plan_attention();
  void plan_sequence(int64_t group, int64_t sequence, bool is_split);
  void run(bool has_tokens, bool has_head);
  int64_t rows_of(const Op& op) const {
    if (op.domain == Domain::kRows) return num_rows_;
    const int64_t times = op.domain == Domain::kRouted ? geometry_.num_experts_per_token : 1;
    return input_.num_tokens * times;
  }
  int64_t room_of(Domain domain) const {
    if (domain == Domain::kRows) return row_room_;
    return token_room_ * (domain == Domain::kRouted ? geometry_.num_experts_per_token : 1);
  }
  int64_t num_items(const Op& op);
  bool is_private(const Op& prepare) const;
  void do_item(int64_t index, int64_t item, int thread);
  void do_linear(const Op& op, int64_t item, int thread);
  void do_attend(const Op& op, int64_t item, int thread);
  void do_sample(const Op& op, int64_t row, int thread);
  void do_lora(const Op& op, int64_t sequence, int thread);
  void do_route(const Op& op);
  void do_experts(const Op& op, int64_t item, int thread);
  void do_combine(const Op& op, int64_t first, int64_t last);
  const Prepared& prepared_for(const Op& op, int thread);
  PrepareCall prepare_call(const Op& op) const;
  float* data(int64_t index) { return buffers_[static_cast<size_t>(index)].data.get(); }
  int64_t stride(int64_t index) const { return buffers_[static_cast<size_t>(index)].width; }

  const Kernels& kernels_;
  Team team_;
  Geometry geometry_;
  std::vector<Op> ops_;
  std::vector<int64_t> prepared_by_;  // of a linear op: the op that prepares its slot
  std::vector<Linear> linears_;
  std::vector<Buffer> buffers_;
  std::vector<Slot> slots_;
  std::vector<int64_t> layer_groups_;
  std::vector<int64_t> windows_;      // by cache group
  std::vector<int64_t> adapters_;     // [entries, adapters, 2] linears A and B, or -1
  std::vector<LayerCache> layers_;
  std::vector<const float*> rope_tables_;
  std::vector<PreparedRows> shared_;  // by slot
  std::vector<PreparedRows> private_; // by thread and slot
  std::vector<uint64_t> made_;        // by thread and slot: what its private rows are
  std::vector<std::vector<float>> scratch_;  // by thread
  std::vector<std::unique_ptr<Sampler>> samplers_;  // by thread, made when first needed
  SampleStep sampling_{};
  std::vector<std::vector<Item>> items_;     // by cache group
  std::vector<float> partials_;
  std::unique_ptr<std::atomic<int64_t>[]> counters_;
  int64_t num_counters_ = 0, most_counters_ = 0, partial_floats_ = 0;
  std::vector<Team::Phase> phases_;
  // Of the last routing: for each token and choice, ascending by expert, the routed row and its
  // weight; for each expert its first routed row.
  std::vector<int64_t> routed_row_;
  std::vector<float> routed_weight_;
  std::vector<int64_t> expert_start_;
  int64_t token_room_ = 0, row_room_ = 0;
  StepInput input_{};
  // Of the rounds after the first, by sequence; slots by cache group as well.
  std::vector<int64_t> positions_, context_lens_;
  std::vector<std::vector<int64_t>> round_slots_;
  std::vector<uint8_t> has_ended_;
  const int64_t* row_indices_ = nullptr;
  int64_t num_rows_ = 0;
  uint64_t step_ = 0;
};

}  // namespace llmserve
