// The kernels for AVX-512 with VNNI.
#include "machine.h"
#include "paths.h"
#include "sampler.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi2")
#endif

#define PATH_NAME "avx512"
#define PATH_VECTOR_BYTES 64
namespace llmserve::avx512 {
#include "simd_x86.h"
#include "simd_avx512.h"

#include "path.h"
}  // namespace llmserve::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const llmserve::Kernels* llmserve::avx512_kernels() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512vnni"))
    return nullptr;
  return &avx512::kKernels;
}
#else
const llmserve::Kernels* llmserve::avx512_kernels() { return nullptr; }
#endif
