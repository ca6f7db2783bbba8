#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

// What the host kernels in float32 share. Their code is compiled for each instruction set of Simd (simd_levels.h), and
// the caller says which of it runs: weights are packed for one of them.
namespace fastbert {

// The levels of x86-64 (System V ABI, AMD64 supplement, section 3.1.1): AVX2 with FMA, and AVX-512.
enum class Simd : int { kV3 = 3, kV4 = 4 };

// The highest that this build and this processor have, or 0.
int simd_level();

struct FreeAligned {
  void operator()(float* memory) const { std::free(memory); }
};

using AlignedFloats = std::unique_ptr<float, FreeAligned>;

inline AlignedFloats aligned_floats(int64_t count) {
  const auto bytes = static_cast<size_t>((count * 4 + 63) / 64 * 64);
  AlignedFloats memory(static_cast<float*>(std::aligned_alloc(64, bytes)));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace fastbert
