#include <algorithm>
#include <cstdint>

#include "../common/column_sums.cuh"
#include "../common/dropout.cuh"
#include "../common/launch.h"
#include "../common/vector.cuh"
#include "bias_dropout_residual_layer_norm.h"

namespace fastbert::bias_dropout_residual_layer_norm {
namespace {

// A team of threads holds a row in registers: thread t has the groups of 8 columns t, t + team, t + 2 * team ...
// Its block is (team, teams). Rows of more than kMaxGroups groups are read again for each pass, by a block each.
constexpr int kWarp = 32;
constexpr int kMaxGroups = 1024;
constexpr int kMaxWarps = 32;
constexpr int kLoopThreads = 256;

// Forward: teams of one warp up to 1024 columns, then of up to 8 warps. The numbers of blocks that a multiprocessor must
// hold are there to bound the registers: enough warps, and no spills. (Rows that aren't aligned need more registers.)
constexpr int kForwardTeams = 4;
template <int kGroups>
constexpr int kForwardThreads = kGroups == 4 ? 256 : kWarp * kForwardTeams;
template <bool kVector, int kGroups>
constexpr int kForwardBlocks = !kVector ? 1 : kGroups == 4 ? 2 : kGroups == 3 ? 6 : 8;

// Backward: one group to a thread up to 2048 columns, then two; rows at once as many as make 64 bytes of loads a thread.
// Narrow rows get several teams to a block, of so many threads in all that a multiprocessor holds four blocks at 80
// registers: the 512 partials of 32768 rows are then in flight together on 128 multiprocessors.
constexpr int kBackwardTeamThreads = 192;
template <int kGroups>
constexpr int kBackwardThreads = kGroups == 1 ? 256 : 512;
template <bool kVector, int kGroups>
constexpr int kBackwardBlocks = kVector && kGroups == 1 ? 3 : 1;
template <typename T, int kGroups>
constexpr int kRowsAtOnce = sizeof(T) == 2 && kGroups == 1 ? 2 : 1;

// Elements column .. column + 7 of a row of cols, zeros past its end. With kVector, cols is a multiple of 8.
template <bool kVector, typename T>
__device__ __forceinline__ void load_group(const T* row, int64_t column, int64_t cols, float (&values)[kGroup]) {
  if constexpr (kVector) {
    if (column < cols) {
      load<true>(row + column, kGroup, values);
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) values[i] = 0.0f;
    }
  } else {
    load<false>(row + column, static_cast<int>(min(int64_t{kGroup}, cols - column)), values);
  }
}

template <bool kVector, typename T>
__device__ __forceinline__ void store_group(const float (&values)[kGroup], int64_t column, int64_t cols, T* row) {
  if constexpr (kVector) {
    if (column < cols) store<true>(values, kGroup, row + column);
  } else {
    store<false>(values, static_cast<int>(min(int64_t{kGroup}, cols - column)), row + column);
  }
}

template <typename T, bool kVector>
__device__ __forceinline__ void load_parameter(const void* parameter, bool is_float, int64_t column, int64_t cols,
                                               float (&values)[kGroup]) {
  if (is_float) {
    load_group<kVector>(static_cast<const float*>(parameter), column, cols, values);
  } else {
    load_group<kVector>(static_cast<const T*>(parameter), column, cols, values);
  }
}

// With kVector, first is a multiple of 8.
template <bool kVector>
__device__ __forceinline__ void drop_at(uint64_t seed, int64_t first, const Dropout& dropout, float (&values)[kGroup]) {
  uint32_t words[kGroup / 2];
  if constexpr (kVector) {
    hidden_words(seed, first / kGroup, words[0], words[1], words[2], words[3]);
  } else {
    draw(seed, first, words);
  }
  drop_group(values, words, dropout);
}

// A group as it lies in memory: half the registers of its values, for a 16-bit type.
template <typename T>
struct Packed {
  static constexpr int kPerWord = 4 / sizeof(T);
  uint32_t words[kGroup / kPerWord];
};

template <bool kVector, typename T>
__device__ __forceinline__ Packed<T> load_packed(const T* row, int64_t column, int64_t cols) {
  Packed<T> packed = {};
  if constexpr (kVector) {
    if (column < cols) {
      const auto* from = reinterpret_cast<const uint4*>(row + column);
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(packed) / sizeof(uint4)); ++i) {
        const uint4 words = __ldg(from + i);
        packed.words[4 * i] = words.x;
        packed.words[4 * i + 1] = words.y;
        packed.words[4 * i + 2] = words.z;
        packed.words[4 * i + 3] = words.w;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (column + i >= cols) break;
      if constexpr (sizeof(T) == 4) {
        packed.words[i] = float_bits(row[column + i]);
      } else {
        packed.words[i / 2] |= uint32_t{row[column + i].bits} << 16 * (i % 2);
      }
    }
  }
  return packed;
}

