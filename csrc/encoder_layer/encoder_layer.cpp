#include "encoder_layer.h"

#include <type_traits>

#include "../attention/amx.h"
#include "../attention/simd.h"
#include "../bias_dropout_residual_layer_norm/bias_dropout_residual_layer_norm.h"
#include "../common/dropout.h"
#include "../common/dtype.h"
#include "../linear/amx.h"
#include "../linear/simd.h"

namespace fastbert::encoder_layer {
namespace {

// The kernels of a layer in one dtype.
struct Amx {
  int num_threads;
  void multiply(const linear::Linear<uint16_t>& args) const { linear::amx_forward(args, num_threads); }
  void attend(const attention::Packed<uint16_t>& args) const { attention::amx_forward(args, num_threads); }
};

struct Vectors {
  Simd simd;
  int num_threads;
  void multiply(const linear::Linear<float>& args) const { linear::simd_forward(args, simd, num_threads); }
  void attend(const attention::Packed<float>& args) const { attention::simd_forward(args, simd, num_threads); }
};

template <typename T>
void add_and_normalise(const T* x, const T* residual, const Norm& norm, T* y, int64_t rows, int64_t hidden,
                       int num_threads) {
  namespace fused = bias_dropout_residual_layer_norm;
  using State = std::conditional_t<std::is_same_v<T, float>, float, BFloat16>;
  const auto states = [](const T* p) { return reinterpret_cast<const State*>(p); };
  fused::forward_host(
      fused::Forward<State>{states(x), nullptr, states(residual), norm.weight, norm.bias, norm.float_parameters,
                            norm.eps, reinterpret_cast<State*>(y), nullptr, nullptr, nullptr, rows, hidden,
                            Dropout{nullptr, kKeepAll, 1.0f}},
      num_threads);
}

template <typename T, typename Kernels>
void forward(const Layer<T>& a, const Kernels& kernels) {
  const auto multiply = [&](const T* x, const Weights<T>& weights, T* y, int64_t depth, int64_t features,
                            linear::Post post) {
    kernels.multiply({x, weights.packed, weights.bias, nullptr, y, a.rows, depth, features, post});
  };
  const auto add_and_normalise = [&](const T* x, const T* residual, const Norm& norm, T* y) {
    encoder_layer::add_and_normalise(x, residual, norm, y, a.rows, a.hidden, kernels.num_threads);
  };
  T* context = a.scratch;
  T* product = context + a.rows * a.hidden;
  T* attended = product + a.rows * a.hidden;
  T* first = attended + a.rows * a.hidden;  // query, key and value, then the intermediate states
  multiply(a.x, a.query_key_value, first, a.hidden, 3 * a.hidden, linear::Post::kNone);
  kernels.attend({first, a.cu_seqlens, context, a.lse, a.rows, a.sequences, a.heads, a.hidden / a.heads, a.scale});
  multiply(context, a.attention_output, product, a.hidden, a.hidden, linear::Post::kNone);
  add_and_normalise(product, a.x, a.attention_norm, attended);
  multiply(attended, a.intermediate, first, a.hidden, a.features, a.gelu);
  multiply(first, a.output, product, a.features, a.hidden, linear::Post::kNone);
  add_and_normalise(product, attended, a.output_norm, a.y);
}

}  // namespace

void amx_forward(const Layer<uint16_t>& layer, int num_threads) { forward(layer, Amx{num_threads}); }

void simd_forward(const Layer<float>& layer, Simd simd, int num_threads) { forward(layer, Vectors{simd, num_threads}); }

}  // namespace fastbert::encoder_layer
