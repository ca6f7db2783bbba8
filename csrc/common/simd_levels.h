// No include guard: includes FASTBERT_SIMD_KERNEL for each instruction set of Simd, in the namespaces v3 and v4.
// Standard headers come before: nothing of theirs may be compiled for one processor only.

namespace v3 {
#define FASTBERT_SIMD __attribute__((target("arch=x86-64-v3")))
constexpr int kLanes = 8;
constexpr int kRows = 6;
#include "simd_tile.h"
#include FASTBERT_SIMD_KERNEL
#undef FASTBERT_SIMD
}  // namespace v3

namespace v4 {
#define FASTBERT_SIMD __attribute__((target("arch=x86-64-v4")))
constexpr int kLanes = 16;
constexpr int kRows = 14;
#include "simd_tile.h"
#include FASTBERT_SIMD_KERNEL
#undef FASTBERT_SIMD
}  // namespace v4
