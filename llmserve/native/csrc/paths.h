// The instruction sets that were compiled, and which of them this processor has.
#pragma once
#include "types.h"

#define INLINE static inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace llmserve {

// The kernels of a path, or null if this build or this processor does not have it.
const Kernels* amx_kernels();
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* neon_kernels();
const Kernels* portable_kernels();

// By name; null if it is not to be had. "auto" is the best one.
const Kernels* find_kernels(const char* name);

}  // namespace llmserve