template <typename T>
__device__ __forceinline__ float element(const Packed<T>& packed, int i) {
  if constexpr (sizeof(T) == 4) {
    return bits_float(packed.words[i]);
  } else {
    return to_float(T{static_cast<uint16_t>(packed.words[i / 2] >> 16 * (i % 2))});
  }
}

// a + b, rounded to T.
template <typename T>
__device__ __forceinline__ Packed<T> add_packed(const Packed<T>& a, const Packed<T>& b) {
  Packed<T> sums = {};
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const T sum = from_float<T>(element(a, i) + element(b, i));
    if constexpr (sizeof(T) == 4) {
      sums.words[i] = float_bits(sum);
    } else {
      sums.words[i / 2] |= uint32_t{sum.bits} << 16 * (i % 2);
    }
  }
  return sums;
}

// Makes the compiler forget what it has computed of packed: it would keep that instead of computing it again.
template <typename T>
__device__ __forceinline__ void forget(Packed<T>& packed) {
#pragma unroll
  for (uint32_t& word : packed.words) asm volatile("" : "+r"(word));
}

// Each of values becomes its sum over the team of blockDim.x threads. lanes may be written again after the next
// __syncthreads(). Where a team has more than one warp, all threads of the block come here.
template <int kValues>
__device__ __forceinline__ void add_up(float (&values)[kValues], float (&lanes)[kMaxWarps][kValues]) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
#pragma unroll
    for (int half = kWarp / 2; half > 0; half /= 2) values[i] += __shfl_xor_sync(0xFFFFFFFFu, values[i], half);
  }
  if (blockDim.x == kWarp) return;
  const int warps = blockDim.x / kWarp;
  const int team = threadIdx.y * warps;
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) lanes[team + threadIdx.x / kWarp][i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = lanes[team][i];
  for (int warp = 1; warp < warps; ++warp) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] += lanes[team + warp][i];
  }
}

// residual + dropout(x + bias), rounded to T, of one group; zeros past the end of the row.
template <typename T, bool kVector>
__device__ __forceinline__ void hidden_group(const Forward<T>& args, uint64_t seed, int64_t row, int64_t column,
                                             float (&x)[kGroup], const float (&residual)[kGroup]) {
  if (args.bias != nullptr) {
    float bias[kGroup];
    load_group<kVector>(args.bias, column, args.cols, bias);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) x[i] += bias[i];
  }
  if (args.dropout.threshold != kKeepAll) drop_at<kVector>(seed, row * args.cols + column, args.dropout, x);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) x[i] = add_and_round<T>(residual[i], x[i]);
}

template <typename T, bool kVector>
__device__ __forceinline__ void write_group(const Forward<T>& args, int64_t row, int64_t column, float mean, float rstd,
                                            const float (&hidden)[kGroup]) {
  float weight[kGroup];
  float ln_bias[kGroup];
  float out[kGroup];
  load_parameter<T, kVector>(args.weight, args.float_parameters, column, args.cols, weight);
  load_parameter<T, kVector>(args.ln_bias, args.float_parameters, column, args.cols, ln_bias);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) out[i] = affine(normalise(hidden[i], mean, rstd), weight[i], ln_bias[i]);
  store_group<kVector>(out, column, args.cols, args.out + row * args.cols);
}

// The sum of squared differences from mean within a row.
__device__ __forceinline__ float spread(const float (&hidden)[kGroup], int64_t column, int64_t cols, float mean) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const float difference = column + i < cols ? hidden[i] - mean : 0.0f;
    sum += difference * difference;
  }
  return sum;
}

template <typename T>
__device__ __forceinline__ void write_statistics(const Forward<T>& args, int64_t row, float mean, float rstd) {
  if (threadIdx.x != 0) return;
  if (args.mean != nullptr) args.mean[row] = mean;
  if (args.rstd != nullptr) args.rstd[row] = rstd;
}

