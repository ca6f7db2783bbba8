#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common/aligned_array.h"
#include "../common/philox_host.h"
#include "bias_dropout_residual_layer_norm.h"

namespace fastbert::bias_dropout_residual_layer_norm {
namespace {

constexpr int64_t kRowsPerSum = 8;     // rows of a partial that are added up by themselves: short sums, small errors
constexpr int64_t kTile = 512;         // columns whose sums in double sit in the first-level cache
constexpr int64_t kGrain = 32768;      // elements below which waking another thread costs more than it saves
constexpr int kLanes = 32;             // neighbouring columns whose sums are kept apart, so that the loops vectorise

int useful_threads(int64_t elements, int num_threads) {
  return static_cast<int>(std::clamp<int64_t>(elements / kGrain, 1, num_threads));
}

// The sum over 0 .. count - 1 of term(i), in an order that no instruction set changes.
template <typename Term>
FASTBERT_HD float sum(int64_t count, Term&& term) {
  alignas(64) float lanes[kLanes] = {};
  int64_t start = 0;
  for (; start + kLanes <= count; start += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += term(start + lane);
  }
  for (int lane = 0; start + lane < count; ++lane) lanes[lane] += term(start + lane);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

FASTBERT_HD float mean_around(const float* row, int64_t cols, float origin) {
  return origin + sum(cols, [=](int64_t i) { return row[i] - origin; }) / static_cast<float>(cols);
}

FASTBERT_HD float variance_around(const float* row, int64_t cols, float mean) {
  return sum(cols, [=](int64_t i) { return (row[i] - mean) * (row[i] - mean); }) / static_cast<float>(cols);
}

// The keep mask of one row as draws: keep where draws[column] < threshold.
class RowDraws {
 public:
  // The number of draws that there must be room for.
  static int64_t room(const Dropout& dropout, int64_t cols) {
    if (dropout.threshold == kKeepAll) return 0;
    return (cols + kDrawsPerCall + kDrawsPerRun - 1) / kDrawsPerRun * kDrawsPerRun;
  }

  RowDraws(const Dropout& dropout, int64_t cols, uint16_t* draws)
      : cols_(cols),
        drops_(dropout.threshold != kKeepAll),
        seed_(drops_ ? static_cast<uint64_t>(*dropout.seed) : 0),
        draws_(draws) {}

  bool drops() const { return drops_; }

  FASTBERT_HD const uint16_t* of(int64_t row) {
    const int64_t first = row * cols_;
    const int64_t skip = first % kDrawsPerCall;
    hidden_draws(seed_, first / kDrawsPerCall, skip + cols_, draws_);
    return draws_ + skip;
  }

 private:
  int64_t cols_;
  bool drops_;
  uint64_t seed_;
  uint16_t* draws_;
};

// What the threads work in: `floats` floats each, and the draws of one row.
class Scratch {
 public:
  Scratch(int threads, int64_t floats, const Dropout& dropout, int64_t cols)
      : floats_each_(whole_lines<float>(floats)),
        draws_each_(whole_lines<uint16_t>(RowDraws::room(dropout, cols))),
        floats_(aligned_array<float>(threads * floats_each_)),
        draws_(aligned_array<uint16_t>(threads * draws_each_)) {}

  float* floats(int thread) const { return floats_.get() + thread * floats_each_; }
  uint16_t* draws(int thread) const { return draws_.get() + thread * draws_each_; }

 private:
  int64_t floats_each_, draws_each_;
  AlignedArray<float> floats_;
  AlignedArray<uint16_t> draws_;
};

// The parameters [cols] of the LayerNorm in float; the caller's own where they are.
template <typename T>
const float* in_float(const void* parameter, bool is_float, int64_t cols, std::vector<float>& storage) {
  if (is_float) return static_cast<const float*>(parameter);
  storage.resize(cols);
  const T* elements = static_cast<const T*>(parameter);
  for (int64_t i = 0; i < cols; ++i) storage[i] = to_float(elements[i]);
  return storage.data();
}

// Rows first_row .. last_row - 1; hidden [cols] is what it works in.
template <typename T>
FASTBERT_CLONES void forward_rows(const Forward<T>& args, const float* weight, const float* ln_bias, int64_t first_row,
                                  int64_t last_row, RowDraws row_draws, float* __restrict hidden) {
  const int64_t cols = args.cols;
  const float scale = args.dropout.scale;
  const auto threshold = static_cast<uint16_t>(args.dropout.threshold);
  const bool drops = row_draws.drops();

  for (int64_t row = first_row; row < last_row; ++row) {
    const T* x = args.x + row * cols;
    const T* residual = args.residual + row * cols;
    const T* bias = args.bias;
    if (bias == nullptr) {
      for (int64_t i = 0; i < cols; ++i) hidden[i] = to_float(x[i]);
    } else {
      for (int64_t i = 0; i < cols; ++i) hidden[i] = to_float(x[i]) + to_float(bias[i]);
    }
    if (drops) {
      const uint16_t* draws = row_draws.of(row);
      for (int64_t i = 0; i < cols; ++i) hidden[i] = drop(hidden[i], draws[i] < threshold, scale);
    }
    for (int64_t i = 0; i < cols; ++i) hidden[i] = add_and_round<T>(to_float(residual[i]), hidden[i]);
    if (args.hidden != nullptr) {
      T* saved = args.hidden + row * cols;
      for (int64_t i = 0; i < cols; ++i) saved[i] = from_float<T>(hidden[i]);
    }

    float mean = mean_around(hidden, cols, 0.0f);
    float variance = variance_around(hidden, cols, mean);
    // Deviations as small as the rounding of the mean may be nothing else, as in a row of equal elements.
    if (variance <= mean * mean * 0x1p-32f) {
      mean = mean_around(hidden, cols, mean);
      variance = variance_around(hidden, cols, mean);
    }
    const float rstd = reciprocal_deviation(variance, args.eps);
    if (args.mean != nullptr) args.mean[row] = mean;
    if (args.rstd != nullptr) args.rstd[row] = rstd;
    T* out = args.out + row * cols;
    for (int64_t i = 0; i < cols; ++i) {
      out[i] = from_float<T>(affine(normalise(hidden[i], mean, rstd), weight[i], ln_bias[i]));
    }
  }
}

// Rows first_row .. last_row - 1; their column sums are added to sums [kSums, cols].
template <typename T>
FASTBERT_CLONES void backward_rows(const Backward<T>& args, const float* __restrict weight, int64_t first_row,
                                   int64_t last_row, RowDraws& row_draws, float* __restrict dy, float* __restrict g,
                                   float* __restrict xhat, float* sums) {
  const int64_t cols = args.cols;
  const float scale = args.dropout.scale;
  const auto threshold = static_cast<uint16_t>(args.dropout.threshold);
  float* __restrict dbias = sums;
  float* __restrict dweight = sums + cols;
  float* __restrict dln_bias = sums + 2 * cols;

  for (int64_t row = first_row; row < last_row; ++row) {
    const T* __restrict incoming = args.dy + row * cols;
    if (args.dy2 != nullptr) {
      const T* __restrict second = args.dy2 + row * cols;
      for (int64_t i = 0; i < cols; ++i) dy[i] = add_and_round<T>(to_float(incoming[i]), to_float(second[i]));
    } else {
      for (int64_t i = 0; i < cols; ++i) dy[i] = to_float(incoming[i]);
    }
    const T* __restrict hidden = args.hidden + row * cols;
    T* __restrict dresidual = args.dresidual + row * cols;
    const float mean = args.mean[row];
    const float rstd = args.rstd[row];
    for (int64_t i = 0; i < cols; ++i) {
      xhat[i] = normalise(to_float(hidden[i]), mean, rstd);
      dweight[i] += dy[i] * xhat[i];
      dln_bias[i] += dy[i];
      g[i] = dy[i] * weight[i];
    }
    const float factor = rstd / static_cast<float>(cols);
    const float mean_g = factor * sum(cols, [=](int64_t i) { return g[i]; });
    const float mean_gxhat = factor * sum(cols, [=](int64_t i) { return g[i] * xhat[i]; });
    for (int64_t i = 0; i < cols; ++i) {
      g[i] = hidden_gradient(g[i], xhat[i], rstd, mean_g, mean_gxhat);
      dresidual[i] = from_float<T>(g[i]);
    }
    if (row_draws.drops() && (args.dx != nullptr || args.dbias != nullptr)) {
      const uint16_t* draws = row_draws.of(row);
      for (int64_t i = 0; i < cols; ++i) g[i] = drop(g[i], draws[i] < threshold, scale);
    }
    if (args.dx != nullptr) {
      T* dx = args.dx + row * cols;
      for (int64_t i = 0; i < cols; ++i) dx[i] = from_float<T>(g[i]);
    }
    for (int64_t i = 0; i < cols; ++i) dbias[i] += g[i];
  }
}

// What backward_partials works in: dy, g and xhat, a line further apart than their size, lest they share the sets of a
// cache; then the sums [kSums, cols] of some rows, and those of a partial.
int64_t row_stride(int64_t cols) { return whole_lines<float>(cols) + kLineBytes / static_cast<int64_t>(sizeof(float)); }

int64_t backward_floats(int64_t cols) { return 3 * row_stride(cols) + 2 * kSums * cols; }

// Partials first .. last - 1 and their rows, in backward_floats(cols) of memory.
template <typename T>
void backward_partials(const Backward<T>& args, const float* weight, int64_t first, int64_t last, RowDraws row_draws,
                       float* memory) {
  const int64_t rows = rows_per_partial(args.rows);
  const int64_t stride = row_stride(args.cols);
  const int64_t count = kSums * args.cols;
  float* const sums = memory + 3 * stride;
  float* const partial = sums + count;
  for (int64_t block = first; block < last; ++block) {
    const int64_t end = std::min(args.rows, (block + 1) * rows);
    std::fill_n(partial, count, 0.0f);
    for (int64_t row = block * rows; row < end; row += kRowsPerSum) {
      std::fill_n(sums, count, 0.0f);
      backward_rows(args, weight, row, std::min(end, row + kRowsPerSum), row_draws, memory, memory + stride,
                    memory + 2 * stride, sums);
      for (int64_t i = 0; i < count; ++i) partial[i] += sums[i];
    }
    if (args.scratch != nullptr) std::copy_n(partial, count, args.scratch + block * count);
  }
}

// Columns begin .. end - 1, at most kTile, of gradient number `which`. The sums of the partials are kept in double:
// there may be thousands.
template <typename W>
FASTBERT_CLONES void add_partials(const float* scratch, int64_t count, int64_t cols, int which, int64_t begin,
                                  int64_t end, W* gradient) {
  alignas(64) double sums[kTile] = {};
  for (int64_t block = 0; block < count; ++block) {
    const float* partial = scratch + (block * kSums + which) * cols + begin;
    for (int64_t i = 0; i < end - begin; ++i) sums[i] += static_cast<double>(partial[i]);
  }
  for (int64_t i = 0; i < end - begin; ++i) gradient[begin + i] = from_float<W>(static_cast<float>(sums[i]));
}

template <typename W>
void add_all_partials(const float* scratch, int64_t count, int64_t cols, int which, void* gradient) {
  if (gradient == nullptr) return;
  for (int64_t begin = 0; begin < cols; begin += kTile) {
    add_partials(scratch, count, cols, which, begin, std::min(cols, begin + kTile), static_cast<W*>(gradient));
  }
}

}  // namespace

template <typename T>
void forward_host(const Forward<T>& args, int num_threads) {
  std::vector<float> storage[2];
  const float* weight = in_float<T>(args.weight, args.float_parameters, args.cols, storage[0]);
  const float* ln_bias = in_float<T>(args.ln_bias, args.float_parameters, args.cols, storage[1]);
  const int threads = useful_threads(args.rows * args.cols, num_threads);
  const Scratch scratch(threads, args.cols, args.dropout, args.cols);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int part = 0; part < threads; ++part) {
    forward_rows(args, weight, ln_bias, args.rows * part / threads, args.rows * (part + 1) / threads,
                 RowDraws(args.dropout, args.cols, scratch.draws(part)), scratch.floats(part));
  }
}

template <typename T>
void backward_host(const Backward<T>& args, int num_threads) {
  std::vector<float> storage;
  const float* weight = in_float<T>(args.weight, args.float_parameters, args.cols, storage);
  const int64_t count = partials(args.rows);
  const int threads = useful_threads(args.rows * args.cols, num_threads);
  const Scratch scratch(threads, backward_floats(args.cols), args.dropout, args.cols);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int part = 0; part < threads; ++part) {
    backward_partials(args, weight, count * part / threads, count * (part + 1) / threads,
                      RowDraws(args.dropout, args.cols, scratch.draws(part)), scratch.floats(part));
  }
  add_all_partials<T>(args.scratch, count, args.cols, 0, args.dbias);
  void* const parameters[] = {args.dweight, args.dln_bias};
  for (int i = 0; i < 2; ++i) {
    if (args.float_parameters) {
      add_all_partials<float>(args.scratch, count, args.cols, 1 + i, parameters[i]);
    } else {
      add_all_partials<T>(args.scratch, count, args.cols, 1 + i, parameters[i]);
    }
  }
}

template void forward_host(const Forward<float>&, int);
template void forward_host(const Forward<Half>&, int);
template void forward_host(const Forward<BFloat16>&, int);
template void backward_host(const Backward<float>&, int);
template void backward_host(const Backward<Half>&, int);
template void backward_host(const Backward<BFloat16>&, int);

}  // namespace fastbert::bias_dropout_residual_layer_norm
