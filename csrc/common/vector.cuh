#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastbert {

constexpr int kGroup = 8;  // elements: 16 bytes of a 16-bit type, twice 16 bytes of float

// The elements of one 16-byte access, or back.
__device__ __forceinline__ void unpack(uint4 pack, float (&elements)[4]) {
  elements[0] = bits_float(pack.x);
  elements[1] = bits_float(pack.y);
  elements[2] = bits_float(pack.z);
  elements[3] = bits_float(pack.w);
}

template <typename T>
__device__ __forceinline__ void unpack(uint4 pack, T (&elements)[8]) {
  const uint32_t words[4] = {pack.x, pack.y, pack.z, pack.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) elements[i] = {static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2))};
}

__device__ __forceinline__ uint4 pack(const float (&elements)[4]) {
  return {float_bits(elements[0]), float_bits(elements[1]), float_bits(elements[2]), float_bits(elements[3])};
}

template <typename T>
__device__ __forceinline__ uint4 pack(const T (&elements)[8]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = elements[2 * i].bits | uint32_t{elements[2 * i + 1].bits} << 16;
  return {words[0], words[1], words[2], words[3]};
}

// A plain assignment may be split: the compiler can lose the alignment of a pointer that it moves through a loop.
__device__ __forceinline__ void store_pack(void* to, uint4 pack) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(pack.x), "r"(pack.y), "r"(pack.z), "r"(pack.w)
               : "memory");
#else  // the tests, which run this on the host, and nvcc's pass for the host, which doesn't
  *static_cast<uint4*>(to) = pack;
#endif
}

// values[0 .. count - 1] from consecutive elements, the rest zeros. With kVector, from is 16-byte aligned.
template <bool kVector, typename T>
__device__ __forceinline__ void load(const T* from, int count, float (&values)[kGroup]) {
  if (kVector && count == kGroup) {
    constexpr int kWidth = sizeof(uint4) / sizeof(T);
#pragma unroll
    for (int i = 0; i < kGroup; i += kWidth) {
      T elements[kWidth];
      unpack(__ldg(reinterpret_cast<const uint4*>(from + i)), elements);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) values[i + j] = to_float(elements[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) values[i] = i < count ? to_float(from[i]) : 0.0f;
  }
}

// The inverse of load: values[0 .. count - 1], rounded, to consecutive elements.
template <bool kVector, typename T>
__device__ __forceinline__ void store(const float (&values)[kGroup], int count, T* to) {
  if (kVector && count == kGroup) {
    constexpr int kWidth = sizeof(uint4) / sizeof(T);
#pragma unroll
    for (int i = 0; i < kGroup; i += kWidth) {
      T elements[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) elements[j] = from_float<T>(values[i + j]);
      store_pack(to + i, pack(elements));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i < count) to[i] = from_float<T>(values[i]);
    }
  }
}

}  // namespace fastbert
