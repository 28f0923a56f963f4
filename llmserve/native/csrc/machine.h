// What the machine can do at most, for comparing kernels with it (benchmarks/kernels.py).
#pragma once
#include <cstdint>

#include "types.h"

namespace llmserve {

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
