#pragma once

#include <cstdint>

#include "../common/simd.h"
#include "../linear/linear.h"

// An encoder layer in inference on the host: from its states to the next layer's in one call.
// Devlin et al., arXiv:1810.04805, section 3; the layer is that of Vaswani et al., arXiv:1706.03762, section 3.1.
namespace fastbert::encoder_layer {

// T is float, or uint16_t that holds bfloat16.
template <typename T>
struct Weights {
  const T* packed;  // as linear::simd_pack or linear::amx_pack writes it
  const T* bias;    // or null
};

struct Norm {
  const void* weight;  // [hidden], float where float_parameters is set, otherwise T
  const void* bias;
  bool float_parameters;
  float eps;
};

template <typename T>
struct Layer {
  const T* x;  // [rows, hidden], contiguous
  T* y;        // [rows, hidden], x or apart from it; like all that is written, at a multiple of 64
  const int32_t* cu_seqlens;  // [sequences + 1], ascending from 0 to at most rows
  Weights<T> query_key_value, attention_output, intermediate, output;
  Norm attention_norm, output_norm;
  linear::Post gelu;
  T* scratch;  // [rows, scratch_columns(hidden, intermediate)]
  float* lse;  // [heads, rows]
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

// bfloat16, only where amx_missing() is null.
void amx_forward(const Layer<uint16_t>& layer, int num_threads);

// float32; `simd` must be at most simd_level().
void simd_forward(const Layer<float>& layer, Simd simd, int num_threads);

}  // namespace fastbert::encoder_layer
