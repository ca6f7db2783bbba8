#pragma once

#include <cstdint>

#if defined(FASTBERT_HAVE_AMX)
#include <immintrin.h>
#endif

// What the host kernels for the matrix unit of AMX share (Intel 64 and IA-32 Architectures Software Developer's Manual,
// volume 1, chapter 18).
namespace fastbert {

// Why this build or this machine can't run them, or null. The first call asks the kernel for the tiles' registers.
const char* amx_missing();

#if defined(FASTBERT_HAVE_AMX)

#define FASTBERT_AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))
#define FASTBERT_AMX_INLINE FASTBERT_AMX inline __attribute__((always_inline))

// A tile has 16 rows of 64 bytes. _tile_dpbf16ps(C, A, B) adds to C [16, 16], float32, the product of A [16, 32] and of
// a B that holds 32 rows in pairs: dword (i, n) of its 16 x 16 is rows 2i and 2i + 1 of column n.
constexpr int64_t kTile = 16;
constexpr int64_t kDepth = 32;
constexpr int64_t kTileElements = kTile * kDepth;

// Eight tiles of full size.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// 16 rows of 16 dwords, transposed.
FASTBERT_AMX_INLINE void transpose16(__m512i (&rows)[16]) {
  __m512i other[16];
  for (int i = 0; i < 16; i += 2) {
    other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  // rows[4 * i + j]: column 4 * lane + j of rows 4 * i to 4 * i + 3, in 128-bit lanes.
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(other[i], other[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(other[i], other[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(other[i + 1], other[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(other[i + 1], other[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i low01 = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0x88);       // lanes 0 and 2 of both
    const __m512i high01 = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0xDD);      // lanes 1 and 3
    const __m512i low23 = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0x88);
    const __m512i high23 = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0xDD);
    other[j] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    other[8 + j] = _mm512_shuffle_i32x4(low01, low23, 0xDD);
    other[4 + j] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    other[12 + j] = _mm512_shuffle_i32x4(high01, high23, 0xDD);
  }
  for (int i = 0; i < 16; ++i) rows[i] = other[i];
}

// 32 elements of a row from column on, zeros from size on.
FASTBERT_AMX_INLINE __m512i load32(const uint16_t* row, int64_t column, int64_t size) {
  const int64_t left = size - column;
  const __mmask32 mask = left >= kDepth ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
  return _mm512_maskz_loadu_epi16(mask, row + column);
}

// 2^x: the integer part goes to the exponent; the rest, at most 1/2 in magnitude, into the series of
// exp(x log 2) to the sixth power, whose remainder is below 2e-7 of the result. -inf becomes 0, a NaN stays one.
FASTBERT_AMX_INLINE __m512 exp2_of(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-1000.0f), x);
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, whole);
  __m512 sum = _mm512_set1_ps(1.5403530e-4f);
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.3333558e-3f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(9.6181291e-3f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.5504109e-2f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(2.4022651e-1f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(6.9314718e-1f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(sum, whole);
}

#endif

}  // namespace fastbert
