// The matrix unit's instructions in plain C++, as Intel describes them (Software Developer's Manual,
// volume 2, LDTILECFG, TDPBF16PS and TDPBSSD), for processors without the unit.
#pragma once

namespace emulated {

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

inline thread_local Config config;
alignas(64) inline thread_local uint8_t tiles[8][16][64];

inline void configure(const void* from) {
  memcpy(&config, from, sizeof config);
  memset(tiles, 0, sizeof tiles);
}

inline void load(int tile, const void* from, int64_t stride) {
  memset(tiles[tile], 0, sizeof tiles[tile]);
  for (int row = 0; row < config.rows[tile]; ++row)
    memcpy(tiles[tile][row], static_cast<const uint8_t*>(from) + row * stride,
           config.row_bytes[tile]);
}

inline void store(int tile, void* to, int64_t stride) {
  for (int row = 0; row < config.rows[tile]; ++row)
    memcpy(static_cast<uint8_t*>(to) + row * stride, tiles[tile][row], config.row_bytes[tile]);
}

template <typename WeightByte>
void add_dots(int sums, int rows, int weights) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      uint32_t sum;
      memcpy(&sum, tiles[sums][m] + 4 * n, 4);
      for (int k = 0; k < 64; ++k) {
        const int32_t x = static_cast<int8_t>(tiles[rows][m][k]);
        const int32_t y = static_cast<WeightByte>(tiles[weights][k / 4][4 * n + k % 4]);
        sum += static_cast<uint32_t>(x * y);
      }
      memcpy(tiles[sums][m] + 4 * n, &sum, 4);
    }
}

inline float widen(const uint8_t* bytes) {
  uint16_t half;
  memcpy(&half, bytes, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return __builtin_fabsf(value) < 1.17549435e-38f ? 0.0f : value;  // denormals are zeros
}

inline void add_bf16_dots(int sums, int rows, int weights) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float part[2] = {0.0f, 0.0f}, sum;
      for (int k = 0; k < 32; ++k)
        part[k % 2] = __builtin_fmaf(widen(tiles[rows][m] + 2 * k),
                                     widen(tiles[weights][k / 2] + 4 * n + 2 * (k % 2)),
                                     part[k % 2]);
      memcpy(&sum, tiles[sums][m] + 4 * n, 4);
      sum += part[0] + part[1];
      memcpy(tiles[sums][m] + 4 * n, &sum, 4);
    }
}

}  // namespace emulated

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbsud
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) emulated::configure(from)
#define _tile_release() static_cast<void>(0)
#define _tile_zero(tile) memset(emulated::tiles[tile], 0, 1024)
#define _tile_loadd(tile, from, stride) emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::store(tile, to, stride)
#define _tile_dpbssd(sums, rows, weights) emulated::add_dots<int8_t>(sums, rows, weights)
#define _tile_dpbsud(sums, rows, weights) emulated::add_dots<uint8_t>(sums, rows, weights)
#define _tile_dpbf16ps(sums, rows, weights) emulated::add_bf16_dots(sums, rows, weights)
