#include "simd.h"

#include <algorithm>
#include <array>
#include <utility>

#include "../common/aligned_array.h"

namespace fastbert::linear {

#if !defined(FASTBERT_HAVE_SIMD)

void simd_pack(const float*, float*, int64_t, int64_t, Simd) {}
void simd_forward(const Linear<float>&, Simd, int) {}

#else

namespace {

// Features whose weights, kBlock x kChunk of them, stay in the second-level cache while all rows of x pass. x is read
// for each block: where it is large, from far away, blocks are larger.
constexpr int64_t kBlock = 128;
constexpr int64_t kLargeBlock = 256;
// Fewer rows for each thread than this are not worth copying apart.
constexpr int64_t kManyRows = 224;

#define FASTBERT_SIMD_KERNEL "../linear/simd_kernel.h"
#include "../common/simd_levels.h"

}  // namespace

void simd_pack(const float* weight, float* packed, int64_t features, int64_t depth, Simd simd) {
  (simd == Simd::kV4 ? v4::pack : v3::pack)(weight, packed, features, depth);
}

void simd_forward(const Linear<float>& args, Simd simd, int num_threads) {
  const bool wide = simd == Simd::kV4;
  const auto compute = wide ? v4::compute : v3::compute;
  const int64_t floats = wide ? v4::kRows * v4::kStride : v3::kRows * v3::kStride;
  // With many rows threads share these, so that each copies its own; with few they share the features, so that each
  // reads its own part of the weight.
  const int64_t panels = args.features / kMultiple;
  const int64_t down = std::clamp<int64_t>(args.rows / kManyRows, 1, num_threads);
  const int64_t across = std::clamp<int64_t>(num_threads / down, 1, panels);
  const int64_t threads = across * down;
  const AlignedArray<float> memory = aligned_array<float>(threads * floats);
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(threads)) if (threads > 1)
  for (int64_t thread = 0; thread < threads; ++thread) {
    const int64_t i = thread / across;
    const int64_t j = thread % across;
    compute(args, args.rows * i / down, args.rows * (i + 1) / down, panels * j / across * kMultiple,
            panels * (j + 1) / across * kMultiple, memory.get() + thread * floats);
  }
}

#endif

}  // namespace fastbert::linear
