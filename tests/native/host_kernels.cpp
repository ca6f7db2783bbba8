// Calls every kernel of the host with buffers of exactly the size that it is told, under the sanitizers of GCC.
//
//   host_kernels               everything
//   host_kernels --quick       fewer sizes
//   host_kernels FAULT         one of the faults at the end of this file, which must be found
//
// The numbers are those of tests/ops; here it is enough that they are written, near, and the same every time.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "attention/amx.h"
#include "attention/dropout.h"
#include "attention/simd.h"
#include "bias_dropout_residual/bias_dropout_residual.h"
#include "bias_dropout_residual_layer_norm/bias_dropout_residual_layer_norm.h"
#include "buffer.h"
#include "common/aligned_array.h"
#include "common/simd.h"
#include "encoder_layer/encoder_layer.h"
#include "linear/amx.h"
#include "linear/checksum.h"
#include "linear/simd.h"
#include "parallel.h"
#include "tiles.h"

extern "C" {
int __sanitizer_install_malloc_and_free_hooks(void (*)(const volatile void*, size_t), void (*)(const volatile void*));
void __sanitizer_print_stack_trace();
}

namespace fastbert {
namespace {

constexpr size_t kAligned = 64;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "host_kernels: %s\n", what.c_str());
  std::abort();
}

// Memory that runs out inside of an OpenMP region ends the process: an exception can't leave it.
void on_allocation(const volatile void*, size_t size) {
  if (!in_parallel()) return;
  std::fprintf(stderr, "host_kernels: %zu bytes were allocated inside of an OpenMP region\n", size);
  __sanitizer_print_stack_trace();
  std::abort();
}

void on_release(const volatile void*) {}

void start() { __sanitizer_install_malloc_and_free_hooks(on_allocation, on_release); }

// How a kernel is called.
struct Way {
  Edge edge;
  int threads;
};

std::mt19937 random_numbers;

float number(float value) { return value; }
double number(double value) { return value; }
float number(Half value) { return to_float(value); }
float number(BFloat16 value) { return to_float(value); }
float number(uint16_t value) { return to_float(BFloat16{value}); }

template <typename T>
T rounded(float value) {
  if constexpr (std::is_same_v<T, uint16_t>) {
    return from_float<BFloat16>(value).bits;
  } else {
    return from_float<T>(value);
  }
}

template <typename T>
Buffer<T> input(int64_t count, const Way& way, float scale = 1.0f) {
  Buffer<T> buffer(count, alignof(T), way.edge);
  std::normal_distribution<float> normal(0.0f, scale);
  for (T& element : buffer) element = rounded<T>(normal(random_numbers));
  buffer.freeze();
  return buffer;
}

template <typename T>
Buffer<T> input_of(const std::vector<T>& values, const Way& way) {
  Buffer<T> buffer(static_cast<int64_t>(values.size()), alignof(T), way.edge);
  std::copy(values.begin(), values.end(), buffer.begin());
  buffer.freeze();
  return buffer;
}

template <typename T>
Buffer<T> output(int64_t count, const Way& way, size_t alignment = alignof(T)) {
  return Buffer<T>(count, alignment, way.edge);
}

template <typename T>
T* null_if(bool unwanted, const Buffer<T>& buffer) {
  return unwanted ? nullptr : buffer.data();
}

// What a call wrote.
class Result {
 public:
  template <typename T>
  void add(const Buffer<T>& buffer, const char* name) {
    for (const T& element : buffer) {
      if (!std::isfinite(number(element))) fail(std::string(name) + " holds " + std::to_string(number(element)));
    }
    const auto* bytes = reinterpret_cast<const unsigned char*>(buffer.data());
    bytes_.insert(bytes_.end(), bytes, bytes + buffer.size() * sizeof(T));
  }

  bool operator==(const Result& other) const { return bytes_ == other.bytes_; }

 private:
  std::vector<unsigned char> bytes_;
};

std::map<std::string, int> calls;

