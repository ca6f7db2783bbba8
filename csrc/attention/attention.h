#pragma once

#include <cstdint>

namespace fastbert::attention {

// Attention of packed sequences without dropout. T is float, or uint16_t that holds bfloat16. Rows of no sequence
// become zeros.
template <typename T>
struct Packed {
  const T* qkv;               // [rows, 3, heads, size], contiguous
  const int32_t* cu_seqlens;  // [sequences + 1]
  T* out;                     // [rows, heads, size]
  float* lse;                 // [heads, rows]
  int64_t rows;
  int64_t sequences;
  int64_t heads;
  int64_t size;
  float scale;
};

}  // namespace fastbert::attention
