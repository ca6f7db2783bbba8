#include "amx.h"

#include <algorithm>
#include <utility>

#include "../common/aligned_array.h"
#include "../common/amx.h"

namespace fastbert::linear {

#if !defined(FASTBERT_HAVE_AMX)

void amx_pack(const uint16_t*, uint16_t*, int64_t, int64_t) {}
void amx_forward(const Linear<uint16_t>&, int) {}

#else

namespace {

using Args = Linear<uint16_t>;

// A thread computes blocks of 32 x 32 results, four tiles of sums, from panels: 32 rows of x, or 32 rows of the weight.
// As many panels of x as fit into half of a second-level cache of 2 MiB lie there as tiles while the weight, which comes
// from further away, passes once, asked for ahead of its use. The sums are made in chunks of kChunk terms, so that the
// chunk of a panel of the weight stays in the first-level cache while it meets all those panels of x; between chunks the
// sums wait in the second level. Bias, activation and rounding of one panel's results are done in between the products of
// the next: the matrix unit and the vector unit then work at the same time.
constexpr int64_t kPanel = 2 * kTile;
constexpr int64_t kBlock = kPanel * kPanel;
constexpr int64_t kStep = 2 * kTileElements;  // 32 rows of 32 terms, two tiles
constexpr int64_t kChunk = 384;
constexpr int64_t kCacheElements = int64_t{1} << 19;
// Fewer panels of x for each thread than this are not worth packing apart.
constexpr int64_t kOwnPanels = 8;
// Results that no cache near the core can hold, more than 4 MiB, go to memory without being fetched from it first.
constexpr int64_t kStreamedElements = int64_t{1} << 21;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 1 / x for 1 <= x < 2^126: the estimate has 14 bits, and one step of Newton's method doubles them.
FASTBERT_AMX_INLINE __m512 reciprocal(__m512 x) {
  const __m512 estimate = _mm512_rcp14_ps(x);
  return _mm512_mul_ps(estimate, _mm512_fnmadd_ps(x, estimate, _mm512_set1_ps(2.0f)));
}

// GELU as max(x, 0) - q, where q is |x| times the tail of the distribution: no digits cancel on either side.
// erfc(z) is exp(-z²) times a polynomial of t = 1 / (1 + 0.3275911 z), off by at most 1.5e-7: Abramowitz and Stegun,
// Handbook of Mathematical Functions, 7.1.26.
FASTBERT_AMX_INLINE __m512 gelu_erf(__m512 x) {
  const __m512 magnitude = _mm512_abs_ps(x);
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 t = reciprocal(_mm512_fmadd_ps(magnitude, _mm512_set1_ps(0.3275911f * 0.70710678f), one));
  __m512 sum = _mm512_set1_ps(1.061405429f);
  sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(-1.453152027f));
  sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(1.421413741f));
  sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(-0.284496736f));
  sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(0.254829592f));
  const __m512 density = exp2_of(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-0.5f * 1.44269504f)));
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(sum, t), density);
  const __m512 q = _mm512_mul_ps(_mm512_mul_ps(magnitude, _mm512_set1_ps(0.5f)), tail);
  return _mm512_sub_ps(_mm512_max_ps(_mm512_setzero_ps(), x), q);
}

// x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x³): arXiv:1606.08415, section 2, with tanh as an exponential.
FASTBERT_AMX_INLINE __m512 gelu_tanh(__m512 x) {
  const __m512 square = _mm512_mul_ps(x, x);
  const __m512 inner = _mm512_fmadd_ps(square, _mm512_set1_ps(0.044715f), _mm512_set1_ps(1.0f));
  const __m512 exponent = _mm512_mul_ps(_mm512_mul_ps(inner, x), _mm512_set1_ps(-2.0f * 0.79788456f * 1.44269504f));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exp2_of(exponent)));
}

FASTBERT_AMX_INLINE __m512 widen(const uint16_t* from) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16));
}

// 32 rows of x from row on as tiles A, [depth / 32][2]; rows that don't exist are zero.
FASTBERT_AMX_INLINE void pack_rows(const Args& args, int64_t row, uint16_t* panel) {
  for (int64_t i = 0; i < kPanel; ++i) {
    const bool exists = row + i < args.rows;
    const uint16_t* from = exists ? args.x + (row + i) * args.depth : nullptr;
    for (int64_t k = 0; k < args.depth; k += kDepth) {
      const __m512i part = exists ? _mm512_loadu_si512(from + k) : _mm512_setzero_si512();
      _mm512_store_si512(panel + i * kDepth + k / kDepth * kStep, part);
    }
  }
}

