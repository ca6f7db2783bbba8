#include "simd.h"

namespace fastbert {

int simd_level() {
#if defined(FASTBERT_HAVE_SIMD)
  static const int level = [] {
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    return v3 ? v4 ? 4 : 3 : 0;
  }();
  return level;
#else
  return 0;
#endif
}

}  // namespace fastbert