// The same with buffers at either edge, and on any number of threads.
void every_way(const std::string& kernel, const std::string& what, const std::function<Result(const Way&)>& call) {
  std::vector<Result> results;
  for (const Edge edge : {Edge::kEnd, Edge::kStart}) {
    for (const int threads : {1, 3}) {
      random_numbers.seed(5489);
      results.push_back(call({edge, threads}));
      if (!(results.back() == results.front())) fail(kernel + ", " + what + ": the result is not always the same");
      ++calls[kernel];
    }
  }
}

void expect_near(double actual, double expected, double tolerance, const char* name) {
  if (!(std::abs(actual - expected) <= tolerance * (1.0 + std::abs(expected)))) {
    fail(std::string(name) + " is " + std::to_string(actual) + ", and " + std::to_string(expected) + " was expected");
  }
}

// The sum over i of a[i * a_step] b[i * b_step]. What is tested isn't here, and this is most of the time.
template <typename A, typename B>
__attribute__((no_sanitize("address", "undefined", "thread"), optimize("O2"))) double product(
    const A* a, int64_t a_step, const B* b, int64_t b_step, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += double{number(a[i * a_step])} * double{number(b[i * b_step])};
  return sum;
}

// Some indices below count, the first and the last among them.
std::vector<int64_t> samples(int64_t count) {
  if (count == 0) return {};
  std::vector<int64_t> chosen{0, count - 1};
  for (int i = 0; i < 30; ++i) chosen.push_back(static_cast<int64_t>(random_numbers() % static_cast<uint64_t>(count)));
  return chosen;
}

std::string text(std::initializer_list<int64_t> numbers) {
  std::string joined;
  for (const int64_t one : numbers) joined += std::to_string(one) + " ";
  return joined;
}

struct Set {
  std::string name;
  int simd;  // 0 for AMX
};

// The instruction sets that this processor can run; AMX takes its vector instructions only, the tiles are in memory.
std::vector<Set> instruction_sets() {
  std::vector<Set> sets;
  if (simd_level() >= 3) sets.push_back({"AVX2", 3});
  if (simd_level() >= 4) sets.push_back({"AVX512", 4});
#if defined(FASTBERT_HAVE_AMX)
  if (simd_level() >= 4 && __builtin_cpu_supports("avx512bf16")) sets.push_back({"AMX", 0});
#endif
  return sets;
}

// bias_dropout_residual, alone and with a LayerNorm.

constexpr int64_t kSeed = 0x0123456789ABCDEF;
constexpr uint32_t kThreshold = 58982;  // p = 0.1

Dropout dropout_of(bool drops) {
  return drops ? Dropout{&kSeed, kThreshold, 65536.0f / kThreshold} : Dropout{nullptr, kKeepAll, 1.0f};
}

template <typename T>
void bias_dropout_residual_of(int64_t rows, int64_t cols, bool all) {
  namespace bdr = bias_dropout_residual;
  every_way("bias_dropout_residual", text({rows, cols, all}), [=](const Way& way) {
    Result result;
    const auto x = input<T>(rows * cols, way), residual = input<T>(rows * cols, way), bias = input<T>(cols, way);
    const auto out = output<T>(rows * cols, way), dx = output<T>(rows * cols, way), dbias = output<T>(cols, way);
    const auto scratch = output<float>(bdr::partials(rows) * cols, way);
    bdr::forward_host(bdr::Forward<T>{x.data(), null_if(!all, bias), residual.data(), out.data(), rows, cols,
                                      dropout_of(all)},
                      way.threads);
    result.add(out, "out");
    bdr::backward_host(bdr::Backward<T>{x.data(), dx.data(), null_if(!all, dbias), null_if(!all, scratch), rows, cols,
                                        dropout_of(all)},
                       way.threads);
    result.add(dx, "dx");
    if (all) result.add(dbias, "dbias");
    if (all) result.add(scratch, "scratch");
    return result;
  });
}

