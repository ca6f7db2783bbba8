// No include guard: included by simd_levels.h for each instruction set, where these are defined before: FASTBERT_SIMD,
// the functions' target; kLanes, the floats of a vector; kRows, the most rows of a tile.

#undef FASTBERT_SIMD_INLINE
#define FASTBERT_SIMD_INLINE FASTBERT_SIMD inline __attribute__((always_inline))

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));

// A tile is up to kRows rows of kFeatures sums, all in registers, next to one row of the weight.
constexpr int kFeatures = 2 * kLanes;
// The terms that are summed in one go. The rows of x lie kStride apart, a number that the compiler knows, and that no
// set of a cache sees twice.
constexpr int64_t kChunk = 384;
constexpr int64_t kStride = kChunk + 16;
// Short sums that are then added up: smaller errors than those of one long sum.
constexpr int64_t kSum = 128;

FASTBERT_SIMD_INLINE Vector load(const float* from) {
  Vector value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

FASTBERT_SIMD_INLINE void store(float* to, Vector value) { __builtin_memcpy(to, &value, sizeof value); }

FASTBERT_SIMD_INLINE Vector larger(Vector a, Vector b) { return a > b ? a : b; }

// exp(x) for x <= 88: x / log 2, whose integer part goes to the exponent; the rest, at most 1/2 in magnitude and exact
// by log2(e) in two parts, goes into the series of exp(rest log 2) to the seventh power. -inf becomes 0, a NaN stays one.
FASTBERT_SIMD_INLINE Vector exp_of(Vector x) {
  const Vector lowest = Vector{} - 88.0296919f;  // -127 log 2
  x = x < lowest ? lowest : x;
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float log2e = 1.44269502f, log2e_rest = 1.92596299e-8f;
  const Vector whole = (x * log2e + shift) - shift;
  const Vector rest = x * log2e_rest + (x * log2e - whole);
  Vector sum = rest * 1.5252734e-5f + 1.5403530e-4f;
  sum = sum * rest + 1.3333558e-3f;
  sum = sum * rest + 9.6181291e-3f;
  sum = sum * rest + 5.5504109e-2f;
  sum = sum * rest + 2.4022651e-1f;
  sum = sum * rest + 6.9314718e-1f;
  sum = sum * rest + 1.0f;
  const Integers exponent = (__builtin_convertvector(whole, Integers) + 127) << 23;
  return sum * (Vector)exponent;
}

template <int kCount>
FASTBERT_SIMD_INLINE void add_products(const float* x, const float* weight, Vector (&sums)[kCount][2]) {
  const Vector low = load(weight);
  const Vector high = load(weight + kLanes);
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    const Vector one = x[i * kStride] - Vector{};
    sums[i][0] += one * low;
    sums[i][1] += one * high;
  }
}

// Memory to ask for ahead of its use: at every fourth term `lines` lines, `jump` bytes from one to the next; then
// `first` moves on by `advance`. Addresses are numbers here: they may pass the end of what there is, where a pointer may
// not.
struct Ahead {
  uintptr_t first;
  int64_t lines, jump, advance;
};

FASTBERT_SIMD_INLINE void ask_for(uintptr_t address) { __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2); }

// y [kCount, kFeatures] = start + x W, or y += x W where start is null. x [kCount, terms] has rows kStride apart,
// weight is [terms, kFeatures].
template <int kCount>
FASTBERT_SIMD void tile(const float* x, const float* weight, int64_t terms, const float* start, float* y,
                        int64_t y_stride, Ahead ahead) {
  if (start == nullptr) {
    for (int i = 0; i < kCount; ++i) {
      for (int half = 0; half < 2; ++half) __builtin_prefetch(y + i * y_stride + half * kLanes, 1);
    }
  }
  for (int64_t k = 0; k < terms;) {
    Vector sums[kCount][2] = {};
    const int64_t end = k + kSum < terms ? k + kSum : terms;
    for (; k + 4 <= end; k += 4) {
      for (int64_t i = 0; i < ahead.lines; ++i) ask_for(ahead.first + static_cast<uintptr_t>(i * ahead.jump));
      ahead.first += static_cast<uintptr_t>(ahead.advance);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) add_products<kCount>(x + k + i, weight + (k + i) * kFeatures, sums);
    }
    for (; k < end; ++k) add_products<kCount>(x + k, weight + k * kFeatures, sums);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      for (int half = 0; half < 2; ++half) {
        float* const to = y + i * y_stride + half * kLanes;
        store(to, load(start == nullptr ? to : start + half * kLanes) + sums[i][half]);
      }
    }
    start = nullptr;
  }
}

using TileFunction = void (*)(const float*, const float*, int64_t, const float*, float*, int64_t, Ahead);

template <int... kCounts>
constexpr std::array<TileFunction, sizeof...(kCounts)> tile_functions(std::integer_sequence<int, kCounts...>) {
  return {tile<kCounts + 1>...};
}

// kTiles[count - 1] is the tile of `count` rows.
constexpr auto kTiles = tile_functions(std::make_integer_sequence<int, kRows>{});
