#include "amx.h"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>

#include "../common/aligned_array.h"
#include "../common/amx.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastbert::attention {

#if !defined(FASTBERT_HAVE_AMX)

void amx_forward(const Packed<uint16_t>&, int) {}

#else

namespace {

// What one thread works in. Keys count to the next multiple of 32, sizes too; both are padded with zeros.
struct Scratch {
  uint16_t* keys;           // [keys / 16, size / 32] tiles B of Kᵀ
  uint16_t* values;         // [keys / 32, size / 16] tiles B of V
  uint16_t* queries;        // [16, size]
  float* scores;            // [16, keys]
  uint16_t* probabilities;  // [16, keys], not yet divided by their sum
  float* out;               // [16, size]
};

// The bytes of each part of a thread's scratch.
std::array<int64_t, 6> scratch_bytes(int64_t keys, int64_t size) {
  return {keys * size * 2, keys * size * 2, kTile * size * 2, kTile * keys * 4, kTile * keys * 2, kTile * size * 4};
}

Scratch divide(char* memory, int64_t keys, int64_t size) {
  std::array<char*, 6> parts;
  const auto bytes = scratch_bytes(keys, size);
  for (size_t part = 0; part < parts.size(); ++part) {
    parts[part] = memory;
    memory += bytes[part];
  }
  const auto words = [&](size_t part) { return reinterpret_cast<uint16_t*>(parts[part]); };
  const auto floats = [&](size_t part) { return reinterpret_cast<float*>(parts[part]); };
  return {words(0), words(1), words(2), floats(3), words(4), floats(5)};
}

FASTBERT_AMX void pack_keys(const uint16_t* k, int64_t stride, int64_t length, int64_t size, uint16_t* tiles) {
  for (int64_t first = 0; first < round_up(length, kDepth); first += kTile) {
    for (int64_t column = 0; column < size; column += kDepth, tiles += kTileElements) {
      __m512i rows[16];
      for (int64_t i = 0; i < kTile; ++i) {
        const int64_t key = first + i;
        rows[i] = key < length ? load32(k + key * stride, column, size) : _mm512_setzero_si512();
      }
      transpose16(rows);
      for (int i = 0; i < kTile; ++i) _mm512_store_si512(tiles + i * kDepth, rows[i]);
    }
  }
}

FASTBERT_AMX void pack_values(const uint16_t* v, int64_t stride, int64_t length, int64_t size, uint16_t* tiles) {
  const int64_t blocks = round_up(size, kDepth) / kTile;
  for (int64_t key = 0; key < round_up(length, kDepth); key += 2) {
    uint16_t* row = tiles + key / kDepth * blocks * kTileElements + key % kDepth * kTile;
    for (int64_t column = 0; column < size; column += kDepth, row += 2 * kTileElements) {
      const __m512i even = key < length ? load32(v + key * stride, column, size) : _mm512_setzero_si512();
      const __m512i odd = key + 1 < length ? load32(v + (key + 1) * stride, column, size) : _mm512_setzero_si512();
      for (int half = 0; half < 2; ++half) {
        const __m256i low = half ? _mm512_extracti64x4_epi64(even, 1) : _mm512_castsi512_si256(even);
        const __m256i high = half ? _mm512_extracti64x4_epi64(odd, 1) : _mm512_castsi512_si256(odd);
        const __m512i pairs =
            _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
        _mm512_store_si512(row + half * kTileElements, pairs);
      }
    }
  }
}

constexpr float kLog2E = 1.44269504f;
constexpr float kLog2 = 0.693147181f;

// log(x) for normal x > 0: the exponent, and 2 atanh(t) of t = (m - 1) / (m + 1) for the mantissa m in [3/4, 3/2).
FASTBERT_AMX_INLINE __m512 log_of(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 mantissa = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero);
  const __m512 exponent = _mm512_getexp_ps(_mm512_div_ps(x, mantissa));
  const __m512 t = _mm512_div_ps(_mm512_sub_ps(mantissa, one), _mm512_add_ps(mantissa, one));
  const __m512 square = _mm512_mul_ps(t, t);
  __m512 sum = _mm512_set1_ps(2.0f / 9.0f);
  sum = _mm512_fmadd_ps(sum, square, _mm512_set1_ps(2.0f / 7.0f));
  sum = _mm512_fmadd_ps(sum, square, _mm512_set1_ps(2.0f / 5.0f));
  sum = _mm512_fmadd_ps(sum, square, _mm512_set1_ps(2.0f / 3.0f));
  sum = _mm512_fmadd_ps(sum, square, _mm512_set1_ps(2.0f));
  return _mm512_fmadd_ps(exponent, _mm512_set1_ps(kLog2), _mm512_mul_ps(sum, t));
}

