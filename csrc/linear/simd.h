#pragma once

#include "../common/simd.h"
#include "linear.h"

// Linear layers in float32 on processors with AVX2 or AVX-512. `simd` must be at most simd_level().
namespace fastbert::linear {

// weight [features, depth], contiguous -> packed, of the same size, at an address that is a multiple of 64.
void simd_pack(const float* weight, float* packed, int64_t features, int64_t depth, Simd simd);

void simd_forward(const Linear<float>& args, Simd simd, int num_threads);

}  // namespace fastbert::linear
