#pragma once

#include <cstdint>
#include <cstring>

#include "macros.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fastbert {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

FASTBERT_HD uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FASTBERT_HD float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FASTBERT_HD float to_float(float value) { return value; }

FASTBERT_HD float to_float(BFloat16 value) { return bits_float(uint32_t{value.bits} << 16); }

// The host's conversions are free of branches, so that loops over them vectorise on any x86-64 and on Arm.
FASTBERT_HD float to_float(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t magnitude = value.bits & 0x7FFFu;
  const uint32_t rebias = 112u << 23;  // exponent bias 15 -> 127
  const uint32_t normal = (magnitude << 13) + rebias + (magnitude >= 0x7C00u ? rebias : 0u);
  const uint32_t subnormal = float_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return bits_float((magnitude < 0x0400u ? subnormal : normal) | (uint32_t{value.bits} & 0x8000u) << 16);
#endif
}

// from_float rounds to nearest, ties to even; a NaN stays one, quiet and with its sign.
template <typename T>
FASTBERT_HD T from_float(float value);

template <>
FASTBERT_HD float from_float<float>(float value) {
  return value;
}

template <>
FASTBERT_HD BFloat16 from_float<BFloat16>(float value) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  const uint32_t nan = bits >> 16 | 0x0040u;
  return {static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded)};
#endif
}

template <>
FASTBERT_HD Half from_float<Half>(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = float_bits(value);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude + 0x0FFFu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  // One unit in the last place of 0.5f is 2^-24, the spacing of half's subnormals: the addition rounds.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;  // below 2^-14
  half = magnitude >= 0x477FF000u ? 0x7C00u : half;              // 65520 and above round to infinity
  half = magnitude > 0x7F800000u ? 0x7E00u : half;
  return {static_cast<uint16_t>(half | (bits >> 16 & 0x8000u))};
#endif
}

}  // namespace fastbert