// One row: scores [keys] -> probabilities [keys] times their sum, which it returns; maximum is that of scale * scores
// in units of log 2. The scores beyond length are those of padding.
FASTBERT_AMX_INLINE float softmax(const float* scores, uint16_t* probabilities, int64_t length, float scale,
                                  float& maximum) {
  const __m512 factor = _mm512_set1_ps(scale * kLog2E);
  const int64_t whole = length / kTile * kTile;
  const __mmask16 tail = static_cast<__mmask16>((1u << (length - whole)) - 1);
  __m512 largest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int64_t key = 0; key < whole; key += kTile) {
    largest = _mm512_max_ps(largest, _mm512_mul_ps(factor, _mm512_load_ps(scores + key)));
  }
  largest = _mm512_mask_max_ps(largest, tail, largest, _mm512_mul_ps(factor, _mm512_maskz_load_ps(tail, scores + whole)));
  maximum = _mm512_reduce_max_ps(largest);
  const __m512 shift = _mm512_set1_ps(maximum);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t key = 0; key < whole; key += kTile) {
    const __m512 p = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(scores + key), factor, shift));
    sum = _mm512_add_ps(sum, p);
    _mm256_store_si256(reinterpret_cast<__m256i*>(probabilities + key), (__m256i)_mm512_cvtneps_pbh(p));
  }
  for (int64_t key = whole; key < round_up(length, kDepth); key += kTile) {
    const __mmask16 mask = key == whole ? tail : 0;
    const __m512 scaled = _mm512_fmsub_ps(_mm512_maskz_load_ps(mask, scores + key), factor, shift);
    const __m512 p = _mm512_maskz_mov_ps(mask, exp2_of(scaled));
    sum = _mm512_add_ps(sum, p);
    _mm256_store_si256(reinterpret_cast<__m256i*>(probabilities + key), (__m256i)_mm512_cvtneps_pbh(p));
  }
  return _mm512_reduce_add_ps(sum);
}

// scores [16, keys] = Q Kᵀ
FASTBERT_AMX_INLINE void multiply_keys(const uint16_t* q, int64_t stride, const Scratch& s, int64_t keys,
                                       int64_t size) {
  const int64_t step = size / kDepth * kTileElements;  // the tiles of 16 keys
  for (int64_t key = 0; key < keys; key += 2 * kTile) {
    const uint16_t* tiles = s.keys + key / kTile * step;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t column = 0; column < size; column += kDepth, tiles += kTileElements) {
      _tile_loadd(4, q + column, stride * 2);
      _tile_loadd(5, tiles, 64);
      _tile_loadd(6, tiles + step, 64);
      _tile_dpbf16ps(0, 4, 5);
      _tile_dpbf16ps(1, 4, 6);
    }
    _tile_stored(0, s.scores + key, keys * 4);
    _tile_stored(1, s.scores + key + kTile, keys * 4);
  }
}

// out [16, size] = P V
FASTBERT_AMX_INLINE void multiply_values(const Scratch& s, int64_t keys, int64_t size) {
  const int64_t step = size / kTile * kTileElements;  // the tiles of 32 keys
  for (int64_t column = 0; column < size; column += 2 * kTile) {
    const uint16_t* tiles = s.values + column / kTile * kTileElements;
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t key = 0; key < keys; key += kDepth, tiles += step) {
      _tile_loadd(4, s.probabilities + key, keys * 2);
      _tile_loadd(5, tiles, 64);
      _tile_loadd(6, tiles + kTileElements, 64);
      _tile_dpbf16ps(2, 4, 5);
      _tile_dpbf16ps(3, 4, 6);
    }
    _tile_stored(2, s.out + column, size * 4);
    _tile_stored(3, s.out + column + kTile, size * 4);
  }
}

// Ask for `count` rows of queries, keys and values of a head. They lie in short pieces far apart, which the processor
// does not foresee.
FASTBERT_AMX_INLINE void prefetch_head(const Packed<uint16_t>& args, const uint16_t* q, int64_t count) {
  for (int64_t row = 0; row < 3 * count; ++row) {
    const uint16_t* part = q + row * args.heads * args.size;
    for (int64_t column = 0; column < args.size; column += kDepth) {
      _mm_prefetch(reinterpret_cast<const char*>(part + column), _MM_HINT_T1);
    }
  }
}

