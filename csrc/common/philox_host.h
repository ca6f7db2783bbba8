#pragma once

#include <cstdint>
#include <cstring>

#include "philox.h"

namespace fastbert {

constexpr int kDrawsPerRun = 128;
constexpr int kKeysPerRun = kDrawsPerRun / 2;

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

// The halves of words that serve keys 16 * block .. 16 * block + count - 1 of the two queries of query_group: those of
// the first query in halves[0]. There must be room for count rounded up to a multiple of kKeysPerRun.
FASTBERT_HD void attention_draws(uint64_t seed, int64_t sequence, int64_t head, int64_t query_group, int64_t block,
                                 int64_t count, uint16_t* const (&halves)[2]) {
  constexpr int kCalls = kDrawsPerRun / kDrawsPerCall;
  for (int64_t done = 0; done < count; done += kKeysPerRun, block += kCalls / 4) {
    uint32_t words[4][kCalls];
    for (int call = 0; call < kCalls; ++call) {
      attention_words(seed, sequence, head, query_group, 4 * block + call, words[0][call], words[1][call],
                      words[2][call], words[3][call]);
    }
    for (int word = 0; word < 4; ++word) {
      for (int first = 0; first < kCalls; first += 4) {
        memcpy(halves[word / 2] + done + 4 * first + 8 * (word % 2), words[word] + first, 16);
      }
    }
  }
}

}  // namespace fastbert
