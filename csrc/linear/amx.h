#pragma once

#include <cstdint>

// y = f(x Wᵀ + bias) in bfloat16 on processors with AMX, only where amx_missing() is null.
// f is nothing, GELU (Hendrycks and Gimpel, arXiv:1606.08415), or the addition of another tensor.
namespace fastbert::linear {

enum class Post : int { kNone = 0, kGeluErf = 1, kGeluTanh = 2, kAdd = 3 };

// Sums and features come in whole tiles.
constexpr int64_t kMultiple = 32;

struct Linear {
  const uint16_t* x;       // bfloat16 [rows, depth], contiguous
  const uint16_t* weight;  // bfloat16, as amx_pack writes it
  const uint16_t* bias;    // bfloat16 [features], or null
  const uint16_t* other;   // bfloat16 [rows, features], contiguous: what kAdd adds
  uint16_t* y;             // bfloat16 [rows, features], at an address that is a multiple of 64
  int64_t rows;
  int64_t depth;
  int64_t features;
  Post post;
};

// weight, bfloat16 [features, depth], contiguous -> packed, of the same size, at an address that is a multiple of 64.
void amx_pack(const uint16_t* weight, uint16_t* packed, int64_t features, int64_t depth);

void amx_forward(const Linear& args, int num_threads);

}  // namespace fastbert::linear