__device__ __forceinline__ uint64_t seed_of(const Dropout& dropout) {
  return dropout.threshold != kKeepAll ? static_cast<uint64_t>(*dropout.seed) : 0;
}

template <typename T, bool kVector, int kGroups>
__global__ void __launch_bounds__(kForwardThreads<kGroups>, kForwardBlocks<kVector, kGroups>)
    forward_kernel(const Forward<T> args) {
  __shared__ float lanes[2][kMaxWarps][1];
  const uint64_t seed = seed_of(args.dropout);
  const auto cols = static_cast<float>(args.cols);

  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < args.rows;
       row += int64_t{gridDim.x} * blockDim.y) {
    float hidden[kGroups][kGroup];
    float residual[kGroups][kGroup];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int64_t column = (group * blockDim.x + threadIdx.x) * kGroup;
      load_group<kVector>(args.x + row * args.cols, column, args.cols, hidden[group]);
      load_group<kVector>(args.residual + row * args.cols, column, args.cols, residual[group]);
    }
    float mean[1] = {0.0f};
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int64_t column = (group * blockDim.x + threadIdx.x) * kGroup;
      hidden_group<T, kVector>(args, seed, row, column, hidden[group], residual[group]);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) mean[0] += hidden[group][i];
    }
    add_up(mean, lanes[0]);
    mean[0] /= cols;
    float variance[1] = {0.0f};
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      variance[0] += spread(hidden[group], (group * blockDim.x + threadIdx.x) * kGroup, args.cols, mean[0]);
    }
    add_up(variance, lanes[1]);
    const float rstd = reciprocal_deviation(variance[0] / cols, args.eps);
    write_statistics(args, row, mean[0], rstd);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int64_t column = (group * blockDim.x + threadIdx.x) * kGroup;
      if (args.hidden != nullptr) {
        store_group<kVector>(hidden[group], column, args.cols, args.hidden + row * args.cols);
      }
      write_group<T, kVector>(args, row, column, mean[0], rstd, hidden[group]);
    }
  }
}

// Rows of any size, read three times.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kLoopThreads, 2) forward_loop_kernel(const Forward<T> args) {
  __shared__ float lanes[2][kMaxWarps][1];
  const uint64_t seed = seed_of(args.dropout);
  const auto cols = static_cast<float>(args.cols);
  const int64_t first = threadIdx.x * kGroup;
  const int64_t step = kLoopThreads * kGroup;

  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const auto hidden_at = [&](int64_t column, float(&hidden)[kGroup]) {
      float residual[kGroup];
      load_group<kVector>(args.x + row * args.cols, column, args.cols, hidden);
      load_group<kVector>(args.residual + row * args.cols, column, args.cols, residual);
      hidden_group<T, kVector>(args, seed, row, column, hidden, residual);
    };
    float mean[1] = {0.0f};
    for (int64_t column = first; column < args.cols; column += step) {
      float hidden[kGroup];
      hidden_at(column, hidden);
      for (int i = 0; i < kGroup; ++i) mean[0] += column + i < args.cols ? hidden[i] : 0.0f;
    }
    add_up(mean, lanes[0]);
    mean[0] /= cols;
    float variance[1] = {0.0f};
    for (int64_t column = first; column < args.cols; column += step) {
      float hidden[kGroup];
      hidden_at(column, hidden);
      variance[0] += spread(hidden, column, args.cols, mean[0]);
    }
    add_up(variance, lanes[1]);
    const float rstd = reciprocal_deviation(variance[0] / cols, args.eps);
    write_statistics(args, row, mean[0], rstd);
    for (int64_t column = first; column < args.cols; column += step) {
      float hidden[kGroup];
      hidden_at(column, hidden);
      if (args.hidden != nullptr) store_group<kVector>(hidden, column, args.cols, args.hidden + row * args.cols);
      write_group<T, kVector>(args, row, column, mean[0], rstd, hidden);
    }
  }
}

