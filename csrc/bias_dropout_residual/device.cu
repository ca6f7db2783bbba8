#include <algorithm>
#include <cstdint>

#include "../common/column_sums.cuh"
#include "../common/dropout.cuh"
#include "../common/launch.h"
#include "../common/vector.cuh"
#include "bias_dropout_residual.h"

namespace fastbert::bias_dropout_residual {
namespace {

// A thread works on groups of 8 elements: one call of Philox, one or two 16-byte accesses.
constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 8;

// The backward's block: columns x rows of threads over a tile of kRowsPerPartial rows and kTileColumns columns.
constexpr int kColumnThreads = 32;
constexpr int kRowThreads = kRowsPerPartial / kRowsPerSum;
constexpr int kTileColumns = kColumnThreads * kGroup;
static_assert(kColumnThreads * kRowThreads == kTileColumns, "each thread adds up one column of the tile");
constexpr int kMaxGridY = 65535;

// column_step is the number of columns that a thread moves on, modulo cols, from one of its groups to the next.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const Forward<T> args, const uint32_t column_step, const bool vector_bias) {
  const int64_t elements = args.rows * args.cols;
  const int64_t stride = int64_t{gridDim.x} * kThreads * kGroup;
  const bool drops = args.dropout.threshold != kKeepAll;
  const uint64_t seed = drops ? static_cast<uint64_t>(*args.dropout.seed) : 0;
  const auto cols = static_cast<uint32_t>(args.cols);
  int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kGroup;
  auto column = static_cast<uint32_t>(first % args.cols);

  for (; first < elements; first += stride) {
    const int count = static_cast<int>(min(int64_t{kGroup}, elements - first));
    float hidden[kGroup];
    float residual[kGroup];
    load<kVector>(args.x + first, count, hidden);
    load<kVector>(args.residual + first, count, residual);
    if (args.bias != nullptr) {
      if (vector_bias) {
        float bias[kGroup];
        load<true>(args.bias + column, kGroup, bias);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) hidden[i] += bias[i];
      } else {
        uint32_t wrapped = column;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          hidden[i] += to_float(args.bias[wrapped]);
          wrapped = wrapped + 1 == cols ? 0 : wrapped + 1;
        }
      }
    }
    if (drops) {
      uint32_t words[kGroup / 2];
      hidden_words(seed, first / kGroup, words[0], words[1], words[2], words[3]);
      drop_group(hidden, words, args.dropout);
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) residual[i] += hidden[i];
    store<kVector>(residual, count, args.out + first);
    column += column_step;
    column = column >= cols ? column - cols : column;
  }
}

// Block (x, y): rows of partial x, columns of tiles y, y + gridDim.y, ...
template <typename T, bool kVector>
__global__ void __launch_bounds__(kColumnThreads* kRowThreads) backward_kernel(const Backward<T> args) {
  __shared__ float lanes[kRowThreads][kTileColumns];
  const bool drops = args.dropout.threshold != kKeepAll;
  const uint64_t seed = drops ? static_cast<uint64_t>(*args.dropout.seed) : 0;
  const int64_t first_row = int64_t{blockIdx.x} * kRowsPerPartial + threadIdx.y * kRowsPerSum;
  const int rows = static_cast<int>(min(kRowsPerSum, args.rows - first_row));  // below 1 past the end

  for (int64_t tile = int64_t{blockIdx.y} * kTileColumns; tile < args.cols; tile += int64_t{gridDim.y} * kTileColumns) {
    const int64_t column = tile + threadIdx.x * kGroup;
    const int64_t columns = args.cols - column;  // with kVector a multiple of 8
    const int count = kVector || columns > kGroup ? kGroup : static_cast<int>(columns);
    float sums[kGroup] = {};
    if (columns > 0) {
      for (int i = 0; i < rows; ++i) {
        const int64_t first = (first_row + i) * args.cols + column;
        float gradient[kGroup];
        load<kVector>(args.dy + first, count, gradient);
        if (drops) {
          uint32_t words[kGroup / 2];
          if constexpr (kVector) {
            hidden_words(seed, first / kGroup, words[0], words[1], words[2], words[3]);
          } else {
            draw(seed, first, words);
          }
          drop_group(gradient, words, args.dropout);
        }
        if (args.dx != nullptr) store<kVector>(gradient, count, args.dx + first);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) sums[j] += gradient[j];
      }
    }
    if (args.dbias == nullptr) continue;

#pragma unroll
    for (int i = 0; i < kGroup; ++i) lanes[threadIdx.y][threadIdx.x * kGroup + i] = sums[i];
    __syncthreads();
    const int own = threadIdx.y * kColumnThreads + threadIdx.x;
    float sum = 0.0f;
#pragma unroll
    for (int lane = 0; lane < kRowThreads; ++lane) sum += lanes[lane][own];
    if (tile + own < args.cols) args.scratch[blockIdx.x * args.cols + tile + own] = sum;
    __syncthreads();
  }
}

