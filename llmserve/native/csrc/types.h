// Plain data that the executor hands to the kernels. No path's types appear here, so every
// instruction set compiles the same declarations.
//
// Shapes: T rows (tokens) of a step, E hidden size, H query heads, KV key heads, D head size.
// Rows of float buffers are padded to a multiple of 16 floats; what is beyond a row's width is 0.
#pragma once
#include <cstddef>
#include <cstdint>

namespace llmserve {

enum class Number : int64_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kInt8 = 3 };

constexpr int64_t bytes_of(Number kind) {
  return kind == Number::kFloat32 ? 4 : kind == Number::kInt8 ? 1 : 2;
}

// A weight [out, width], outputs in blocks of 16: see pack.h for the layout of each kind.
enum class WeightKind : int64_t { kFloat32 = 0, kBfloat16 = 1, kInt4 = 2, kInt8 = 3 };

struct Linear {
  WeightKind kind;
  bool has_float_rows;      // integer weights times float32 activations
  int64_t out;
  int64_t width;
  int64_t group_size;       // inputs whose products are summed as integers
  int64_t padded_group;     // group_size rounded up to whole chunks of 64 bytes
  int64_t num_groups;
  const uint8_t* values;
  const uint8_t* scales;    // [blocks, groups, 16] of scale_kind
  Number scale_kind;        // kFloat32 or kBfloat16
  const uint8_t* zeros;     // [blocks, groups, 16] or null: the middle of the range is zero
  const float* bias;        // [blocks * 16] or null

  int64_t num_blocks() const { return (out + 15) / 16; }
};

// An activation is an integer of one digit, or of two: high * kDigitBase + low. A digit is a signed
// byte, -127..127.
constexpr int32_t kDigitBase = 254;
// The largest whose high digit, the nearest to integer / kDigitBase and of two the even one, is one.
constexpr int32_t kLargestOfTwo = 127 * kDigitBase + 126;

// Activations made ready for a product.
struct Prepared {
  float* values;            // [rows, stride]; null where only integers are needed
  int64_t stride;
  int8_t* integers;         // [rows, digits, digit_stride], groups padded with 0; high ones first
  int64_t digit_stride;     // a multiple of 64: the zeros behind a row's last group reach so far
  int64_t integer_stride;   // of a row
  float* scales;            // [rows, num_groups]
  int32_t* sums;            // [rows, digits, num_groups] sums of the digits
  uint16_t* parts;          // [rows, 2, part_stride] bfloat16: the nearest, and that of the rest
  int64_t part_stride;      // a multiple of 32: zeros behind the width reach so far
};

enum class NormKind : int64_t { kNone = 0, kRms = 1, kLayer = 2 };

struct Norm {
  NormKind kind;
  const float* weight;
  const float* bias;
  float eps;
};

struct PrepareCall {
  const float* input;       // [rows, stride]
  int64_t stride;
  int64_t width;
  Norm norm;
  bool has_values;          // make float32 rows
  bool has_integers;        // make int8 rows
  bool has_parts;           // make rows of two bfloat16 parts
  int64_t group_size;
  int64_t padded_group;
  int64_t num_groups;
  int64_t num_digits;       // of an integer, 1 or 2
  const int32_t* order;     // [width] input permutation of the integers, or null
};

enum class Epilogue : int64_t {
  kStore = 0, kAdd = 1, kSwiglu = 2, kGeglu = 3, kGelu = 4, kGeluTanh = 5
};

struct LinearCall {
  const Linear* weight;
  Prepared input;
  Epilogue epilogue;
  float* out;               // [rows, stride]
  int64_t stride;
  float cap;                // > 0: what is stored is cap * tanh(product / cap)
};

struct EmbedCall {
  const int64_t* token_ids;
  const int64_t* positions;
  const void* table;
  Number table_kind;
  int64_t width;
  float scale;
  const void* position_table;  // or null
  Number position_kind;
  float* out;
  int64_t stride;
};

// Keys and values of one layer. Of each block and key head, first keys [tokens / 16, D, 16], then
// values [tokens, D]; an int8 cache has the tokens' scales, keys' then values', after them.
struct LayerCache {
  uint8_t* data;
  Number kind;              // kFloat32, kBfloat16 or kInt8
  int64_t block_size;       // tokens, a multiple of 16
  int64_t num_kv_heads;
  int64_t head_dim;

