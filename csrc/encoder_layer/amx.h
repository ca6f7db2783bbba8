#pragma once

#include <cstdint>

#include "../linear/amx.h"

// An encoder layer in inference, in bfloat16 on processors with AMX: from its states to the next layer's in one call.
// Devlin et al., arXiv:1810.04805, section 3; the layer is that of Vaswani et al., arXiv:1706.03762, section 3.1.
namespace fastbert::encoder_layer {

struct Weights {
  const uint16_t* packed;  // as linear::amx_pack writes it
  const uint16_t* bias;    // bfloat16, or null
};

struct Norm {
  const void* weight;  // [hidden], float32 where float_parameters is set, otherwise bfloat16
  const void* bias;
  bool float_parameters;
  float eps;
};

struct Layer {
  const uint16_t* x;  // bfloat16 [rows, hidden], contiguous
  uint16_t* y;        // bfloat16 [rows, hidden]; like all that is written, at an address that is a multiple of 64
  const int32_t* cu_seqlens;  // [sequences + 1]
  Weights query_key_value, attention_output, intermediate, output;
  Norm attention_norm, output_norm;
  linear::Post gelu;
  uint16_t* scratch;  // bfloat16 [rows, scratch_columns(hidden, intermediate)]
  float* lse;         // [heads, rows]
  int64_t rows;
  int64_t sequences;
  int64_t heads;
  int64_t hidden;
  int64_t features;  // of the intermediate states
  float scale;
};

// Query, key and value make room for the intermediate states once attention is done.
inline int64_t scratch_columns(int64_t hidden, int64_t features) {
  return (3 * hidden > features ? 3 * hidden : features) + 3 * hidden;
}

// Only where amx_missing() is null. cu_seqlens must ascend from 0 to at most rows.
void amx_forward(const Layer& layer, int num_threads);

}  // namespace fastbert::encoder_layer
