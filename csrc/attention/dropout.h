#pragma once

#include <cstdint>

// Dropout of attention probabilities on the host: p *= scale * mask, in place.
// mask = AttentionKeep(threshold) of the draw of (seed, sequence, head, query, key), both as in common/philox.h.
namespace fastbert::attention {

struct Dropout {
  float* probabilities;    // [sequences, heads, queries, keys], contiguous
  int64_t first_sequence;  // index in the batch of the first of them
  int64_t sequences;
  int64_t heads;
  int64_t queries;
  int64_t keys;
  int64_t seed;
  uint32_t threshold;
  float scale;
};

void dropout_host(const Dropout& args, int num_threads);

}  // namespace fastbert::attention
