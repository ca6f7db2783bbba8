#pragma once

#include <cstdint>

#include "macros.h"

namespace fastbert {

// The dropout of one call. threshold of 65536 draws can be kept: at 65536 nothing is dropped and seed may be null.
// seed is an address in the memory of the device that computes, so that a CUDA graph replays with a new seed.
struct Dropout {
  const int64_t* seed;
  uint32_t threshold;
  float scale;
};

constexpr uint32_t kKeepAll = 65536;

// One rounding for each operation: a fused multiply-add would not agree with eager PyTorch.
// (The host is compiled with -ffp-contract=off.)
FASTBERT_HD float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

FASTBERT_HD float drop(float value, bool keep, float scale) { return keep ? multiply(value, scale) : 0.0f; }

}  // namespace fastbert
