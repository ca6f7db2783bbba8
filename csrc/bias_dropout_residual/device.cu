#include <algorithm>
#include <cstdint>

#include "../common/cuda_check.h"
#include "../common/philox.h"
#include "../common/vector.cuh"
#include "bias_dropout_residual.h"

namespace fastbert::bias_dropout_residual {
namespace {

// A thread works on groups of 8 elements: one call of Philox, one or two 16-byte accesses.
static_assert(kGroup == kDrawsPerCall);
constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 8;

// The backward's block: columns x rows of threads over a tile of kRowsPerPartial rows and kTileColumns columns.
constexpr int kColumnThreads = 32;
constexpr int kRowThreads = kRowsPerPartial / kRowsPerSum;
constexpr int kTileColumns = kColumnThreads * kGroup;
static_assert(kColumnThreads * kRowThreads == kTileColumns, "each thread adds up one column of the tile");
constexpr int kMaxGridY = 65535;

// The block that adds up the partials of kColumnThreads columns.
constexpr int kPartialThreads = 32;

// The words that serve elements first .. first + 7, from two calls of Philox where they straddle a group.
__device__ __forceinline__ void draw(uint64_t seed, int64_t first, uint32_t (&words)[kGroup / 2]) {
  hidden_words(seed, first / kGroup, words[0], words[1], words[2], words[3]);
  const int offset = static_cast<int>(first % kGroup);
  if (offset == 0) return;
  uint32_t all[kGroup] = {words[0], words[1], words[2], words[3]};
  hidden_words(seed, first / kGroup + 1, all[4], all[5], all[6], all[7]);
  // Shifts by 4, 2 and 1 draws: an index known at run time would send the words to local memory.
  if (offset & 4) {
#pragma unroll
    for (int i = 0; i < 6; ++i) all[i] = all[i + 2];
  }
  if (offset & 2) {
#pragma unroll
    for (int i = 0; i < 5; ++i) all[i] = all[i + 1];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = offset & 1 ? all[i] >> 16 | all[i + 1] << 16 : all[i];
}

__device__ __forceinline__ void drop_group(float (&values)[kGroup], const uint32_t (&words)[kGroup / 2],
                                           const Dropout& dropout) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const uint32_t draw = i % 2 == 0 ? words[i / 2] & 0xFFFFu : words[i / 2] >> 16;
    values[i] = drop(values[i], draw < dropout.threshold, dropout.scale);
  }
}

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

// dbias = the sum of the partials, each thread adding every kPartialThreads-th of them. The sums are kept in double:
// there may be thousands of partials.
template <typename T>
__global__ void __launch_bounds__(kColumnThreads* kPartialThreads) add_partials_kernel(const Backward<T> args,
                                                                                      const int64_t blocks) {
  __shared__ double lanes[kPartialThreads][kColumnThreads];
  const int64_t column = int64_t{blockIdx.x} * kColumnThreads + threadIdx.x;
  double sum = 0.0;
  if (column < args.cols) {
#pragma unroll 4
    for (int64_t block = threadIdx.y; block < blocks; block += kPartialThreads) {
      sum += static_cast<double>(args.scratch[block * args.cols + column]);
    }
  }
  lanes[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= args.cols) return;
  for (int lane = 1; lane < kPartialThreads; ++lane) sum += lanes[lane][threadIdx.x];
  args.dbias[column] = from_float<T>(static_cast<float>(sum));
}

bool aligned(const void* address) { return reinterpret_cast<std::uintptr_t>(address) % 16 == 0; }

int64_t multiprocessors() {
  int device = 0;
  int count = 0;
  check_cuda("cudaGetDevice", cudaGetDevice(&device));
  check_cuda("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
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
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, column_step,
                                                                                            vector_bias);
  check_cuda("bias_dropout_residual forward", cudaGetLastError());
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
    kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    check_cuda("bias_dropout_residual backward", cudaGetLastError());
  }
  if (args.dbias == nullptr || args.cols == 0) return;
  const auto columns = static_cast<unsigned>((args.cols + kColumnThreads - 1) / kColumnThreads);
  const dim3 lanes(kColumnThreads, kPartialThreads);
  add_partials_kernel<T><<<columns, lanes, 0, static_cast<cudaStream_t>(stream)>>>(args, blocks);
  check_cuda("bias_dropout_residual backward, the sum for dbias", cudaGetLastError());
}

template void forward_device(const Forward<float>&, void*);
template void forward_device(const Forward<Half>&, void*);
template void forward_device(const Forward<BFloat16>&, void*);
template void backward_device(const Backward<float>&, void*);
template void backward_device(const Backward<Half>&, void*);
template void backward_device(const Backward<BFloat16>&, void*);

}  // namespace fastbert::bias_dropout_residual
