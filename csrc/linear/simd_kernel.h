// No include guard: included by common/simd_levels.h for each instruction set, after common/simd_tile.h.

// GELU as max(x, 0) - q, where q is |x| times the tail of the distribution: no digits cancel on either side.
// erfc(z) is exp(-z²) times a polynomial of t = 1 / (1 + 0.3275911 z), off by at most 1.5e-7: Abramowitz and Stegun,
// Handbook of Mathematical Functions, 7.1.26.
FASTBERT_SIMD_INLINE Vector gelu_erf(Vector x) {
  const Vector zero = {};
  const Vector magnitude = larger(x, -x);
  const Vector t = 1.0f / (magnitude * (0.3275911f * 0.70710678f) + 1.0f);
  Vector sum = t * 1.061405429f - 1.453152027f;
  sum = sum * t + 1.421413741f;
  sum = sum * t - 0.284496736f;
  sum = sum * t + 0.254829592f;
  const Vector density = exp_of(x * x * -0.5f);
  return larger(x, zero) - magnitude * 0.5f * (sum * t * density);
}

// x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x³): arXiv:1606.08415, section 2, with tanh as an exponential.
FASTBERT_SIMD_INLINE Vector gelu_tanh(Vector x) {
  const Vector exponent = (x * x * 0.044715f + 1.0f) * x * (-2.0f * 0.79788456f);
  const Vector highest = Vector{} + 88.0f;
  return x / (1.0f + exp_of(exponent > highest ? highest : exponent));
}

// A finished tile [rows, kFeatures] of y, in the first-level cache.
FASTBERT_SIMD void finish(const Linear<float>& args, int64_t row, int64_t rows, int64_t feature) {
  for (int64_t i = row; i < row + rows; ++i) {
    for (int half = 0; half < 2; ++half) {
      const int64_t offset = i * args.features + feature + half * kLanes;
      const Vector value = load(args.y + offset);
      if (args.post == Post::kGeluErf) store(args.y + offset, gelu_erf(value));
      if (args.post == Post::kGeluTanh) store(args.y + offset, gelu_tanh(value));
      if (args.post == Post::kAdd) store(args.y + offset, value + load(args.other + offset));
    }
  }
}

// That of element i, which need not exist.
FASTBERT_SIMD_INLINE uintptr_t address_of(const float* first, int64_t i) {
  return reinterpret_cast<uintptr_t>(first) + static_cast<uintptr_t>(i) * sizeof(float);
}

// Rows first_row .. last_row - 1 and features first_feature .. last_feature - 1, of which there are some, in scratch
// [kRows, kStride]. The weight passes once, block by block. Ahead of their use, the next block of it is asked for with
// the first rows of a block, and the next rows of x with all others.
FASTBERT_SIMD void compute(const Linear<float>& args, int64_t first_row, int64_t last_row, int64_t first_feature,
                           int64_t last_feature, float* scratch) {
  alignas(64) static constexpr float kZeros[kFeatures] = {};
  const int64_t rows = last_row - first_row;
  const int64_t panels = (rows + kRows - 1) / kRows;
  const int64_t size = rows >= kManyRows ? kLargeBlock : kBlock;
  const int64_t rows_each = (kRows * kFeatures + size - 1) / size;  // of the next x, for each tile of a block
  const int64_t lines_each = (kFeatures / 4 + panels - 1) / panels;  // of the next block's four terms, for each panel
  for (int64_t block = first_feature; block < last_feature; block += size) {
    const int64_t end = std::min(block + size, last_feature);
    for (int64_t k = 0; k < args.depth; k += kChunk) {
      const int64_t terms = std::min(kChunk, args.depth - k);
      const bool last = k + terms == args.depth;
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t row = first_row + rows * panel / panels;
        const int64_t next_row = first_row + rows * (panel + 1) / panels;
        for (int64_t i = 0; i < next_row - row; ++i) {
          __builtin_memcpy(scratch + i * kStride, args.x + (row + i) * args.depth + k, terms * sizeof(float));
        }
        for (int64_t feature = block; feature < end; feature += kFeatures) {
          const float* weight = args.weight + feature * args.depth + k * kFeatures;
          const float* start = k > 0 ? nullptr : args.bias != nullptr ? args.bias + feature : kZeros;
          Ahead ahead;
          if (panel * lines_each < kFeatures / 4) {
            const int64_t next = last ? (feature + end - block) * args.depth
                                      : feature * args.depth + (k + terms) * kFeatures;
            ahead = {address_of(args.weight, next + panel * lines_each * (terms / 4) * 16), lines_each, 64,
                     64 * lines_each};
          } else {
            const int64_t next = (next_row + (feature - block) / kFeatures * rows_each) * args.depth + k;
            ahead = {address_of(args.x, next), rows_each, args.depth * 4, 16};
          }
          kTiles[next_row - row - 1](scratch, weight, terms, start, args.y + row * args.features + feature,
                                     args.features, ahead);
          if (last && args.post != Post::kNone) finish(args, row, next_row - row, feature);
        }
      }
    }
  }
}

FASTBERT_SIMD void pack(const float* weight, float* packed, int64_t features, int64_t depth) {
  for (int64_t feature = 0; feature < features; feature += kFeatures) {
    for (int64_t k = 0; k < depth; ++k, packed += kFeatures) {
      for (int64_t i = 0; i < kFeatures; ++i) packed[i] = weight[(feature + i) * depth + k];
    }
  }
}