template <typename T, typename W>
void bias_dropout_residual_layer_norm_of(int64_t rows, int64_t cols, bool all) {
  namespace fused = bias_dropout_residual_layer_norm;
  every_way("bias_dropout_residual_layer_norm", text({rows, cols, all}), [=](const Way& way) {
    Result result;
    const bool wide = std::is_same_v<W, float>;
    const auto x = input<T>(rows * cols, way), residual = input<T>(rows * cols, way), bias = input<T>(cols, way);
    const auto weight = input<W>(cols, way), ln_bias = input<W>(cols, way);
    const auto out = output<T>(rows * cols, way), hidden = output<T>(rows * cols, way);
    const auto mean = output<float>(rows, way), rstd = output<float>(rows, way);
    const auto forward = [&](bool keeps) {
      fused::forward_host(fused::Forward<T>{x.data(), null_if(!all, bias), residual.data(), weight.data(),
                                            ln_bias.data(), wide, 1e-3f, out.data(), null_if(!keeps, hidden),
                                            null_if(!keeps, mean), null_if(!keeps, rstd), rows, cols, dropout_of(all)},
                          way.threads);
    };
    forward(false);
    result.add(out, "out");
    forward(true);
    result.add(hidden, "hidden");
    result.add(mean, "mean");
    result.add(rstd, "rstd");
    const auto dy = input<T>(rows * cols, way), dy2 = input<T>(rows * cols, way);
    const auto dresidual = output<T>(rows * cols, way), dx = output<T>(rows * cols, way);
    const auto dbias = output<T>(cols, way);
    const auto dweight = output<W>(cols, way), dln_bias = output<W>(cols, way);
    const auto scratch = output<float>(fused::partials(rows) * fused::kSums * cols, way);
    fused::backward_host(
        fused::Backward<T>{dy.data(), null_if(!all, dy2), hidden.data(), weight.data(), wide, mean.data(), rstd.data(),
                           dresidual.data(), null_if(!all, dx), null_if(!all, dbias), null_if(!all, dweight),
                           null_if(!all, dln_bias), null_if(!all, scratch), rows, cols, dropout_of(all)},
        way.threads);
    result.add(dresidual, "dresidual");
    if (all) {
      result.add(dx, "dx");
      result.add(dbias, "dbias");
      result.add(dweight, "dweight");
      result.add(dln_bias, "dln_bias");
      result.add(scratch, "scratch");
    }
    return result;
  });
}

void element_wise(bool quick) {
  std::vector<std::array<int64_t, 2>> shapes = {{0, 24}, {1, 1}, {3, 5}, {65, 13}, {67, 1023}};
  if (!quick) shapes.insert(shapes.end(), {{1, 7}, {8, 512}, {64, 24}, {129, 768}, {700, 131}, {5000, 3}});
  for (const auto& [rows, cols] : shapes) {
    for (const bool all : {false, true}) {
      bias_dropout_residual_of<float>(rows, cols, all);
      bias_dropout_residual_of<Half>(rows, cols, all);
      bias_dropout_residual_of<BFloat16>(rows, cols, all);
      bias_dropout_residual_layer_norm_of<float, float>(rows, cols, all);
      bias_dropout_residual_layer_norm_of<Half, Half>(rows, cols, all);
      bias_dropout_residual_layer_norm_of<BFloat16, BFloat16>(rows, cols, all);
      bias_dropout_residual_layer_norm_of<BFloat16, float>(rows, cols, all);
    }
  }
}

// Attention.

void attention_dropout_of(int64_t sequences, int64_t heads, int64_t queries, int64_t keys) {
  every_way("attention_dropout", text({sequences, heads, queries, keys}), [=](const Way& way) {
    Result result;
    const auto values = input<float>(sequences * heads * queries * keys, way);
    const auto probabilities = output<float>(values.size(), way);
    std::copy(values.begin(), values.end(), probabilities.begin());
    attention::dropout_host({probabilities.data(), 2, sequences, heads, queries, keys, kSeed, kThreshold, 1.5f},
                            way.threads);
    result.add(probabilities, "probabilities");
    return result;
  });
}