// One head of one sequence.
FASTBERT_AMX void attend(const Packed<uint16_t>& args, int64_t sequence, int64_t head, const Scratch& s) {
  const TileConfig config;
  _tile_loadconfig(&config);
  const int64_t first = args.cu_seqlens[sequence];
  const int64_t length = args.cu_seqlens[sequence + 1] - first;
  const int64_t keys = round_up(length, kDepth);
  const int64_t size = round_up(args.size, kDepth);
  const int64_t stride = 3 * args.heads * args.size;
  const uint16_t* q = args.qkv + first * stride + head * args.size;
  const uint16_t* k = q + args.heads * args.size;
  pack_keys(k, stride, length, args.size, s.keys);
  pack_values(k + args.heads * args.size, stride, length, args.size, s.values);
  for (int64_t row = 0; row < length; row += kTile) {
    const int64_t count = std::min(kTile, length - row);
    const uint16_t* queries = q + row * stride;
    if (head + 1 < args.heads) prefetch_head(args, queries + args.size, count);
    int64_t query_stride = stride;
    if (count < kTile || size != args.size) {
      for (int64_t i = 0; i < kTile; ++i) {
        for (int64_t column = 0; column < size; column += kDepth) {
          const __m512i part = i < count ? load32(queries + i * stride, column, args.size) : _mm512_setzero_si512();
          _mm512_store_si512(s.queries + i * size + column, part);
        }
      }
      queries = s.queries;
      query_stride = size;
    }
    multiply_keys(queries, query_stride, s, keys, size);
    alignas(64) float maxima[kTile] = {};
    alignas(64) float sums[kTile] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    for (int64_t i = 0; i < count; ++i) {
      sums[i] = softmax(s.scores + i * keys, s.probabilities + i * keys, length, args.scale, maxima[i]);
    }
    multiply_values(s, keys, size);
    for (int64_t i = 0; i < count; ++i) {
      const __m512 factor = _mm512_set1_ps(1.0f / sums[i]);
      uint16_t* out = args.out + ((first + row + i) * args.heads + head) * args.size;
      for (int64_t column = 0; column < args.size; column += kTile) {
        const __m512 value = _mm512_mul_ps(factor, _mm512_load_ps(s.out + i * size + column));
        const int64_t left = args.size - column;
        const auto mask = static_cast<__mmask16>(left >= kTile ? 0xFFFFu : (1u << left) - 1);
        _mm256_mask_storeu_epi16(out + column, mask, (__m256i)_mm512_cvtneps_pbh(value));
      }
    }
    const __m512 lse =
        _mm512_fmadd_ps(_mm512_load_ps(maxima), _mm512_set1_ps(kLog2), log_of(_mm512_load_ps(sums)));
    _mm512_mask_storeu_ps(args.lse + head * args.rows + first + row, static_cast<__mmask16>((1u << count) - 1), lse);
  }
  _tile_release();
}

}  // namespace

void amx_forward(const Packed<uint16_t>& args, int num_threads) {
  int64_t longest = 0;
  for (int64_t i = 0; i < args.sequences; ++i) {
    longest = std::max<int64_t>(longest, args.cu_seqlens[i + 1] - args.cu_seqlens[i]);
  }
  const int64_t used = args.cu_seqlens[args.sequences];
  std::fill(args.out + used * args.heads * args.size, args.out + args.rows * args.heads * args.size, uint16_t{0});
  for (int64_t head = 0; head < args.heads; ++head) {
    std::fill(args.lse + head * args.rows + used, args.lse + (head + 1) * args.rows, 0.0f);
  }
  const int64_t items = args.sequences * args.heads;
  const int threads = static_cast<int>(std::clamp<int64_t>(items, 1, num_threads));
  // A thread takes the heads of a sequence one after the other, unless there are too few sequences for that.
  [[maybe_unused]] const int64_t run = args.sequences >= 2 * threads ? args.heads : 1;
  const int64_t keys = round_up(longest, kDepth), size = round_up(args.size, kDepth);
  const auto parts = scratch_bytes(keys, size);
  const int64_t bytes = whole_lines<char>(std::accumulate(parts.begin(), parts.end(), int64_t{0}));
  const AlignedArray<char> memory = aligned_array<char>(threads * bytes);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#if defined(_OPENMP)
    const Scratch scratch = divide(memory.get() + omp_get_thread_num() * bytes, keys, size);
#else
    const Scratch scratch = divide(memory.get(), keys, size);
#endif
#pragma omp for schedule(dynamic, run)
    for (int64_t item = 0; item < items; ++item) {
      if (args.cu_seqlens[item / args.heads] < args.cu_seqlens[item / args.heads + 1]) {
        attend(args, item / args.heads, item % args.heads, scratch);
      }
    }
  }
}

#endif

}  // namespace fastbert::attention