FASTBERT_AMX_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

FASTBERT_AMX_INLINE void load_sums(const float* block) {
  _tile_loadd(0, block, kPanel * 4);
  _tile_loadd(1, block + kTile, kPanel * 4);
  _tile_loadd(2, block + kTile * kPanel, kPanel * 4);
  _tile_loadd(3, block + kTile * kPanel + kTile, kPanel * 4);
}

FASTBERT_AMX_INLINE void store_sums(float* block) {
  _tile_stored(0, block, kPanel * 4);
  _tile_stored(1, block + kTile, kPanel * 4);
  _tile_stored(2, block + kTile * kPanel, kPanel * 4);
  _tile_stored(3, block + kTile * kPanel + kTile, kPanel * 4);
}

FASTBERT_AMX_INLINE void add_products(const uint16_t* x, const uint16_t* weight) {
  _tile_stream_loadd(4, x, 64);
  _tile_loadd(6, weight, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, weight + kTileElements, 64);
  _tile_dpbf16ps(1, 4, 7);
  _tile_stream_loadd(5, x + kTileElements, 64);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// Rows from .. to - 1 of a block of sums whose first row and feature are these: the results.
template <Post kPost>
FASTBERT_AMX_INLINE void finish(const Args& args, const float* block, int64_t row, int64_t feature, int64_t from,
                                int64_t to) {
  __m512 bias[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  if (args.bias != nullptr) {
    bias[0] = widen(args.bias + feature);
    bias[1] = widen(args.bias + feature + kTile);
  }
  for (int64_t i = from; i < std::min(to, args.rows - row); ++i) {
    const int64_t offset = (row + i) * args.features + feature;
    __m512 value[2];
    for (int half = 0; half < 2; ++half) {
      value[half] = _mm512_add_ps(_mm512_load_ps(block + i * kPanel + half * kTile), bias[half]);
      if (kPost == Post::kGeluErf) value[half] = gelu_erf(value[half]);
      if (kPost == Post::kGeluTanh) value[half] = gelu_tanh(value[half]);
      if (kPost == Post::kAdd) value[half] = _mm512_add_ps(value[half], widen(args.other + offset + half * kTile));
    }
    const auto result = (__m512i)_mm512_cvtne2ps_pbh(value[1], value[0]);
    if (args.rows * args.features > kStreamedElements) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(args.y + offset), result);
    } else {
      _mm512_store_si512(args.y + offset, result);
    }
  }
}

// The number of panels of x that are in cache together.
int64_t resident_panels(const Args& args) {
  return std::clamp<int64_t>(kCacheElements / args.depth / kPanel, 1, ceil_div(args.rows, kPanel));
}

// What a thread works in: the panels of x, then two sets of sums, [panels][32, 32] each.
int64_t scratch_floats(const Args& args) {
  return resident_panels(args) * (args.depth * kPanel / 2 + 2 * kBlock);
}

