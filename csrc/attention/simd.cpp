#include "simd.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "../common/aligned_array.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastbert::attention {

#if !defined(FASTBERT_HAVE_SIMD)

void simd_forward(const Packed<float>&, Simd, int) {}

#else

namespace {

#define FASTBERT_SIMD_KERNEL "../attention/simd_kernel.h"
#include "../common/simd_levels.h"

}  // namespace

void simd_forward(const Packed<float>& args, Simd simd, int num_threads) {
  const bool wide = simd == Simd::kV4;
  int64_t longest = 0;
  for (int64_t i = 0; i < args.sequences; ++i) {
    longest = std::max<int64_t>(longest, args.cu_seqlens[i + 1] - args.cu_seqlens[i]);
  }
  const int64_t used = args.cu_seqlens[args.sequences];
  std::fill(args.out + used * args.heads * args.size, args.out + args.rows * args.heads * args.size, 0.0f);
  for (int64_t head = 0; head < args.heads; ++head) {
    std::fill(args.lse + head * args.rows + used, args.lse + (head + 1) * args.rows, 0.0f);
  }
  const int64_t items = args.sequences * args.heads;
  const int threads = static_cast<int>(std::clamp<int64_t>(items, 1, num_threads));
  // A thread takes the heads of a sequence one after the other, unless there are too few sequences for that.
  [[maybe_unused]] const int64_t run = args.sequences >= 2 * threads ? args.heads : 1;
  const int64_t floats = wide ? v4::scratch_floats(longest, args.size) : v3::scratch_floats(longest, args.size);
  const AlignedArray<float> memory = aligned_array<float>(threads * floats);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#if defined(_OPENMP)
    float* const own = memory.get() + omp_get_thread_num() * floats;
#else
    float* const own = memory.get();
#endif
#pragma omp for schedule(dynamic, run)
    for (int64_t item = 0; item < items; ++item) {
      const int64_t sequence = item / args.heads;
      if (args.cu_seqlens[sequence] == args.cu_seqlens[sequence + 1]) continue;
      if (wide) {
        v4::attend(args, sequence, item % args.heads, v4::divide(own, longest, args.size));
      } else {
        v3::attend(args, sequence, item % args.heads, v3::divide(own, longest, args.size));
      }
    }
  }
}

#endif

}  // namespace fastbert::attention