// dbias = the sum of the partials.
template <typename T>
__global__ void __launch_bounds__(kSumColumns* kSumLanes) add_partials_kernel(const Backward<T> args,
                                                                             const int64_t blocks) {
  const double sum = sum_partials(args.scratch, blocks, args.cols, args.cols);
  const int64_t column = int64_t{blockIdx.x} * kSumColumns + threadIdx.x;
  if (threadIdx.y == 0 && column < args.cols) args.dbias[column] = from_float<T>(static_cast<float>(sum));
}

}  // namespace

const char* device_error() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, forward_kernel<float, true>);
  cudaGetLastError();  // forget it: the next launch must not report it as its own
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T>
void forward_device(const Forward<T>& args, void* stream) {
  const int64_t groups = (args.rows * args.cols + kGroup - 1) / kGroup;
  if (groups == 0) return;
  const int64_t blocks = std::min((groups + kThreads - 1) / kThreads, multiprocessors() * kBlocksPerMultiprocessor);
  const auto column_step = static_cast<uint32_t>(blocks * kThreads * kGroup % args.cols);
  const bool vector = aligned(args.x) && aligned(args.residual) && aligned(args.out);
  const bool vector_bias = aligned(args.bias) && args.cols % kGroup == 0;
  const auto kernel = vector ? forward_kernel<T, true> : forward_kernel<T, false>;
  launch("bias_dropout_residual forward", kernel, static_cast<unsigned>(blocks), kThreads, stream, args, column_step,
         vector_bias);
}

template <typename T>
void backward_device(const Backward<T>& args, void* stream) {
  const int64_t blocks = partials(args.rows);
  const dim3 threads(kColumnThreads, kRowThreads);
  if (blocks > 0 && args.cols > 0) {
    const int64_t tiles = (args.cols + kTileColumns - 1) / kTileColumns;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(std::min<int64_t>(tiles, kMaxGridY)));
    const bool vector = aligned(args.dy) && aligned(args.dx) && args.cols % kGroup == 0;
    const auto kernel = vector ? backward_kernel<T, true> : backward_kernel<T, false>;
    launch("bias_dropout_residual backward", kernel, grid, threads, stream, args);
  }
  if (args.dbias == nullptr || args.cols == 0) return;
  const auto columns = static_cast<unsigned>((args.cols + kSumColumns - 1) / kSumColumns);
  const dim3 lanes(kSumColumns, kSumLanes);
  launch("bias_dropout_residual backward, the sum for dbias", add_partials_kernel<T>, columns, lanes, stream, args,
         blocks);
}

template void forward_device(const Forward<float>&, void*);
template void forward_device(const Forward<Half>&, void*);
template void forward_device(const Forward<BFloat16>&, void*);
template void backward_device(const Backward<float>&, void*);
template void backward_device(const Backward<Half>&, void*);
template void backward_device(const Backward<BFloat16>&, void*);

}  // namespace fastbert::bias_dropout_residual