// `panels` panels of x from `row` on, and features first_feature .. last_feature - 1.
template <Post kPost>
FASTBERT_AMX_INLINE void pass(const Args& args, int64_t row, int64_t panels, int64_t first_feature,
                              int64_t last_feature, float* scratch) {
  auto* const x = reinterpret_cast<uint16_t*>(scratch);
  float* sums = scratch + panels * args.depth * kPanel / 2;
  float* waiting = sums + panels * kBlock;  // of the previous features
  for (int64_t panel = 0; panel < panels; ++panel) pack_rows(args, row + panel * kPanel, x + panel * args.depth * kPanel);
  const int64_t ahead = ceil_div(kStep, panels * kDepth) * kDepth;
  for (int64_t feature = first_feature; feature < last_feature; feature += kPanel) {
    for (int64_t k = 0; k < args.depth; k += kChunk) {
      const uint16_t* weight = args.weight + feature * args.depth + k * kPanel;
      const int64_t terms = std::min(kChunk, args.depth - k);
      // A number: it may pass the end of the weight, where a pointer may not.
      auto next = reinterpret_cast<uintptr_t>(weight + terms * kPanel);
      for (int64_t panel = 0; panel < panels; ++panel) {
        if (k == 0) {
          zero_sums();
        } else {
          load_sums(sums + panel * kBlock);
        }
        for (int64_t term = 0; term < terms; term += kDepth) {
          add_products(x + (panel * args.depth + k + term) * kPanel, weight + term * kPanel);
          for (int64_t line = 0; line < ahead; line += kDepth) {
            _mm_prefetch(reinterpret_cast<const char*>(next + static_cast<uintptr_t>(line) * 2), _MM_HINT_T1);
          }
          next += static_cast<uintptr_t>(ahead) * 2;
          if (feature > first_feature) {
            finish<kPost>(args, waiting + panel * kBlock, row + panel * kPanel, feature - kPanel,
                          (k + term) * kPanel / args.depth, (k + term + kDepth) * kPanel / args.depth);
          }
        }
        store_sums(sums + panel * kBlock);
      }
    }
    std::swap(sums, waiting);
  }
  for (int64_t panel = 0; panel < panels; ++panel) {
    finish<kPost>(args, waiting + panel * kBlock, row + panel * kPanel, last_feature - kPanel, 0, kPanel);
  }
}

// Panels first_panel .. last_panel - 1 of x, and features first_feature .. last_feature - 1, of which there are some.
template <Post kPost>
FASTBERT_AMX void compute(const Args& args, int64_t first_panel, int64_t last_panel, int64_t first_feature,
                          int64_t last_feature, float* scratch) {
  const TileConfig config;
  _tile_loadconfig(&config);
  const int64_t panels = last_panel - first_panel;
  const int64_t passes = ceil_div(panels, resident_panels(args));
  for (int64_t i = 0; i < passes; ++i) {
    const int64_t begin = first_panel + panels * i / passes;
    const int64_t end = first_panel + panels * (i + 1) / passes;
    pass<kPost>(args, begin * kPanel, end - begin, first_feature, last_feature, scratch);
  }
  _mm_sfence();
  _tile_release();
}

using Compute = void (*)(const Args&, int64_t, int64_t, int64_t, int64_t, float*);

}  // namespace

FASTBERT_AMX void amx_pack(const uint16_t* weight, uint16_t* packed, int64_t features, int64_t depth) {
  for (int64_t feature = 0; feature < features; feature += kPanel) {
    for (int64_t k = 0; k < depth; k += kDepth) {
      for (int64_t half = 0; half < 2; ++half, packed += kTileElements) {
        __m512i rows[16];
        for (int64_t i = 0; i < kTile; ++i) {
          rows[i] = _mm512_loadu_si512(weight + (feature + half * kTile + i) * depth + k);
        }
        transpose16(rows);
        for (int64_t i = 0; i < kTile; ++i) _mm512_store_si512(packed + i * kDepth, rows[i]);
      }
    }
  }
}

void amx_forward(const Args& args, int num_threads) {
  constexpr Compute functions[] = {compute<Post::kNone>, compute<Post::kGeluErf>, compute<Post::kGeluTanh>,
                                   compute<Post::kAdd>};
  const Compute function = functions[static_cast<int>(args.post)];
  const int64_t row_panels = ceil_div(args.rows, kPanel);
  const int64_t feature_panels = args.features / kPanel;
  // With many rows threads share these, so that each packs its own; with few they share the features, so that each reads
  // its own part of the weight.
  const int64_t down = std::clamp<int64_t>(row_panels / kOwnPanels, 1, num_threads);
  const int64_t across = std::clamp<int64_t>(num_threads / down, 1, feature_panels);
  const int64_t threads = across * down;
  const int64_t floats = whole_lines<float>(scratch_floats(args));
  const AlignedArray<float> memory = aligned_array<float>(threads * floats);
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(threads)) if (threads > 1)
  for (int64_t thread = 0; thread < threads; ++thread) {
    const int64_t i = thread / across;
    const int64_t j = thread % across;
    function(args, row_panels * i / down, row_panels * (i + 1) / down, feature_panels * j / across * kPanel,
             feature_panels * (j + 1) / across * kPanel, memory.get() + thread * floats);
  }
}

#endif

}  // namespace fastbert::linear
