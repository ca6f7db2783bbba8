#include "build.h"

// A file of its own: another version or choice of CUDA compiles nothing else again.
namespace fastbert {

Build this_build() {
#if defined(FASTBERT_HAVE_CUDA)
  return {FASTBERT_VERSION, FASTBERT_COMPILER, FASTBERT_CUDA_VERSION, FASTBERT_CUDA_ARCHITECTURES, nullptr};
#else
  return {FASTBERT_VERSION, FASTBERT_COMPILER, nullptr, nullptr, FASTBERT_CUDA_ABSENT};
#endif
}

}  // namespace fastbert
