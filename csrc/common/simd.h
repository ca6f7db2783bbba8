#pragma once

// What the host kernels in float32 share. Their code is compiled for each instruction set of Simd (simd_levels.h), and
// the caller says which of it runs: weights are packed for one of them.
namespace fastbert {

// The levels of x86-64 (System V ABI, AMD64 supplement, section 3.1.1): AVX2 with FMA, and AVX-512.
enum class Simd : int { kV3 = 3, kV4 = 4 };

// The highest that this build and this processor have, or 0.
int simd_level();

}  // namespace fastbert
