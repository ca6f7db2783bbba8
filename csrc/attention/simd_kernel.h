// No include guard: included by common/simd_levels.h for each instruction set, after common/simd_tile.h.

// Scores of kRows queries, blocks of kChunk keys one after the other.
constexpr int64_t kScores = kRows * kStride;

struct Scratch {
  float* keys;     // [keys / kFeatures, size, kFeatures]; keys count to the next multiple, padded with zeros
  float* values;   // [size / kFeatures, length, kFeatures]; sizes count to the next multiple, padded with zeros
  float* queries;  // [size / kChunk, kRows, kStride]
  float* scores;   // [keys / kChunk, kRows, kStride]
  float* out;      // [kRows, size], not yet divided by the sums of the probabilities
};

constexpr int64_t padded(int64_t count) { return (count + kFeatures - 1) / kFeatures * kFeatures; }

constexpr int64_t blocks(int64_t count) { return (count + kChunk - 1) / kChunk; }

constexpr int64_t aligned(int64_t count) { return (count + 15) / 16 * 16; }

int64_t scratch_floats(int64_t longest, int64_t size) {
  return aligned(padded(longest) * size) + longest * padded(size) + (blocks(size) + blocks(longest)) * kScores +
         kRows * padded(size);
}

Scratch divide(float* memory, int64_t longest, int64_t size) {
  float* const values = memory + aligned(padded(longest) * size);
  float* const queries = values + longest * padded(size);
  float* const scores = queries + blocks(size) * kScores;
  return {memory, values, queries, scores, scores + blocks(longest) * kScores};
}

// Lanes whose number has the bit `step` change places between two rows.
template <int kStep>
FASTBERT_SIMD_INLINE void exchange(Vector& a, Vector& b) {
  Integers low = {}, high = {};
  for (int lane = 0; lane < kLanes; ++lane) {
    low[lane] = lane & kStep ? kLanes + lane - kStep : lane;
    high[lane] = lane & kStep ? kLanes + lane : lane + kStep;
  }
  const Vector first = __builtin_shuffle(a, b, low);
  b = __builtin_shuffle(a, b, high);
  a = first;
}

template <int kStep>
FASTBERT_SIMD_INLINE void transpose(Vector (&rows)[kLanes]) {
  if constexpr (kStep < kLanes) {
    transpose<2 * kStep>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & kStep) == 0) exchange<kStep>(rows[i], rows[i + kStep]);
    }
  }
}

// Up to kLanes elements, then zeros.
FASTBERT_SIMD_INLINE Vector load_part(const float* from, int64_t count) {
  if (count >= kLanes) return load(from);
  alignas(64) float part[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = from[i];
  return load(part);
}

FASTBERT_SIMD void pack_head(const Packed<float>& args, const float* k, int64_t length, const Scratch& s) {
  const int64_t stride = 3 * args.heads * args.size;
  const float* const v = k + args.heads * args.size;
  for (int64_t key = 0; key < padded(length); key += kLanes) {
    float* const to = s.keys + key / kFeatures * args.size * kFeatures + key % kFeatures;
    for (int64_t column = 0; column < args.size; column += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, args.size - column);
      Vector rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        rows[i] = key + i < length ? load_part(k + (key + i) * stride + column, count) : Vector{};
      }
      transpose<1>(rows);
      for (int i = 0; i < count; ++i) store(to + (column + i) * kFeatures, rows[i]);
    }
  }
  for (int64_t column = 0; column < padded(args.size); column += kLanes) {
    float* to = s.values + column / kFeatures * length * kFeatures + column % kFeatures;
    for (int64_t key = 0; key < length; ++key, to += kFeatures) {
      store(to, column < args.size ? load_part(v + key * stride + column, args.size - column) : Vector{});
    }
  }
}

// Each lane and the one at the distance kStep change places.
template <int kStep>
FASTBERT_SIMD_INLINE Vector swap_lanes(Vector x) {
  Integers order = {};
  for (int lane = 0; lane < kLanes; ++lane) order[lane] = lane ^ kStep;
  return __builtin_shuffle(x, order);
}

