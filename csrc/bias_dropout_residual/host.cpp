#include <algorithm>
#include <cstdint>

#include "../common/aligned_array.h"
#include "../common/philox_host.h"
#include "bias_dropout_residual.h"

namespace fastbert::bias_dropout_residual {
namespace {

constexpr int64_t kTile = 512;        // elements whose draws and fp32 values sit in the first-level cache
constexpr int64_t kChunk = 16 * kTile;  // elements that a thread takes at a time
constexpr int64_t kGrain = 32768;     // elements below which waking another thread costs more than it saves

int useful_threads(int64_t elements, int num_threads) {
  return static_cast<int>(std::clamp<int64_t>(elements / kGrain, 1, num_threads));
}

// Elements begin .. end - 1 of the flat [rows * cols]; begin is a multiple of 8.
template <typename T>
FASTBERT_CLONES void forward_chunk(const Forward<T>& args, int64_t begin, int64_t end) {
  const bool drops = args.dropout.threshold != kKeepAll;
  const uint64_t seed = drops ? static_cast<uint64_t>(*args.dropout.seed) : 0;
  const auto threshold = static_cast<uint16_t>(args.dropout.threshold);
  const float scale = args.dropout.scale;
  alignas(64) uint16_t draws[kTile];
  alignas(64) float hidden[kTile];
  int64_t column = begin % args.cols;

  for (int64_t start = begin; start < end; start += kTile) {
    const int64_t count = std::min(kTile, end - start);
    const T* x = args.x + start;
    const T* residual = args.residual + start;
    T* out = args.out + start;

    if (args.bias == nullptr) {
      for (int64_t i = 0; i < count; ++i) hidden[i] = to_float(x[i]);
    } else {
      for (int64_t i = 0; i < count;) {
        const int64_t stop = std::min(count, i + args.cols - column);
        const T* bias = args.bias + column;
        const int64_t first = i;
        column += stop - i;
        for (; i < stop; ++i) hidden[i] = to_float(x[i]) + to_float(bias[i - first]);
        column = column == args.cols ? 0 : column;
      }
    }
    if (drops) {
      hidden_draws(seed, start / kDrawsPerCall, count, draws);
      for (int64_t i = 0; i < count; ++i) hidden[i] = drop(hidden[i], draws[i] < threshold, scale);
    }
    for (int64_t i = 0; i < count; ++i) out[i] = from_float<T>(to_float(residual[i]) + hidden[i]);
  }
}

// Rows first_row .. last_row - 1, with first_row a multiple of 8; their column sums are added to sums [cols], or null.
template <typename T>
FASTBERT_CLONES void backward_rows(const Backward<T>& args, int64_t first_row, int64_t last_row, float* sums) {
  const bool drops = args.dropout.threshold != kKeepAll;
  const uint64_t seed = drops ? static_cast<uint64_t>(*args.dropout.seed) : 0;
  const auto threshold = static_cast<uint16_t>(args.dropout.threshold);
  const float scale = args.dropout.scale;
  const int64_t end = last_row * args.cols;
  alignas(64) uint16_t draws[kTile];
  alignas(64) float gradient[kTile];
  int64_t column = 0;

  for (int64_t start = first_row * args.cols; start < end; start += kTile) {
    const int64_t count = std::min(kTile, end - start);
    const T* dy = args.dy + start;

    for (int64_t i = 0; i < count; ++i) gradient[i] = to_float(dy[i]);
    if (drops) {
      hidden_draws(seed, start / kDrawsPerCall, count, draws);
      for (int64_t i = 0; i < count; ++i) gradient[i] = drop(gradient[i], draws[i] < threshold, scale);
    }
    if (args.dx != nullptr) {
      T* dx = args.dx + start;
      for (int64_t i = 0; i < count; ++i) dx[i] = from_float<T>(gradient[i]);
    }
    if (sums != nullptr) {
      for (int64_t i = 0; i < count;) {
        const int64_t stop = std::min(count, i + args.cols - column);
        float* sum = sums + column;
        const int64_t first = i;
        column += stop - i;
        for (; i < stop; ++i) sum[i - first] += gradient[i];
        column = column == args.cols ? 0 : column;
      }
    }
  }
}

// The rows of one partial, and the partial; sums [cols] is what it works in, or null where there is no dbias.
template <typename T>
void backward_partial(const Backward<T>& args, int64_t block, float* sums) {
  const int64_t first_row = block * kRowsPerPartial;
  const int64_t last_row = std::min(args.rows, first_row + kRowsPerPartial);
  if (args.dbias == nullptr) return backward_rows(args, first_row, last_row, nullptr);

  float* partial = args.scratch + block * args.cols;
  std::fill_n(partial, args.cols, 0.0f);
  for (int64_t row = first_row; row < last_row; row += kRowsPerSum) {
    std::fill_n(sums, args.cols, 0.0f);
    backward_rows(args, row, std::min(last_row, row + kRowsPerSum), sums);
    for (int64_t column = 0; column < args.cols; ++column) partial[column] += sums[column];
  }
}

// Columns begin .. end - 1 of dbias, at most kTile of them. The sums of the partials are kept in double: there may be
// thousands of blocks.
template <typename T>
FASTBERT_CLONES void add_partials(const Backward<T>& args, int64_t begin, int64_t end) {
  alignas(64) double sums[kTile] = {};
  const int64_t blocks = partials(args.rows);
  for (int64_t block = 0; block < blocks; ++block) {
    const float* partial = args.scratch + block * args.cols + begin;
    for (int64_t i = 0; i < end - begin; ++i) sums[i] += static_cast<double>(partial[i]);
  }
  for (int64_t i = 0; i < end - begin; ++i) args.dbias[begin + i] = from_float<T>(static_cast<float>(sums[i]));
}

}  // namespace

template <typename T>
void forward_host(const Forward<T>& args, int num_threads) {
  const int64_t elements = args.rows * args.cols;
  const int64_t chunks = (elements + kChunk - 1) / kChunk;
  [[maybe_unused]] const int threads = useful_threads(elements, num_threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    forward_chunk(args, chunk * kChunk, std::min(elements, (chunk + 1) * kChunk));
  }
}

template <typename T>
void backward_host(const Backward<T>& args, int num_threads) {
  const int64_t blocks = args.cols == 0 ? 0 : partials(args.rows);
  const int threads = useful_threads(args.rows * args.cols, num_threads);
  const int64_t floats = args.dbias == nullptr ? 0 : whole_lines<float>(args.cols);
  const AlignedArray<float> sums = aligned_array<float>(threads * floats);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int part = 0; part < threads; ++part) {
    for (int64_t block = blocks * part / threads; block < blocks * (part + 1) / threads; ++block) {
      backward_partial(args, block, sums.get() + part * floats);
    }
  }
  if (args.dbias == nullptr) return;
  for (int64_t begin = 0; begin < args.cols; begin += kTile) {
    add_partials(args, begin, std::min(args.cols, begin + kTile));
  }
}

template void forward_host(const Forward<float>&, int);
template void forward_host(const Forward<Half>&, int);
template void forward_host(const Forward<BFloat16>&, int);
template void backward_host(const Backward<float>&, int);
template void backward_host(const Backward<Half>&, int);
template void backward_host(const Backward<BFloat16>&, int);

}  // namespace fastbert::bias_dropout_residual
