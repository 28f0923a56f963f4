// The kernels for AVX2 with FMA.
#include "machine.h"
#include "paths.h"
#include "sampler.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define PATH_NAME "avx2"
#define PATH_VECTOR_BYTES 32
namespace llmserve::avx2 {
#include "simd_x86.h"
#include "simd_avx2.h"

#include "path.h"
}  // namespace llmserve::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const llmserve::Kernels* llmserve::avx2_kernels() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return nullptr;
  return &avx2::kKernels;
}
#else
const llmserve::Kernels* llmserve::avx2_kernels() { return nullptr; }
#endif