template <typename T>
void check_attention(const attention::Packed<T>& args, double tolerance) {
  const int64_t stride = 3 * args.heads * args.size;
  for (int64_t sequence = 0; sequence < args.sequences; ++sequence) {
    const int64_t first = args.cu_seqlens[sequence], length = args.cu_seqlens[sequence + 1] - first;
    for (const int64_t query : samples(length)) {
      const auto head = static_cast<int64_t>(random_numbers() % static_cast<uint64_t>(args.heads));
      const T* q = args.qkv + (first + query) * stride + head * args.size;
      const T* k = args.qkv + first * stride + (args.heads + head) * args.size;
      const T* v = k + args.heads * args.size;
      std::vector<double> p(static_cast<size_t>(length));
      double sum = 0.0;
      for (int64_t key = 0; key < length; ++key) {
        sum += p[static_cast<size_t>(key)] = std::exp(product(q, 1, k + key * stride, 1, args.size) * args.scale);
      }
      expect_near(args.lse[head * args.rows + first + query], std::log(sum), tolerance, "lse");
      for (const int64_t i : samples(args.size)) {
        const double expected = product(p.data(), 1, v + i, stride, length) / sum;
        expect_near(number(args.out[((first + query) * args.heads + head) * args.size + i]), expected, tolerance, "out");
      }
    }
  }
}

template <typename T>
void attention_of(const Set& set, const std::vector<int64_t>& lengths, int64_t spare, int64_t heads, int64_t size) {
  const std::string what = std::to_string(lengths.size()) + " sequences, " + text({spare, heads, size});
  every_way("attention, " + set.name, what, [=](const Way& way) {
    std::vector<int32_t> offsets{0};
    for (const int64_t length : lengths) offsets.push_back(offsets.back() + static_cast<int32_t>(length));
    const int64_t rows = offsets.back() + spare;
    const auto qkv = input<T>(rows * 3 * heads * size, way);
    const auto cu_seqlens = input_of(offsets, way);
    const auto out = output<T>(rows * heads * size, way);
    const auto lse = output<float>(heads * rows, way);
    const attention::Packed<T> args{qkv.data(), cu_seqlens.data(), out.data(),  lse.data(),
                                    rows,       static_cast<int64_t>(lengths.size()), heads, size,
                                    1.0f / std::sqrt(static_cast<float>(size))};
    if constexpr (std::is_same_v<T, float>) {
      attention::simd_forward(args, static_cast<Simd>(set.simd), way.threads);
    } else {
      attention::amx_forward(args, way.threads);
    }
    Result result;
    result.add(out, "out");
    result.add(lse, "lse");
    check_attention(args, std::is_same_v<T, float> ? 1e-4 : 3e-2);
    return result;
  });
}

void attention(const std::vector<Set>& sets, bool quick) {
  std::vector<std::array<int64_t, 4>> shapes = {{1, 1, 1, 1}, {2, 3, 5, 600}, {1, 2, 70, 513}};
  for (const auto& [sequences, heads, queries, keys] : shapes) attention_dropout_of(sequences, heads, queries, keys);
  std::vector<std::vector<int64_t>> ragged = {{}, {0}, {1}, {3, 0, 40, 0}, {17, 1, 0, 33, 129}};
  std::vector<int64_t> head_sizes = {1, 16, 31};
  if (!quick) {
    ragged.insert(ragged.end(), {{0, 0, 15, 16}, {31, 32, 14, 13, 12, 7, 6, 5}, {383, 384, 385}, {800}, {1, 1, 1, 1, 1}});
    head_sizes.insert(head_sizes.end(), {7, 8, 15, 17, 33, 40, 64, 80, 96, 128});
  }
  for (const Set& set : sets) {
    const auto call = set.simd != 0 ? attention_of<float> : attention_of<uint16_t>;
    for (const int64_t size : head_sizes) call(set, {3, 0, 40, 0}, 5, 3, size);
    for (const auto& lengths : ragged) {
      for (const int64_t size : {int64_t{32}, int64_t{59}}) call(set, lengths, size == 32 ? 0 : 5, 2, size);
    }
    call(set, {385, 2}, 0, 2, 33);
    call(set, {20}, 0, 1, 400);
  }
}

