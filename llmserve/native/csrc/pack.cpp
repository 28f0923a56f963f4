#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace llmserve {
namespace {

uint32_t spread(uint32_t nibbles) {  // four nibbles to four bytes
  nibbles = (nibbles | nibbles << 8) & 0x00ff00ffu;
  return (nibbles | nibbles << 4) & 0x0f0f0f0fu;
}

float to_float(const void* values, Number kind, int64_t place) {
  if (kind == Number::kFloat32) return static_cast<const float*>(values)[place];
  const uint16_t half = static_cast<const uint16_t*>(values)[place];
  uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  if (kind == Number::kFloat16) {
    const uint32_t exponent = (half >> 10) & 31u, fraction = half & 1023u;
    if (exponent == 0) {
      value = std::ldexp(static_cast<float>(fraction), -24);
      return (half & 0x8000u) != 0 ? -value : value;
    }
    bits = static_cast<uint32_t>(half & 0x8000u) << 16 | fraction << 13 |
           (exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23);
  }
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = value != value ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  return static_cast<uint16_t>(bits >> 16);
}

// Where a row's first chunk begins.
uint8_t* row_start(uint8_t* out, int64_t place, int64_t chunks) {
  return out + place / 16 * chunks * 64 + place % 16 * 4;
}

// A row's integers, group after group, into its places of the chunks.
void put_row(const int8_t* row, int bits, const Shape& shape, uint8_t* out) {
  const int64_t inputs = bits == 4 ? 8 : 4, chunks = shape.padded_group / inputs;
  int8_t group[8];
  for (int64_t g = 0; g < shape.num_groups(); ++g) {
    const int64_t size = std::min(shape.group_size, shape.width - g * shape.group_size);
    for (int64_t c = 0; c < chunks; ++c) {
      std::memset(group, 0, sizeof group);
      const int64_t count = std::clamp<int64_t>(size - c * inputs, 0, inputs);
      std::memcpy(group, row + g * shape.group_size + c * inputs, static_cast<size_t>(count));
      uint8_t* place = out + (g * chunks + c) * 64;
      for (int i = 0; i < 4; ++i)
        place[i] = bits == 4 ? static_cast<uint8_t>((group[i] + 8) | (group[i + 4] + 8) << 4)
                             : static_cast<uint8_t>(group[i] + 128);
    }
  }
}

// One group of 4 or 8 bits, as quant/groups.py rounds it. Returns its scale.
float round_group(const float* x, int64_t size, int bits, int8_t* out) {
  float above = 0.0f, below = 0.0f;
  for (int64_t i = 0; i < size; ++i) {
    above = std::max(above, x[i]);
    below = std::max(below, -x[i]);
  }
  const float largest = std::max(above, below);
  float scale = largest / 127.0f;
  int low = -127, high = 127;
  if (bits == 4) {
    low = -8, high = 7;
    scale = std::max(largest / 8.0f, std::min(above, below) / 7.5f);
    if (above > below) scale = -scale;
  }
  const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
  for (int64_t i = 0; i < size; ++i) {
    const float rounded = std::nearbyintf(x[i] * inverse);
    out[i] = static_cast<int8_t>(std::clamp(rounded, static_cast<float>(low),
                                            static_cast<float>(high)));
  }
  return scale;
}

template <typename T>
void put_per_group(const T* values, const Shape& shape, const Placement& placement, T* out) {
  const int64_t groups = shape.num_groups();
  for (int64_t row = 0; row < shape.out; ++row) {
    const int64_t place = placement.place(row);
    for (int64_t g = 0; g < groups; ++g)
      out[(place / 16 * groups + g) * 16 + place % 16] = values[row * groups + g];
  }
}

}  // namespace

