// What the machine can do at most, for comparing kernels with it (benchmarks/kernels.py).
#pragma once
#include <cstdint>

#include "types.h"

namespace llmserve {

constexpr int64_t kRounds = 2048;  // of one call
constexpr int64_t kLines = 16;     // of weights, 64 bytes each

// What the loops multiply; sums stay far from the end of an int32.
struct Operands {
  alignas(64) uint8_t weights[64 * kLines];
  alignas(64) float floats[16 * kLines];
  int32_t rows[16];  // four bytes of a row each
  float factor;
};

// The loops of one instruction set (machine_loops.h).
struct MachineLoops {
  float (*read)(const uint8_t* memory, int64_t num_bytes);
  float (*int4_dots)(const Operands&);
  float (*int8_dots)(const Operands&);
  float (*floats)(const Operands&);
  double num_dots;    // multiply-adds of one call
  double num_floats;
};

// Per second, of all threads together. A multiply-add counts as one operation.
struct MachineRates {
  double read_bytes;  // from the memory given
  double int4_dots;   // multiply-adds of 4-bit weights with int8, by the path's instructions
  double int8_dots;   // of 8-bit weights with int8
  double floats;      // of float32
};

// The best of some rounds. `memory` should exceed the cache; it is only read.
MachineRates measure_machine(const Kernels& kernels, int num_threads, const uint8_t* memory,
                             int64_t num_bytes);

}  // namespace llmserve
