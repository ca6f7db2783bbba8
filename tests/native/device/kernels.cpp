// The CUDA kernels, compiled for the host with cuda_runtime_api.h beside this, for a caller that has addresses: see
// on_host.py. `fields` are those of Forward or Backward in their order, less eps and what is of the dropout.

#include <cuda_runtime_api.h>

#include <cstdint>

#include "bias_dropout_residual/bias_dropout_residual.h"
#include "bias_dropout_residual_layer_norm/bias_dropout_residual_layer_norm.h"

namespace {

using fastbert::Dropout;
namespace plain = fastbert::bias_dropout_residual;
namespace fused = fastbert::bias_dropout_residual_layer_norm;

// The next field, as an address or a number.
struct Fields {
  const int64_t* at;
  template <typename T>
  operator T*() {
    return reinterpret_cast<T*>(*at++);
  }
  operator int64_t() { return *at++; }
  operator bool() { return *at++ != 0; }
};

template <typename T>
void call(int function, Fields next, float eps, const Dropout& dropout) {
  // Initialisers in braces are evaluated in their order.
  if (function == 0) {
    plain::forward_device(plain::Forward<T>{next, next, next, next, next, next, dropout}, nullptr);
  } else if (function == 1) {
    plain::backward_device(plain::Backward<T>{next, next, next, next, next, next, dropout}, nullptr);
  } else if (function == 2) {
    fused::forward_device(
        fused::Forward<T>{next, next, next, next, next, next, eps, next, next, next, next, next, next, dropout},
        nullptr);
  } else {
    fused::backward_device(fused::Backward<T>{next, next, next, next, next, next, next, next, next, next, next, next,
                                              next, next, next, dropout},
                           nullptr);
  }
}

}  // namespace

extern "C" void fastbert_descending(int descending) { on_host::descending = descending != 0; }

extern "C" void fastbert_call(int function, int dtype, const int64_t* fields, float eps, const int64_t* seed,
                              uint32_t threshold, float scale) {
  const Dropout dropout{seed, threshold, scale};
  const Fields next{fields};
  if (dtype == 0) return call<float>(function, next, eps, dropout);
  if (dtype == 1) return call<fastbert::Half>(function, next, eps, dropout);
  return call<fastbert::BFloat16>(function, next, eps, dropout);
}