template <int kStep = kLanes / 2>
FASTBERT_SIMD_INLINE float largest_of(Vector x) {
  if constexpr (kStep == 0) {
    return x[0];
  } else {
    return largest_of<kStep / 2>(larger(x, swap_lanes<kStep>(x)));
  }
}

template <int kStep = kLanes / 2>
FASTBERT_SIMD_INLINE float sum_of(Vector x) {
  if constexpr (kStep == 0) {
    return x[0];
  } else {
    return sum_of<kStep / 2>(x + swap_lanes<kStep>(x));
  }
}

// One row of products of queries and keys -> probabilities times their sum, which it returns; maximum is that of scale
// times the products.
FASTBERT_SIMD float softmax(float* row, int64_t length, float scale, float& maximum) {
  const float lowest = -__builtin_inff();
  Vector largest = Vector{} + lowest;
  for (int64_t first = 0; first < length; first += kChunk) {
    float* const scores = row + first / kChunk * kScores;
    const int64_t count = std::min(kChunk, length - first);
    for (int64_t key = 0; key < count; key += kLanes) store(scores + key, load(scores + key) * scale);
    for (int64_t key = count; key % kLanes != 0; ++key) scores[key] = lowest;
    for (int64_t key = 0; key < count; key += kLanes) largest = larger(load(scores + key), largest);
  }
  maximum = largest_of(largest);
  Vector sums = {};
  for (int64_t first = 0; first < length; first += kChunk) {
    float* const scores = row + first / kChunk * kScores;
    const int64_t count = std::min(kChunk, length - first);
    for (int64_t key = 0; key < count; key += kLanes) {
      const Vector p = exp_of(load(scores + key) - maximum);
      sums += p;
      store(scores + key, p);
    }
  }
  return sum_of(sums);
}

// One head of one sequence, which has some rows.
FASTBERT_SIMD void attend(const Packed<float>& args, int64_t sequence, int64_t head, const Scratch& s) {
  alignas(64) static constexpr float kZeros[kFeatures] = {};
  const int64_t first = args.cu_seqlens[sequence];
  const int64_t length = args.cu_seqlens[sequence + 1] - first;
  const int64_t stride = 3 * args.heads * args.size;
  const float* const q = args.qkv + first * stride + head * args.size;
  pack_head(args, q + args.heads * args.size, length, s);
  const int64_t panels = (length + kRows - 1) / kRows;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t row = length * panel / panels;
    const int64_t count = length * (panel + 1) / panels - row;
    const TileFunction multiply = kTiles[count - 1];
    for (int64_t column = 0; column < args.size; column += kChunk) {
      for (int64_t i = 0; i < count; ++i) {
        __builtin_memcpy(s.queries + column / kChunk * kScores + i * kStride, q + (row + i) * stride + column,
                         std::min(kChunk, args.size - column) * sizeof(float));
      }
    }
    for (int64_t key = 0; key < padded(length); key += kFeatures) {
      float* const scores = s.scores + key / kChunk * kScores + key % kChunk;
      for (int64_t column = 0; column < args.size; column += kChunk) {
        multiply(s.queries + column / kChunk * kScores, s.keys + key * args.size + column * kFeatures,
                 std::min(kChunk, args.size - column), column == 0 ? kZeros : nullptr, scores, kStride, {});
      }
    }
    float sums[kRows];
    for (int64_t i = 0; i < count; ++i) {
      float maximum;
      sums[i] = softmax(s.scores + i * kStride, length, args.scale, maximum);
      args.lse[head * args.rows + first + row + i] = maximum + std::log(sums[i]);
    }
    for (int64_t column = 0; column < args.size; column += kFeatures) {
      for (int64_t key = 0; key < length; key += kChunk) {
        multiply(s.scores + key / kChunk * kScores, s.values + column * length + key * kFeatures,
                 std::min(kChunk, length - key), key == 0 ? kZeros : nullptr, s.out + column, padded(args.size),
                 {});
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const float inverse = 1.0f / sums[i];
      float* const out = args.out + ((first + row + i) * args.heads + head) * args.size;
      const float* const sum = s.out + i * padded(args.size);
      for (int64_t column = 0; column < args.size; ++column) out[column] = sum[column] * inverse;
    }
  }
}
