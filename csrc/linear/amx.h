#pragma once

#include "linear.h"

// Linear layers in bfloat16 on processors with AMX, only where amx_missing() is null.
namespace fastbert::linear {

// weight [features, depth], contiguous -> packed, of the same size, at an address that is a multiple of 64.
void amx_pack(const uint16_t* weight, uint16_t* packed, int64_t features, int64_t depth);

void amx_forward(const Linear<uint16_t>& args, int num_threads);

}  // namespace fastbert::linear
