#pragma once

#include <cstdint>

// Attention of packed sequences in bfloat16 on processors with AMX, without dropout.
namespace fastbert::attention {

struct Packed {
  const uint16_t* qkv;        // bfloat16 [rows, 3, heads, size], contiguous
  const int32_t* cu_seqlens;  // [sequences + 1]
  uint16_t* out;              // bfloat16 [rows, heads, size]
  float* lse;                 // [heads, rows]
  int64_t rows;
  int64_t sequences;
  int64_t heads;
  int64_t size;
  float scale;
};

// Only where amx_missing() is null. cu_seqlens must ascend from 0 to at most rows. Rows of no sequence become zeros.
void amx_forward(const Packed& args, int num_threads);

}  // namespace fastbert::attention
