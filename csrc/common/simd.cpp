#include "simd.h"

#include "processor.h"

namespace fastbert {

int simd_level() {
#if defined(FASTBERT_HAVE_SIMD)
  static const int level = [] {
    const Processor processor = this_processor();
    return has_v4(processor) ? 4 : has_v3(processor) ? 3 : 0;
  }();
  return level;
#else
  return 0;
#endif
}

}  // namespace fastbert