// One group of a row's gradients: turns g into dresidual, stores that and dx, and leaves dx, unrounded, in g. sums are
// those of g and of g * xhat over the row.
template <typename T, bool kVector>
__device__ __forceinline__ void write_gradients(const Backward<T>& args, uint64_t seed, int64_t row, int64_t column,
                                                const float (&xhat)[kGroup], float rstd, float sum_g, float sum_gxhat,
                                                float (&g)[kGroup]) {
  const float factor = rstd / static_cast<float>(args.cols);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) g[i] = hidden_gradient(g[i], xhat[i], rstd, factor * sum_g, factor * sum_gxhat);
  store_group<kVector>(g, column, args.cols, args.dresidual + row * args.cols);
  if (args.dropout.threshold != kKeepAll && (args.dx != nullptr || args.dbias != nullptr)) {
    drop_at<kVector>(seed, row * args.cols + column, args.dropout, g);
  }
  if (args.dx != nullptr) store_group<kVector>(g, column, args.cols, args.dx + row * args.cols);
}

// Block x: the rows of partial x, each team kRowsAtOnce of them at a time.
template <typename T, bool kVector, int kGroups>
__global__ void __launch_bounds__(kBackwardThreads<kGroups>, kBackwardBlocks<kVector, kGroups>)
    backward_kernel(const Backward<T> args) {
  constexpr int kRows = kRowsAtOnce<T, kGroups>;
  alignas(16) __shared__ float lanes[2][kMaxWarps][2 * kRows];
  __shared__ float teams[kBackwardThreads<kGroups>][kGroup];
  const uint64_t seed = seed_of(args.dropout);
  const int64_t rows = rows_per_partial(args.rows);
  const int64_t end = min(args.rows, (blockIdx.x + 1) * rows);

  float weight[kGroups][kGroup];
  float sums[kSums][kGroups][kGroup] = {};
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int64_t column = (group * blockDim.x + threadIdx.x) * kGroup;
    load_parameter<T, kVector>(args.weight, args.float_parameters, column, args.cols, weight[group]);
  }

  int turn = 0;
  for (int64_t start = blockIdx.x * rows; start < end; start += kRows * blockDim.y) {
    const int64_t first = start + threadIdx.y * kRows;
    Packed<T> dy[kRows][kGroups];
    Packed<T> hidden[kRows][kGroups];
    float mean[kRows];
    float rstd[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = min(first + i, end - 1);  // past the end, one that is there: nothing is made of it
      mean[i] = args.mean[row];
      rstd[i] = args.rstd[row];
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const int64_t column = (group * blockDim.x + threadIdx.x) * kGroup;
        dy[i][group] = load_packed<kVector>(args.dy + row * args.cols, column, args.cols);
        if (args.dy2 != nullptr) {
          dy[i][group] = add_packed(dy[i][group], load_packed<kVector>(args.dy2 + row * args.cols, column, args.cols));
        }
        hidden[i][group] = load_packed<kVector>(args.hidden + row * args.cols, column, args.cols);
      }
    }
    float row_sums[2 * kRows] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          const float g = element(dy[i][group], j) * weight[group][j];  // zero past the end of the row
          row_sums[2 * i] += g;
          row_sums[2 * i + 1] += g * normalise(element(hidden[i][group], j), mean[i], rstd[i]);
        }
      }
    }
    add_up(row_sums, lanes[turn]);
    turn ^= 1;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (first + i >= end) break;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const int64_t column = (group * blockDim.x + threadIdx.x) * kGroup;
        float xhat[kGroup];
        float g[kGroup];
        forget(dy[i][group]);
        forget(hidden[i][group]);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          const float gradient = element(dy[i][group], j);
          xhat[j] = normalise(element(hidden[i][group], j), mean[i], rstd[i]);
          g[j] = gradient * weight[group][j];
          sums[1][group][j] += gradient * xhat[j];
          sums[2][group][j] += gradient;
        }
        write_gradients<T, kVector>(args, seed, first + i, column, xhat, rstd[i], row_sums[2 * i],
                                    row_sums[2 * i + 1], g);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) sums[0][group][j] += g[j];
      }
    }
  }

  if (args.scratch == nullptr) return;
