// The kernels in plain C++, for processors without a path of their own.
#include "machine.h"
#include "paths.h"
#include "sampler.h"

#include <cstring>

#define PATH_NAME "portable"
#define PATH_VECTOR_BYTES 16
namespace llmserve::portable {
#include "simd_portable.h"

#include "path.h"
}  // namespace llmserve::portable

const llmserve::Kernels* llmserve::portable_kernels() { return &portable::kKernels; }

const llmserve::Kernels* llmserve::find_kernels(const char* name) {
  const Kernels* const paths[] = {amx_kernels(), avx512_kernels(), avx2_kernels(), neon_kernels(),
                                 portable_kernels()};
  for (const Kernels* path : paths)
    if (path != nullptr && (std::strcmp(name, "auto") == 0 || std::strcmp(name, path->name) == 0))
      return path;
  return nullptr;
}
