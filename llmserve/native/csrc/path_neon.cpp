// The kernels for Arm: NEON with dot products of bytes (Arm v8.2: Apple M1, Graviton 2, Cortex-A76).
#include "machine.h"
#include "paths.h"
#include "sampler.h"

#include <cstring>

#if defined(__aarch64__) && (defined(__linux__) || defined(__APPLE__))
#include <arm_neon.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#define PATH_NAME "neon"
#define PATH_VECTOR_BYTES 16
namespace llmserve::neon {
#include "simd_neon.h"

#include "path.h"
}  // namespace llmserve::neon

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const llmserve::Kernels* llmserve::neon_kernels() {
#if defined(__linux__)
  if ((getauxval(AT_HWCAP) & HWCAP_ASIMDDP) == 0) return nullptr;
#endif
  return &neon::kKernels;
}
#else
const llmserve::Kernels* llmserve::neon_kernels() { return nullptr; }
#endif
