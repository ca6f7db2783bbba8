#pragma once

#include <cstdint>

#include "dropout.h"
#include "philox.h"
#include "vector.cuh"

namespace fastbert {

static_assert(kGroup == kDrawsPerCall, "one call of Philox serves a group");

// The words that serve elements first .. first + 7, from two calls of Philox where they straddle a group.
__device__ __forceinline__ void draw(uint64_t seed, int64_t first, uint32_t (&words)[kGroup / 2]) {
  hidden_words(seed, first / kGroup, words[0], words[1], words[2], words[3]);
  const int offset = static_cast<int>(first % kGroup);
  if (offset == 0) return;
  uint32_t all[kGroup] = {words[0], words[1], words[2], words[3]};
  hidden_words(seed, first / kGroup + 1, all[4], all[5], all[6], all[7]);
  // Shifts by 4, 2 and 1 draws: an index known at run time would send the words to local memory.
  if (offset & 4) {
#pragma unroll
    for (int i = 0; i < 6; ++i) all[i] = all[i + 2];
  }
  if (offset & 2) {
#pragma unroll
    for (int i = 0; i < 5; ++i) all[i] = all[i + 1];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = offset & 1 ? all[i] >> 16 | all[i + 1] << 16 : all[i];
}

__device__ __forceinline__ void drop_group(float (&values)[kGroup], const uint32_t (&words)[kGroup / 2],
                                           const Dropout& dropout) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const uint32_t draw = i % 2 == 0 ? words[i / 2] & 0xFFFFu : words[i / 2] >> 16;
    values[i] = drop(values[i], draw < dropout.threshold, dropout.scale);
  }
}

}  // namespace fastbert