  int64_t item_bytes() const { return bytes_of(kind); }
  int64_t head_bytes() const {  // of one block and head
    const int64_t scales = kind == Number::kInt8 ? 2 * block_size * 4 : 0;
    return 2 * block_size * head_dim * item_bytes() + scales;
  }
  uint8_t* head(int64_t block, int64_t kv_head) const {
    return data + (block * num_kv_heads + kv_head) * head_bytes();
  }
};

struct RopeCall {
  float* qkv;               // [T, stride]: H * D of queries, KV * D of keys, KV * D of values
  int64_t stride;
  int64_t num_heads;
  int64_t rotary_dim;       // 0: no rotation
  const float* table;       // [positions, rotary_dim]: cosines, then sines
  const int64_t* positions;
  const int64_t* slots;     // [T]
  Norm query_norm;          // over each head, or over all (is_whole_norm)
  Norm key_norm;
  bool is_whole_norm;
  LayerCache cache;
};

struct AttendCall {
  const float* queries;     // [T, stride], the first H * D of each row
  int64_t stride;
  float* out;               // [T, out_stride]
  int64_t out_stride;
  int64_t num_heads;
  float scale;
  float cap;                // > 0: scores are cap * tanh(score / cap)
  int64_t window;           // 0: none
  LayerCache cache;
};

// Queries of one sequence and heads of one key head, over partitions of the context.
struct AttendItem {
  int64_t first_row;        // packed index of the sequence's first query
  int64_t first_position;   // its position
  int64_t first_query;
  int64_t last_query;
  int64_t kv_head;
  int64_t first_head;       // query heads, counted over the model
  int64_t num_heads;
  const int64_t* block_table;
  int64_t partition;        // -1: all of them, one after another
  float* partial;           // where one partition's state goes: [rows, 32 + padded D]

  int64_t num_rows() const { return (last_query - first_query) * num_heads; }
};

constexpr int64_t kTileTokens = 64;        // tokens between two rescalings of the softmax
constexpr int64_t kPartitionTokens = 256;  // tokens whose softmax is made apart, then joined
constexpr int64_t kMostRows = 48;          // queries times heads of one item

// Scratch of one thread for attention, in floats.
inline int64_t attend_scratch(int64_t head_dim) {
  const int64_t padded = (head_dim + 15) / 16 * 16;
  return 2 * kTileTokens * padded + 2 * kMostRows * (padded + 32) + kMostRows * padded + 1024;
}

struct SamplerLoops;  // sampler.h
struct MachineLoops;  // machine.h

struct Kernels {
  const char* name;
  void (*embed)(const EmbedCall&, int64_t first, int64_t last);
  void (*prepare)(const PrepareCall&, const Prepared&, int64_t first, int64_t last);
  void (*linear)(const LinearCall&, int64_t first_row, int64_t last_row, int64_t first_panel,
                 int64_t last_panel);
  void (*rope)(const RopeCall&, int64_t first, int64_t last);
  void (*attend)(const AttendCall&, const AttendItem&, float* scratch);
  void (*join)(const AttendCall&, const AttendItem&, int64_t num_partitions, const float* partials,
               float* scratch);
  void (*add_norm)(float* input, float* out, int64_t stride, int64_t width, const Norm&,
                   int64_t first, int64_t last);
  void (*norm)(float* rows, int64_t stride, int64_t width, const Norm&, int64_t first,
               int64_t last);
  void (*gate)(const float* gate, const float* up, float* out, int64_t stride, Epilogue epilogue,
               int64_t first, int64_t last);
  void (*softmax)(const float* values, float* out, int64_t count);
  // out = (out +) input * factor
  void (*add_scaled)(const float* input, float factor, float* out, int64_t width, bool is_added);
  // out += input * sigmoid(the first of the row's gates)
  void (*add_gated)(const float* input, const float* gates, int64_t gate_stride, float* out,
                    int64_t stride, int64_t first, int64_t last);
  const SamplerLoops* sampler;
  const MachineLoops* machine;
  bool has_parts;  // bfloat16 weights are multiplied with rows in two bfloat16 parts
};

// Blocks of 16 outputs that are computed together.
constexpr int64_t kPanelBlocks = 2;
// Rows of a tile of the matrix unit.
constexpr int64_t kTileRows = 16;

}  // namespace llmserve
