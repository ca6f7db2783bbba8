#include "amx.h"

#if defined(FASTBERT_HAVE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastbert {

#if !defined(FASTBERT_HAVE_AMX)

const char* amx_missing() { return "the compiler that built fastbert._C has no AMX instructions for Linux on x86-64"; }

#else

namespace {

bool has_instructions() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool amx = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
  if (!amx || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return false;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && (a >> 5 & 1);  // AVX512-BF16
}

}  // namespace

const char* amx_missing() {
  static const char* const reason = [] () -> const char* {
    if (!has_instructions()) return "this processor has no AMX instructions for bfloat16";
    // Linux gives a process the tiles' registers when it asks for them (Documentation/arch/x86/xstate.rst).
    constexpr int kRequestPermission = 0x1023;
    constexpr int kTileData = 18;
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) {
      return "the kernel does not let this process use the AMX registers";
    }
    return nullptr;
  }();
  return reason;
}

#endif

}  // namespace fastbert
