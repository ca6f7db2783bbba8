#pragma once

#include <cstdint>
#include <cstring>

#include "philox.h"

namespace fastbert {

constexpr int kDrawsPerRun = 128;

// The 16-bit draws of elements 8 * group .. 8 * group + count - 1. They are drawn in runs of kDrawsPerRun, so draws
// needs room for count rounded up to a multiple of it. (A word's low half comes first: little-endian.)
FASTBERT_HD void hidden_draws(uint64_t seed, int64_t group, int64_t count, uint16_t* draws) {
  constexpr int kCalls = kDrawsPerRun / kDrawsPerCall;
  for (int64_t done = 0; done < count; done += kDrawsPerRun, group += kCalls) {
    uint32_t words[kCalls][4];
    for (int call = 0; call < kCalls; ++call) {
      hidden_words(seed, group + call, words[call][0], words[call][1], words[call][2], words[call][3]);
    }
    memcpy(draws + done, words, sizeof words);
  }
}

// The same for keys 8 * group .. 8 * group + count - 1 of one query.
FASTBERT_HD void attention_draws(uint64_t seed, int64_t sequence, int64_t head, int64_t query, int64_t group,
                                 int64_t count, uint16_t* draws) {
  constexpr int kCalls = kDrawsPerRun / kDrawsPerCall;
  for (int64_t done = 0; done < count; done += kDrawsPerRun, group += kCalls) {
    uint32_t words[kCalls][4];
    for (int call = 0; call < kCalls; ++call) {
      attention_words(seed, sequence, head, query, group + call, words[call][0], words[call][1], words[call][2],
                      words[call][3]);
    }
    memcpy(draws + done, words, sizeof words);
  }
}

}  // namespace fastbert