#pragma unroll
  for (int which = 0; which < kSums; ++which) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int64_t column = (group * blockDim.x + threadIdx.x) * kGroup;
      if (blockDim.y > 1) {
        __syncthreads();
#pragma unroll
        for (int j = 0; j < kGroup; ++j) teams[threadIdx.y * blockDim.x + threadIdx.x][j] = sums[which][group][j];
        __syncthreads();
        for (unsigned team = 1; threadIdx.y == 0 && team < blockDim.y; ++team) {
#pragma unroll
          for (int j = 0; j < kGroup; ++j) sums[which][group][j] += teams[team * blockDim.x + threadIdx.x][j];
        }
      }
      if (threadIdx.y == 0) {
        store_group<kVector>(sums[which][group], column, args.cols,
                             args.scratch + (int64_t{blockIdx.x} * kSums + which) * args.cols);
      }
    }
  }
}

// Rows of any size, read twice; the sums so far are kept in the scratch.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kLoopThreads, 2) backward_loop_kernel(const Backward<T> args) {
  __shared__ float lanes[2][kMaxWarps][2];
  const uint64_t seed = seed_of(args.dropout);
  const int64_t first = blockIdx.x * rows_per_partial(args.rows);
  const int64_t end = min(args.rows, first + rows_per_partial(args.rows));

  for (int64_t row = first; row < end; ++row) {
    const float mean = args.mean[row];
    const float rstd = args.rstd[row];
    const auto load_row = [&](int64_t column, float(&dy)[kGroup], float(&xhat)[kGroup], float(&g)[kGroup]) {
      load_group<kVector>(args.dy + row * args.cols, column, args.cols, dy);
      if (args.dy2 != nullptr) {
        load_group<kVector>(args.dy2 + row * args.cols, column, args.cols, xhat);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) dy[i] = add_and_round<T>(dy[i], xhat[i]);
      }
      load_group<kVector>(args.hidden + row * args.cols, column, args.cols, xhat);
      load_parameter<T, kVector>(args.weight, args.float_parameters, column, args.cols, g);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        xhat[i] = normalise(xhat[i], mean, rstd);
        g[i] *= dy[i];
      }
    };
    float row_sums[2] = {};
    for (int64_t column = threadIdx.x * kGroup; column < args.cols; column += kLoopThreads * kGroup) {
      float dy[kGroup];
      float xhat[kGroup];
      float g[kGroup];
      load_row(column, dy, xhat, g);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        row_sums[0] += g[i];
        row_sums[1] += g[i] * xhat[i];
      }
    }
    add_up(row_sums, lanes[(row - first) % 2]);
    for (int64_t column = threadIdx.x * kGroup; column < args.cols; column += kLoopThreads * kGroup) {
      float sums[kSums][kGroup];
      float xhat[kGroup];
      load_row(column, sums[2], xhat, sums[0]);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) sums[1][i] = sums[2][i] * xhat[i];
      write_gradients<T, kVector>(args, seed, row, column, xhat, rstd, row_sums[0], row_sums[1], sums[0]);
      for (int which = 0; args.scratch != nullptr && which < kSums; ++which) {
        float* partial = args.scratch + (int64_t{blockIdx.x} * kSums + which) * args.cols;
        const int64_t count = min(int64_t{kGroup}, args.cols - column);
        for (int64_t i = 0; i < count; ++i) {
          partial[column + i] = row == first ? sums[which][i] : partial[column + i] + sums[which][i];
        }
      }
    }
  }
}

// Block (x, y): columns of gradient y, the sums of its partials.
template <typename T>
__global__ void __launch_bounds__(kSumColumns* kSumLanes) add_partials_kernel(const Backward<T> args,
                                                                             const int64_t count) {
  void* const gradient = blockIdx.y == 0 ? args.dbias : blockIdx.y == 1 ? args.dweight : args.dln_bias;
  if (gradient == nullptr) return;
  const double sum = sum_partials(args.scratch + blockIdx.y * args.cols, count, kSums * args.cols, args.cols);
  const int64_t column = int64_t{blockIdx.x} * kSumColumns + threadIdx.x;
  if (threadIdx.y != 0 || column >= args.cols) return;
  if (blockIdx.y > 0 && args.float_parameters) {
    static_cast<float*>(gradient)[column] = static_cast<float>(sum);
  } else {
    static_cast<T*>(gradient)[column] = from_float<T>(static_cast<float>(sum));
  }
}

template <typename... Addresses>
bool all_aligned(Addresses... addresses) {
  return (aligned(addresses) && ...);
}

int64_t up_to_warps(int64_t threads) { return (threads + kWarp - 1) / kWarp * kWarp; }

