#pragma once

// Marks what the host and the CUDA compiler both build.
#if defined(__CUDACC__)
#define FASTBERT_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Inlined into every clone of FASTBERT_CLONES, so that each gets its own instructions.
#define FASTBERT_HD inline __attribute__((always_inline))
#else
#define FASTBERT_HD inline
#endif

// One wheel serves every x86-64: the loader picks the widest clone that the machine can run.
#if defined(FASTBERT_HAVE_CLONES)
#define FASTBERT_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FASTBERT_CLONES
#endif
