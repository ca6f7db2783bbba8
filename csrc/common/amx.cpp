#include "amx.h"

#include "processor.h"

#if defined(FASTBERT_HAVE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastbert {

#if !defined(FASTBERT_HAVE_AMX)

const char* amx_missing() { return "the compiler that built fastbert._C has no AMX instructions for Linux on x86-64"; }

#else

const char* amx_missing() {
  static const char* const reason = [] () -> const char* {
    if (!has_amx(this_processor())) return "this processor has no AMX instructions for bfloat16";
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