// Linear layers.

double activated(double value, double other, linear::Post post) {
  switch (post) {
    case linear::Post::kNone: return value;
    case linear::Post::kGeluErf: return 0.5 * value * (1.0 + std::erf(value * std::sqrt(0.5)));
    case linear::Post::kGeluTanh:
      return 0.5 * value * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (value + 0.044715 * value * value * value)));
    case linear::Post::kAdd: return value + other;
  }
  fail("an unknown activation");
}

template <typename T>
void pack(const Set& set, const T* weight, T* packed, int64_t features, int64_t depth) {
  if constexpr (std::is_same_v<T, float>) {
    linear::simd_pack(weight, packed, features, depth, static_cast<Simd>(set.simd));
  } else {
    linear::amx_pack(weight, packed, features, depth);
  }
}

template <typename T>
void linear_of(const Set& set, int64_t rows, int64_t depth, int64_t features, bool has_bias, linear::Post post) {
  const std::string what = text({rows, depth, features, has_bias, static_cast<int>(post)});
  every_way("linear, " + set.name, what, [=](const Way& way) {
    const auto x = input<T>(rows * depth, way), bias = input<T>(features, way);
    const auto weight = input<T>(features * depth, way, 1.0f / std::sqrt(static_cast<float>(depth)));
    const auto other = input<T>(post == linear::Post::kAdd ? rows * features : 0, way);
    auto packed = output<T>(features * depth, way, kAligned);
    const auto y = output<T>(rows * features, way, kAligned);
    pack(set, weight.data(), packed.data(), features, depth);
    packed.freeze();
    const linear::Linear<T> args{x.data(), packed.data(), null_if(!has_bias, bias), other.data(), y.data(),
                                 rows,     depth,         features,                 post};
    if constexpr (std::is_same_v<T, float>) {
      linear::simd_forward(args, static_cast<Simd>(set.simd), way.threads);
    } else {
      linear::amx_forward(args, way.threads);
    }
    Result result;
    result.add(packed, "packed");
    result.add(y, "y");
    for (const int64_t i : samples(rows * features)) {
      const int64_t row = i / features, feature = i % features;
      const double sum = product(x.data() + row * depth, 1, weight.data() + feature * depth, 1, depth);
      const double biased = sum + (has_bias ? number(bias[feature]) : 0.0);
      const double added = post == linear::Post::kAdd ? number(other[i]) : 0.0;
      expect_near(number(y[i]), activated(biased, added, post), std::is_same_v<T, float> ? 1e-5 : 8e-3, "y");
    }
    return result;
  });
}

void linear_layers(const std::vector<Set>& sets, bool quick) {
  using linear::Post;
  std::vector<int64_t> few = {1, 13, 33};
  std::vector<std::array<int64_t, 2>> sizes = {{32, 32}, {416, 160}};
  if (!quick) {
    few.insert(few.end(), {2, 6, 7, 14, 15, 29, 31, 32, 64, 65, 230});
    sizes.insert(sizes.end(), {{96, 64}, {384, 288}, {800, 96}, {32, 544}});
  }
  for (const Set& set : sets) {
    const auto call = set.simd != 0 ? linear_of<float> : linear_of<uint16_t>;
    for (const auto& [depth, features] : sizes) {
      for (const int64_t rows : few) call(set, rows, depth, features, false, Post::kNone);
      for (const Post post : {Post::kGeluErf, Post::kGeluTanh, Post::kAdd}) call(set, 17, depth, features, true, post);
    }
    call(set, 700, 96, 64, true, Post::kNone);       // threads share the rows
    call(set, 460, 64, 288, true, Post::kGeluErf);   // and blocks are large
    if (!quick && set.simd == 0) {
      call(set, 2200, 32, 960, true, Post::kNone);   // more results than caches hold
      call(set, 620, 1024, 64, true, Post::kNone);   // more of x than the second-level cache holds
      call(set, 40, 9600, 32, false, Post::kNone);
    }
  }
}

