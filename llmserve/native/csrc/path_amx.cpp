// The kernels for AMX: those for AVX-512, with products of many rows on the matrix unit.
#include "aligned.h"
#include "machine.h"
#include "paths.h"
#include "sampler.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi2,amx-tile,amx-int8,amx-bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,bmi2,amx-tile,amx-int8,amx-bf16")
#endif

#ifdef LLMSERVE_EMULATED_TILES
#include LLMSERVE_EMULATED_TILES
#endif
#pragma GCC diagnostic ignored "-Wunused-function"  // what others do with rows alone
#define PATH_VECTOR_BYTES 64
namespace llmserve::amx {
#include "simd_x86.h"
#include "simd_avx512.h"

#include "math.h"
#include "prepare.h"
#include "linear.h"
#include "linear_amx.h"
}  // namespace llmserve::amx

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace {

// The processor has it, and the system lets this process use the tiles' registers.
bool has_amx() {
#ifdef LLMSERVE_EMULATED_TILES
  return true;
#else
  unsigned eax, ebx, ecx, edx;
  asm volatile("cpuid" : "=a"(eax), "=b"(ebx), "=c"(ecx), "=d"(edx) : "a"(7), "c"(0));
  constexpr unsigned kAll = 1u << 22 | 1u << 24 | 1u << 25;  // bfloat16, tiles, int8
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, asm/fpu/types.h
  return (edx & kAll) == kAll &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
}

}  // namespace

const llmserve::Kernels* llmserve::amx_kernels() {
  static const Kernels kernels = [] {
    Kernels all{};
    if (avx512_kernels() == nullptr || !has_amx()) return all;
    all = *avx512_kernels();
    all.name = "amx";
    all.linear = amx::linear_amx;
    all.has_parts = true;
    static const MachineLoops loops = [] {
      MachineLoops same = *avx512_kernels()->machine;
      same.int4_dots = same.int8_dots = amx::multiply_tiles;
      same.num_dots = 4.0 * 16 * 16 * 64 * amx::kTileRounds;
      return same;
    }();
    all.machine = &loops;
    return all;
  }();
  return kernels.name == nullptr ? nullptr : &kernels;
}
#else
const llmserve::Kernels* llmserve::amx_kernels() { return nullptr; }
#endif
