#pragma once

#include "attention.h"

namespace fastbert::attention {

// Only where amx_missing() is null. cu_seqlens must ascend from 0 to at most rows.
void amx_forward(const Packed<uint16_t>& args, int num_threads);

}  // namespace fastbert::attention