// Checksums of weights.

// One in `every` of the elements of a weight is not zero.
template <typename T>
void checksum_of(int64_t rows, int64_t columns, int64_t every) {
  every_way("checksum", text({rows, columns, sizeof(T), every}), [=](const Way& way) {
    auto weight = output<T>(rows * columns, way);
    for (int64_t i = 0; i < rows * columns; ++i) weight[i] = i % every == 0 ? static_cast<T>(i % 30000 + 1) : T{0};
    auto samples = output<linear::Sample>(rows + columns, way);
    auto checksums = output<uint64_t>(rows, way);
    const auto address = [](const auto& buffer) { return reinterpret_cast<int64_t>(buffer.data()); };
    constexpr int64_t kBytes = sizeof(T);
    linear::Rows matrix{address(weight), rows, columns * kBytes, kBytes, address(samples), 0, address(checksums)};
    linear::remember(matrix);
    samples.freeze();
    checksums.freeze();
    const linear::Rows matrices[] = {matrix, matrix};
    for (int64_t turn = 0; turn < linear::kTurns; ++turn) {
      if (!linear::unchanged(matrices, 2, turn, way.threads)) fail("a matrix that is the same has changed");
    }
    const auto check_line = [&](int64_t first, int64_t step, int64_t count) {
      std::vector<T> kept;
      for (int64_t i = 0; i < count; ++i) kept.push_back(std::exchange(weight[first + i * step], T{0}));
      const bool was_zero = std::all_of(kept.begin(), kept.end(), [](T value) { return value == 0; });
      if (linear::unchanged(matrices, 2, 0, way.threads) != was_zero) fail("a row or column is zero, and it wasn't seen");
      for (int64_t i = 0; i < count; ++i) weight[first + i * step] = kept[i];
    };
    for (int64_t row = 0; row < rows; row += 1 + rows / 9) check_line(row * columns, 1, columns);
    for (int64_t column = 0; column < columns; column += 1 + columns / 9) check_line(column, columns, rows);
    weight[rows * columns / 2] ^= T{1};
    bool seen = false;
    for (int64_t turn = 0; turn < linear::kTurns; ++turn) seen |= !linear::unchanged(matrices, 2, turn, way.threads);
    if (!seen) fail("a matrix has changed, and it wasn't seen");
    return Result{};
  });
}

void checksums(bool quick) {
  std::vector<std::array<int64_t, 2>> shapes = {{1, 1}, {1, 7}, {65, 33}};
  if (!quick) shapes.insert(shapes.end(), {{3, 32}, {63, 2}, {300, 5}, {1000, 64}});
  for (const auto& [rows, columns] : shapes) {
    for (const int64_t every : {1, 37}) {
      checksum_of<uint16_t>(rows, columns, every);
      checksum_of<uint32_t>(rows, columns, every);
    }
  }
}

// Whole layers.

