#pragma once

#include <cstdint>

#include "macros.h"

// Philox4x32-7: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC'11).
// fastbert/backends/philox.py is the same function in PyTorch.
namespace fastbert {

constexpr int kDrawsPerCall = 8;  // 128 bits, 16 for each element
constexpr uint32_t kAttentionDraws = 1 << 15;

FASTBERT_HD void philox4x32_7(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
#if defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC unroll 7
#else
#pragma unroll
#endif
  for (int round = 0; round < 7; ++round) {
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
  philox4x32_7(w0, w1, w2, w3, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// The four words that serve queries q and q + 8 and keys k, k + 1, k + 8 and k + 9 of one head, with
// query_group = 8 * (q / 16) + q % 8, q & 8 = 0, and key_group = 4 * (k / 16) + k % 8 / 2, k & 9 = 0.
// Word 2 * i + j serves query q + 8 * i and keys k + 8 * j, with its low half, and k + 8 * j + 1.
FASTBERT_HD void attention_words(uint64_t seed, int64_t sequence, int64_t head, int64_t query_group,
                                 int64_t key_group, uint32_t& w0, uint32_t& w1, uint32_t& w2, uint32_t& w3) {
  w0 = static_cast<uint32_t>(head);
  w1 = static_cast<uint32_t>(key_group);
  w2 = static_cast<uint32_t>(sequence);
  w3 = static_cast<uint32_t>(query_group);
  philox4x32_7(w0, w1, w2, w3, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// Which draws keep a probability of attention: of their 15 bits' 32768 values the `kept` largest where that is half of
// them at least, otherwise the `kept` lowest.
class AttentionKeep {
 public:
  FASTBERT_HD explicit AttentionKeep(uint32_t kept)
      : few_(kept < kAttentionDraws / 2), bound_(static_cast<uint16_t>(few_ ? kept : kAttentionDraws - kept)) {}

  // half: the draw and one more bit.
  FASTBERT_HD bool operator()(uint16_t half) const { return ((half & 0x7FFF) >= bound_) != few_; }

 private:
  bool few_;
  uint16_t bound_;
};

}  // namespace fastbert
