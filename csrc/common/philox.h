#pragma once

#include <cstdint>

#include "macros.h"

// Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC'11).
// fastbert/backends/philox.py is the same function in PyTorch.
namespace fastbert {

constexpr int kDrawsPerCall = 8;  // 128 bits, 16 for each element

FASTBERT_HD void philox4x32_10(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
#if defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC unroll 10
#else
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// The four words that serve elements 8 * group .. 8 * group + 7 of a hidden state.
FASTBERT_HD void hidden_words(uint64_t seed, int64_t group, uint32_t& w0, uint32_t& w1, uint32_t& w2, uint32_t& w3) {
  w0 = static_cast<uint32_t>(group);
  w1 = static_cast<uint32_t>(group >> 32);
  w2 = 0;
  w3 = 0;
  philox4x32_10(w0, w1, w2, w3, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// The four words that serve keys 8 * group .. 8 * group + 7 of one query.
FASTBERT_HD void attention_words(uint64_t seed, int64_t sequence, int64_t head, int64_t query, int64_t group,
                                 uint32_t& w0, uint32_t& w1, uint32_t& w2, uint32_t& w3) {
  w0 = static_cast<uint32_t>(group);
  w1 = static_cast<uint32_t>(query);
  w2 = static_cast<uint32_t>(head);
  w3 = static_cast<uint32_t>(sequence);
  philox4x32_10(w0, w1, w2, w3, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

}  // namespace fastbert