template <typename T, typename W>
void encoder_layer_of(const Set& set, const std::vector<int64_t>& lengths, int64_t spare, int64_t heads, int64_t hidden,
                      int64_t features) {
  const std::string what = std::to_string(lengths.size()) + " sequences, " + text({spare, heads, hidden, features});
  every_way("encoder_layer, " + set.name, what, [=](const Way& way) {
    std::vector<int32_t> offsets{0};
    for (const int64_t length : lengths) offsets.push_back(offsets.back() + static_cast<int32_t>(length));
    const int64_t rows = offsets.back() + spare;
    const auto x = input<T>(rows * hidden, way);
    const auto cu_seqlens = input_of(offsets, way);
    const auto weight = [&](int64_t out_features, int64_t depth) {
      const auto plain = input<T>(out_features * depth, way, 0.1f);
      auto packed = output<T>(out_features * depth, way, kAligned);
      pack(set, plain.data(), packed.data(), out_features, depth);
      packed.freeze();
      return packed;
    };
    const auto qkv = weight(3 * hidden, hidden), dense = weight(hidden, hidden), intermediate = weight(features, hidden);
    const auto last = weight(hidden, features);
    const auto qkv_bias = input<T>(3 * hidden, way), intermediate_bias = input<T>(features, way);
    const auto last_bias = input<T>(hidden, way);
    const auto norm_weight = input<W>(hidden, way), norm_bias = input<W>(hidden, way);
    const auto y = output<T>(rows * hidden, way, kAligned);
    const auto scratch = output<T>(rows * encoder_layer::scratch_columns(hidden, features), way, kAligned);
    const auto lse = output<float>(heads * rows, way);
    const encoder_layer::Norm norm{norm_weight.data(), norm_bias.data(), std::is_same_v<W, float>, 1e-12f};
    const encoder_layer::Layer<T> layer{x.data(),
                                        y.data(),
                                        cu_seqlens.data(),
                                        {qkv.data(), qkv_bias.data()},
                                        {dense.data(), nullptr},
                                        {intermediate.data(), intermediate_bias.data()},
                                        {last.data(), last_bias.data()},
                                        norm,
                                        norm,
                                        linear::Post::kGeluErf,
                                        scratch.data(),
                                        lse.data(),
                                        rows,
                                        static_cast<int64_t>(lengths.size()),
                                        heads,
                                        hidden,
                                        features,
                                        0.25f};
    if constexpr (std::is_same_v<T, float>) {
      encoder_layer::simd_forward(layer, static_cast<Simd>(set.simd), way.threads);
    } else {
      encoder_layer::amx_forward(layer, way.threads);
    }
    Result result;
    result.add(y, "y");
    result.add(lse, "lse");
    return result;
  });
}

void encoder_layers(const std::vector<Set>& sets, bool quick) {
  for (const Set& set : sets) {
    const auto call = set.simd != 0 ? encoder_layer_of<float, float> : encoder_layer_of<uint16_t, uint16_t>;
    call(set, {3, 0, 40}, 2, 4, 64, 128);
    call(set, {17}, 0, 3, 96, 32);
    if (quick) continue;
    call(set, {129, 1, 64}, 0, 12, 96, 416);
    call(set, {300, 200}, 7, 2, 64, 96);
    if (set.simd == 0) encoder_layer_of<uint16_t, float>(set, {17, 30}, 3, 2, 64, 96);
  }
}

// Several callers at once, as where Python threads serve requests: with one model and their own states.
void callers_at_once(const std::vector<Set>& sets) {
  for (const Set& set : sets) {
    if (set.simd == 0) continue;  // every kernel for AMX takes the same way
    const Way way{Edge::kEnd, 2};
    const int64_t rows = 45, features = 96, depth = 64;
    const auto x = input<float>(rows * depth, way), weight = input<float>(features * depth, way);
    auto packed = output<float>(features * depth, way, kAligned);
    pack(set, weight.data(), packed.data(), features, depth);
    packed.freeze();
    const auto offsets = input_of(std::vector<int32_t>{0, 20, 45}, way);
    const auto call = [&] {
      const auto y = output<float>(rows * features, way, kAligned);
      linear::simd_forward({x.data(), packed.data(), nullptr, nullptr, y.data(), rows, depth, features,
                            linear::Post::kGeluErf},
                           static_cast<Simd>(set.simd), way.threads);
      const auto out = output<float>(rows * 32, way), lse = output<float>(2 * rows, way);
      attention::simd_forward({y.data(), offsets.data(), out.data(), lse.data(), rows, 2, 2, 16, 0.25f},
                              static_cast<Simd>(set.simd), way.threads);
    };
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i) callers.emplace_back(call);
    for (auto& caller : callers) caller.join();
    calls["callers at once, " + set.name] += 4;
  }
}

int run(bool quick) {
  const auto sets = instruction_sets();
  element_wise(quick);
  attention(sets, quick);
  linear_layers(sets, quick);
  checksums(quick);
  encoder_layers(sets, quick);
  callers_at_once(sets);
  for (const auto& [kernel, count] : calls) std::printf("%s: %d calls\n", kernel.c_str(), count);
  return EXIT_SUCCESS;
}