void pack_words(const uint32_t* words, const Shape& shape, const Placement& placement,
                uint8_t* out) {
  const int64_t in_row = (shape.width + 7) / 8;
  const int64_t chunks = shape.padded_group / 8, groups = shape.num_groups();
  const bool is_whole = shape.group_size % 8 == 0;
  std::vector<int8_t> row_values(static_cast<size_t>(in_row * 8));
  for (int64_t row = 0; row < shape.out; ++row) {
    const uint32_t* in = words + row * in_row;
    uint8_t* place = row_start(out, placement.place(row), groups * chunks);
    if (is_whole && shape.width % 8 == 0) {  // a word is a chunk's share of the row
      for (int64_t i = 0; i < in_row; ++i, place += 64) {
        const uint32_t bytes = spread(in[i] & 0xffffu) | spread(in[i] >> 16) << 4;
        std::memcpy(place, &bytes, 4);
      }
      continue;
    }
    for (int64_t i = 0; i < in_row * 8; ++i)
      row_values[static_cast<size_t>(i)] =
          static_cast<int8_t>(static_cast<int>((in[i / 8] >> (i % 8 * 4)) & 15u) - 8);
    put_row(row_values.data(), 4, shape, place);
  }
}

void pack_integers(const int8_t* values, int bits, const Shape& shape, const Placement& placement,
                   const int32_t* order, uint8_t* out) {
  const int64_t chunks = shape.padded_group / (bits == 4 ? 8 : 4);
  std::vector<int8_t> ordered(static_cast<size_t>(shape.width));
  for (int64_t row = 0; row < shape.out; ++row) {
    const int8_t* in = values + row * shape.width;
    if (order != nullptr) {
      for (int64_t i = 0; i < shape.width; ++i) ordered[static_cast<size_t>(i)] = in[order[i]];
      in = ordered.data();
    }
    put_row(in, bits, shape, row_start(out, placement.place(row), shape.num_groups() * chunks));
  }
}

void pack_floats(const void* values, Number kind, const Shape& shape, const Placement& placement,
                 bool is_bfloat16, uint8_t* out) {
  const int64_t chunks = is_bfloat16 ? (shape.width + 1) / 2 : shape.width;
  for (int64_t row = 0; row < shape.out; ++row) {
    uint8_t* place = row_start(out, placement.place(row), chunks);
    for (int64_t k = 0; k < shape.width; ++k) {
      const float value = to_float(values, kind, row * shape.width + k);
      if (is_bfloat16) {
        const uint16_t half = to_bfloat16(value);
        std::memcpy(place + k / 2 * 64 + k % 2 * 2, &half, 2);
      } else {
        std::memcpy(place + k * 64, &value, 4);
      }
    }
  }
}

void pack_scales(const float* scales, const Shape& shape, const Placement& placement,
                 bool is_bfloat16, uint8_t* out) {
  if (!is_bfloat16) return put_per_group(scales, shape, placement, reinterpret_cast<float*>(out));
  std::vector<uint16_t> halves(static_cast<size_t>(shape.out * shape.num_groups()));
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = to_bfloat16(scales[i]);
  put_per_group(halves.data(), shape, placement, reinterpret_cast<uint16_t*>(out));
}

void pack_zeros(const uint8_t* zeros, const Shape& shape, const Placement& placement,
                uint8_t* out) {
  put_per_group(zeros, shape, placement, out);
}

bool quantize_floats(const void* values, Number kind, int bits, const Shape& shape,
                     const Placement& placement, uint8_t* out, float* scales) {
  const int64_t groups = shape.num_groups();
  const int64_t chunks = shape.num_groups() * (shape.padded_group / (bits == 4 ? 8 : 4));
  std::vector<float> row_values(static_cast<size_t>(shape.width));
  std::vector<int8_t> integers(static_cast<size_t>(shape.width));
  bool is_finite = true;
  for (int64_t row = 0; row < shape.out; ++row) {
    for (int64_t k = 0; k < shape.width; ++k) {
      const float value = to_float(values, kind, row * shape.width + k);
      is_finite = is_finite && value - value == 0.0f;
      row_values[static_cast<size_t>(k)] = value;
    }
    const int64_t place = placement.place(row);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = g * shape.group_size;
      scales[(place / 16 * groups + g) * 16 + place % 16] =
          round_group(row_values.data() + at, std::min(shape.group_size, shape.width - at), bits,
                      integers.data() + at);
    }
    put_row(integers.data(), bits, shape, row_start(out, place, chunks));
  }
  return is_finite;
}

}  // namespace llmserve
