#pragma once

namespace fastbert {

// How this extension was built. Without CUDA kernels, cuda_absent says why there are none, and the other two are null.
struct Build {
  const char* version;
  const char* compiler;
  const char* cuda_version;
  const char* cuda_architectures;
  const char* cuda_absent;
};

Build this_build();

}  // namespace fastbert
