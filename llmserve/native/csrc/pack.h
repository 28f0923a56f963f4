// Weights put into the layout that the kernels read, in blocks of 16 outputs.
//
// - int4: for every 8 inputs of a group 64 bytes: byte 4 * lane + i holds input i in its low and
//   input i + 4 in its high nibble, as stored (0..15, 8 in the middle where there are no zeros);
// - int8: for every 4 inputs of a group 64 bytes: byte 4 * lane + i holds input i, 128 on top;
// - bfloat16: for every 2 inputs 64 bytes: 16 pairs; float32: for every input 16 numbers;
// - scales and zeros: [blocks, groups, 16].
//
// Groups are padded to whole chunks. Row r of a matrix goes to output row `place(r)`: behind `start`
// others, or (gated feed-forwards) in every other block, so that gate and input are computed
// together.
#pragma once
#include <cstdint>

#include "types.h"

namespace llmserve {

struct Placement {
  int64_t start;
  int64_t is_gated;  // 0: row start + r; 1: blocks 0, 2, 4 ...; 2: blocks 1, 3, 5 ...

  int64_t place(int64_t row) const {
    return is_gated == 0 ? start + row : row / 16 * 32 + (is_gated - 1) * 16 + row % 16;
  }
};

struct Shape {
  int64_t out, width;
  int64_t group_size, padded_group;  // inputs of one scale, and with their padding

  int64_t num_groups() const { return (width + group_size - 1) / group_size; }
};

// compressed-tensors' int4 words [out, ceil(width / 8)], first input lowest.
void pack_words(const uint32_t* words, const Shape&, const Placement&, uint8_t* out);
// int8 [out, width], for 4 bits of values -8..7. `order`: input that comes k-th, or null.
void pack_integers(const int8_t* values, int bits, const Shape&, const Placement&,
                   const int32_t* order, uint8_t* out);
// Floats of a kind [out, width] → the blocks of bfloat16 or float32.
void pack_floats(const void* values, Number kind, const Shape&, const Placement&,
                 bool is_bfloat16, uint8_t* out);
// Numbers of each row and group, [out, groups] float32 → float32 or bfloat16 (exact ones).
void pack_scales(const float* scales, const Shape&, const Placement&, bool is_bfloat16,
                 uint8_t* out);
void pack_zeros(const uint8_t* zeros, const Shape&, const Placement&, uint8_t* out);
// Rounds floats to the nearest integers of 8 bits (scale: largest / 127) or 4 (llmserve/quant/
// groups.py) and packs them, with their float32 scales. Returns whether all were finite.
bool quantize_floats(const void* values, Number kind, int bits, const Shape&, const Placement&,
                     uint8_t* out, float* scales);

}  // namespace llmserve
