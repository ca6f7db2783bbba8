#include "amx.h"

#include "../attention/amx.h"
#include "../bias_dropout_residual_layer_norm/bias_dropout_residual_layer_norm.h"
#include "../common/dropout.h"
#include "../common/dtype.h"

namespace fastbert::encoder_layer {
namespace {

void multiply(const uint16_t* x, const Weights& weights, uint16_t* y, int64_t rows, int64_t depth, int64_t features,
              linear::Post post, int num_threads) {
  linear::amx_forward({x, weights.packed, weights.bias, nullptr, y, rows, depth, features, post}, num_threads);
}

void add_and_normalise(const uint16_t* x, const uint16_t* residual, const Norm& norm, uint16_t* y, int64_t rows,
                       int64_t hidden, int num_threads) {
  namespace fused = bias_dropout_residual_layer_norm;
  const auto states = [](const uint16_t* p) { return reinterpret_cast<const BFloat16*>(p); };
  fused::forward_host(
      fused::Forward<BFloat16>{states(x), nullptr, states(residual), norm.weight, norm.bias, norm.float_parameters,
                               norm.eps, reinterpret_cast<BFloat16*>(y), nullptr, nullptr, nullptr, rows, hidden,
                               Dropout{nullptr, kKeepAll, 1.0f}},
      num_threads);
}

}  // namespace

void amx_forward(const Layer& a, int num_threads) {
  uint16_t* context = a.scratch;
  uint16_t* product = context + a.rows * a.hidden;
  uint16_t* attended = product + a.rows * a.hidden;
  uint16_t* first = attended + a.rows * a.hidden;  // query, key and value, then the intermediate states
  multiply(a.x, a.query_key_value, first, a.rows, a.hidden, 3 * a.hidden, linear::Post::kNone, num_threads);
  attention::amx_forward({first, a.cu_seqlens, context, a.lse, a.rows, a.sequences, a.heads, a.hidden / a.heads,
                          a.scale},
                         num_threads);
  multiply(context, a.attention_output, product, a.rows, a.hidden, a.hidden, linear::Post::kNone, num_threads);
  add_and_normalise(product, a.x, a.attention_norm, attended, a.rows, a.hidden, num_threads);
  multiply(attended, a.intermediate, first, a.rows, a.hidden, a.features, a.gelu, num_threads);
  multiply(first, a.output, product, a.rows, a.features, a.hidden, linear::Post::kNone, num_threads);
  add_and_normalise(product, attended, a.output_norm, a.y, a.rows, a.hidden, num_threads);
}

}  // namespace fastbert::encoder_layer
