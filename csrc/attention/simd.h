#pragma once

#include "../common/simd.h"
#include "attention.h"

namespace fastbert::attention {

// On processors with AVX2 or AVX-512: `simd` must be at most simd_level(). cu_seqlens must ascend from 0 to at most
// rows.
void simd_forward(const Packed<float>& args, Simd simd, int num_threads);

}  // namespace fastbert::attention
