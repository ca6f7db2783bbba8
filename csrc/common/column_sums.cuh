#pragma once

#include <cstdint>

namespace fastbert {

// The block that adds up kSumColumns columns of partial sums, with kSumLanes threads to each.
constexpr int kSumColumns = 32;
constexpr int kSumLanes = 32;

// The sum over partials[0], partials[stride], ... of column blockIdx.x * kSumColumns + threadIdx.x, right in the threads
// with threadIdx.y == 0; each thread adds every kSumLanes-th. In double: there may be thousands of partials.
__device__ __forceinline__ double sum_partials(const float* partials, int64_t count, int64_t stride, int64_t cols) {
  __shared__ double lanes[kSumLanes][kSumColumns];
  const int64_t column = int64_t{blockIdx.x} * kSumColumns + threadIdx.x;
  double sum = 0.0;
  if (column < cols) {
#pragma unroll 4
    for (int64_t partial = threadIdx.y; partial < count; partial += kSumLanes) {
      sum += static_cast<double>(partials[partial * stride + column]);
    }
  }
  lanes[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0) {
    for (int lane = 1; lane < kSumLanes; ++lane) sum += lanes[lane][threadIdx.x];
  }
  return sum;
}

}  // namespace fastbert
