#pragma once

#include <cmath>
#include <cstdint>

#include "../common/dropout.h"
#include "../common/dtype.h"
#include "../common/macros.h"

// hidden = residual + scale * mask * (x + bias), rounded to T; out = xhat * weight + ln_bias with
// xhat = (hidden - mean) * rstd and rstd = 1 / sqrt(variance + eps). With g = weight * dy,
// dresidual = rstd * (g - mean(g) - xhat * mean(g * xhat)); dx = scale * mask * dresidual;
// dbias, dweight and dln_bias = the column sums of dx (before it is rounded), dy * xhat and dy.
// mask[i] = draw(seed, i) < threshold, with i the index of the element and draw as in common/philox.h.
// All but bias, weight and ln_bias ([cols]) and mean and rstd ([rows], float) are [rows, cols]; all are contiguous.
namespace fastbert::bias_dropout_residual_layer_norm {

// What the backward adds up: dbias, dweight and dln_bias.
constexpr int kSums = 3;

// The rows whose column sums are added up first, into one partial: fewer where there are few rows, so that there are
// partials enough to share out. A function of rows alone, so that runs agree bit for bit on any number of threads.
FASTBERT_HD int64_t rows_per_partial(int64_t rows) {
  const int64_t spread = (rows + 4095) / 4096 * 8;  // about 512 partials
  return spread < 8 ? 8 : spread > 64 ? 64 : spread;
}

inline int64_t partials(int64_t rows) { return (rows + rows_per_partial(rows) - 1) / rows_per_partial(rows); }

// A sum that PyTorch would store: the new hidden state, or the two gradients of the output.
template <typename T>
FASTBERT_HD float add_and_round(float a, float b) {
  return to_float(from_float<T>(a + b));
}

FASTBERT_HD float reciprocal_deviation(float variance, float eps) { return 1.0f / sqrtf(variance + eps); }

FASTBERT_HD float normalise(float hidden, float mean, float rstd) { return (hidden - mean) * rstd; }

FASTBERT_HD float affine(float xhat, float weight, float ln_bias) { return xhat * weight + ln_bias; }

// dresidual of the formula above, from g, xhat, rstd * mean(g) and rstd * mean(g * xhat): two fused multiply-adds where
// there are such.
FASTBERT_HD float hidden_gradient(float g, float xhat, float rstd, float rstd_mean_g, float rstd_mean_gxhat) {
  return rstd * g - rstd_mean_g - xhat * rstd_mean_gxhat;
}

// weight, ln_bias and their gradients are T or float.
// Any address may be null: bias where there is none; hidden, mean and rstd where no backward follows.
template <typename T>
struct Forward {
  const T* x;
  const T* bias;
  const T* residual;
  const void* weight;
  const void* ln_bias;
  bool float_parameters;
  float eps;
  T* out;
  T* hidden;
  float* mean;
  float* rstd;
  int64_t rows;
  int64_t cols;
  Dropout dropout;
};

// Any address may be null: dy2, a second gradient of the output, where there is one only; dx, dbias, dweight or dln_bias
// where it isn't wanted; scratch without the last three.
template <typename T>
struct Backward {
  const T* dy;
  const T* dy2;
  const T* hidden;
  const void* weight;
  bool float_parameters;
  const float* mean;
  const float* rstd;
  T* dresidual;
  T* dx;
  T* dbias;
  void* dweight;
  void* dln_bias;
  float* scratch;  // [partials(rows), kSums, cols]
  int64_t rows;
  int64_t cols;
  Dropout dropout;
};

template <typename T>
void forward_host(const Forward<T>& args, int num_threads);
template <typename T>
void backward_host(const Backward<T>& args, int num_threads);

// stream is a cudaStream_t of the current device. They throw std::runtime_error with the CUDA error.
template <typename T>
void forward_device(const Forward<T>& args, void* stream);
template <typename T>
void backward_device(const Backward<T>& args, void* stream);

}  // namespace fastbert::bias_dropout_residual_layer_norm
