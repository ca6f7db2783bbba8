#pragma once

#include <cstdint>

#include "../common/dropout.h"
#include "../common/dtype.h"

// out = residual + scale * mask * (x + bias); x, residual and out are contiguous [rows, cols], bias is [cols].
// dx = scale * mask * dy; dbias[cols] = the column sums of dx before it is rounded.
// mask[i] = draw(seed, i) < threshold, with i the index of the element and draw as in common/philox.h.
namespace fastbert::bias_dropout_residual {

// Column sums are taken in three steps whose order doesn't depend on the number of threads, so that runs agree bit for
// bit: kRowsPerSum rows, the kRowsPerPartial / kRowsPerSum sums of a partial, and the partials. Short sums keep the
// rounding errors small.
constexpr int64_t kRowsPerSum = 8;
constexpr int64_t kRowsPerPartial = 64;

inline int64_t partials(int64_t rows) { return (rows + kRowsPerPartial - 1) / kRowsPerPartial; }

// Any address may be null: bias where there is none, dx or dbias where it isn't wanted, scratch without dbias.
template <typename T>
struct Forward {
  const T* x;
  const T* bias;
  const T* residual;
  T* out;
  int64_t rows;
  int64_t cols;
  Dropout dropout;
};

template <typename T>
struct Backward {
  const T* dy;
  T* dx;
  T* dbias;
  float* scratch;  // [partials(rows), cols]
  int64_t rows;
  int64_t cols;
  Dropout dropout;
};

template <typename T>
void forward_host(const Forward<T>& args, int num_threads);
template <typename T>
void backward_host(const Backward<T>& args, int num_threads);

// Why the current device can't run these kernels, or null. The build may lack its architecture, or the driver may be
// too old for the build.
const char* device_error();

// stream is a cudaStream_t of the current device. They throw std::runtime_error with the CUDA error.
template <typename T>
void forward_device(const Forward<T>& args, void* stream);
template <typename T>
void backward_device(const Backward<T>& args, void* stream);

}  // namespace fastbert::bias_dropout_residual