// Faults, each of a kind that a kernel may have. The compiler must not see through them.

template <typename T>
T hidden(T value) {
  asm volatile("" : "+r"(value));
  return value;
}

const Way kAtTheEnd{Edge::kEnd, 1}, kAtTheStart{Edge::kStart, 1};

void read_past_the_end() {
  const auto buffer = input<float>(13, kAtTheStart);
  hidden(buffer[hidden(13)]);
}

void read_before_the_start() {
  const auto buffer = input<float>(14, kAtTheEnd);  // whole pairs of words: that is how exact the sanitizer is here
  hidden(buffer[hidden(-1)]);
}

__attribute__((target("avx2"))) void masked_read_past_the_end() {
  const auto buffer = input<float>(13, kAtTheEnd);
  const __m256 values = _mm256_maskload_ps(buffer.data() + hidden(8), _mm256_set1_epi32(-1));
  hidden(_mm256_cvtss_f32(values) > 0.0f);
}

__attribute__((target("avx2"))) void masked_write_past_the_end() {
  const auto buffer = output<float>(13, kAtTheEnd, kAligned);
  _mm256_maskstore_ps(buffer.data() + hidden(8), _mm256_set1_epi32(-1), _mm256_setzero_ps());
}

void write_to_an_input() { input<float>(13, kAtTheEnd)[hidden(3)] = 1.0f; }

void read_past_scratch() {
  const AlignedArray<float> scratch = aligned_array<float>(64);
  hidden(scratch.get()[hidden(64)] > 0.0f);
}

void tile_past_scratch() {
  const AlignedArray<float> scratch = aligned_array<float>(128);
  const unsigned char config[64] = {1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64,
                                    0, 64, 0, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 16, 16, 16, 16,
                                    16, 16, 16};
  tiles::configure(config);
  tiles::load(0, scratch.get(), 64);
}

void misaligned() {
  const auto buffer = output<char>(13, kAtTheStart);
  hidden(*reinterpret_cast<const int*>(buffer.data() + hidden(1)));
}

void shift() { hidden(1 << hidden(32)); }

void overflow() { hidden(hidden(INT32_MAX) + 1); }

void bounds() {
  int numbers[4] = {1, 2, 3, 4};
  hidden(numbers[hidden(4)]);
}

void allocation() {
  std::vector<int> sizes(3);
#pragma omp parallel for schedule(static, 1) num_threads(3)
  for (int i = 0; i < 3; ++i) sizes[static_cast<size_t>(i)] = static_cast<int>(std::vector<int>(hidden(9)).size());
}

void race() {
  int64_t sum = 0;
#pragma omp parallel for schedule(static, 1) num_threads(3)
  for (int i = 0; i < 3; ++i) sum += hidden(i);
  hidden(sum);
}

const std::map<std::string, void (*)()> kFaults = {
    {"read_past_the_end", read_past_the_end},
    {"read_before_the_start", read_before_the_start},
    {"masked_read_past_the_end", masked_read_past_the_end},
    {"masked_write_past_the_end", masked_write_past_the_end},
    {"write_to_an_input", write_to_an_input},
    {"read_past_scratch", read_past_scratch},
    {"tile_past_scratch", tile_past_scratch},
    {"misaligned", misaligned},
    {"shift", shift},
    {"overflow", overflow},
    {"bounds", bounds},
    {"allocation", allocation},
    {"race", race},
};

}  // namespace
}  // namespace fastbert

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  fastbert::start();
  if (what.empty() || what == "--quick") return fastbert::run(what == "--quick");
  const auto fault = fastbert::kFaults.find(what);
  if (fault != fastbert::kFaults.end()) {
    fault->second();
    return EXIT_SUCCESS;
  }
  std::fprintf(stderr, "host_kernels: %s is no fault that there is\n", what.c_str());
  return EXIT_FAILURE;
}