template <typename T, bool kVector>
void launch_forward(const Forward<T>& args, void* stream) {
  const int64_t groups = (args.cols + kGroup - 1) / kGroup;
  const int64_t most = multiprocessors() * kMaxWarps;
  const auto launch_teams = [&](auto kernel, int64_t team, int64_t teams) {
    const auto blocks = static_cast<unsigned>(std::min((args.rows + teams - 1) / teams, most));
    const dim3 threads(static_cast<unsigned>(team), static_cast<unsigned>(teams));
    launch("bias_dropout_residual_layer_norm forward", kernel, blocks, threads, stream, args);
  };
  // One team to a block where there are few rows: they spread over more multiprocessors.
  const int64_t teams = args.rows * kForwardTeams <= most ? 1 : kForwardTeams;
  if (groups <= kWarp) return launch_teams(forward_kernel<T, kVector, 1>, kWarp, teams);
  if (groups <= 2 * kWarp) return launch_teams(forward_kernel<T, kVector, 2>, kWarp, teams);
  if (groups <= 3 * kWarp) return launch_teams(forward_kernel<T, kVector, 3>, kWarp, teams);
  if (groups <= 4 * kWarp) return launch_teams(forward_kernel<T, kVector, 4>, kWarp, teams);
  if (groups <= kMaxGroups) return launch_teams(forward_kernel<T, kVector, 4>, up_to_warps((groups + 3) / 4), 1);
  launch_teams(forward_loop_kernel<T, kVector>, kLoopThreads, 1);
}

template <typename T, bool kVector>
void launch_backward(const Backward<T>& args, void* stream) {
  const int64_t groups = (args.cols + kGroup - 1) / kGroup;
  const auto blocks = static_cast<unsigned>(partials(args.rows));
  const auto launch_teams = [&](auto kernel, int64_t team) {
    const dim3 threads(static_cast<unsigned>(team), static_cast<unsigned>(std::max<int64_t>(1, kBackwardTeamThreads / team)));
    launch("bias_dropout_residual_layer_norm backward", kernel, blocks, threads, stream, args);
  };
  if (groups <= kBackwardThreads<1>) return launch_teams(backward_kernel<T, kVector, 1>, up_to_warps(groups));
  if constexpr (kVector) {  // rows that aren't would need more registers than there are
    if (groups <= kMaxGroups) return launch_teams(backward_kernel<T, kVector, 2>, up_to_warps((groups + 1) / 2));
  }
  launch_teams(backward_loop_kernel<T, kVector>, kLoopThreads);
}

}  // namespace

template <typename T>
void forward_device(const Forward<T>& args, void* stream) {
  if (args.rows == 0 || args.cols == 0) return;
  const bool vector = args.cols % kGroup == 0 && all_aligned(args.x, args.bias, args.residual, args.weight,
                                                             args.ln_bias, args.out, args.hidden);
  const auto forward = vector ? launch_forward<T, true> : launch_forward<T, false>;
  forward(args, stream);
}

template <typename T>
void backward_device(const Backward<T>& args, void* stream) {
  if (args.cols == 0) return;
  if (args.rows > 0) {
    const bool vector = args.cols % kGroup == 0 &&
                        all_aligned(args.dy, args.dy2, args.hidden, args.weight, args.dresidual, args.dx, args.scratch);
    const auto backward = vector ? launch_backward<T, true> : launch_backward<T, false>;
    backward(args, stream);
  }
  if (args.dbias == nullptr && args.dweight == nullptr && args.dln_bias == nullptr) return;
  const dim3 grid(static_cast<unsigned>((args.cols + kSumColumns - 1) / kSumColumns), kSums);
  const dim3 threads(kSumColumns, kSumLanes);
  launch("bias_dropout_residual_layer_norm backward, the column sums", add_partials_kernel<T>, grid, threads, stream,
         args, partials(args.rows));
}

template void forward_device(const Forward<float>&, void*);
template void forward_device(const Forward<Half>&, void*);
template void forward_device(const Forward<BFloat16>&, void*);
template void backward_device(const Backward<float>&, void*);
template void backward_device(const Backward<Half>&, void*);
template void backward_device(const Backward<BFloat16>&, void*);

}  // namespace fastbert::bias_dropout_residual_layer_norm
