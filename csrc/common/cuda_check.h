#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace fastbert {

// Throws std::runtime_error if error isn't cudaSuccess; after a launch, pass cudaGetLastError().
inline void check_cuda(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forget it: a later check must not report it again
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

}  // namespace fastbert
