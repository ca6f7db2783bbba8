#include <algorithm>
#include <cstdint>

#include "../common/philox_host.h"
#include "dropout.h"

namespace fastbert::attention {
namespace {

constexpr int64_t kTile = 512;    // keys whose draws sit in the first-level cache
constexpr int64_t kGrain = 32768;  // elements below which waking another thread costs more than it saves

// The probabilities of one query: p [keys].
FASTBERT_CLONES void drop_row(const Dropout& args, int64_t row, float* p) {
  const int64_t query = row % args.queries;
  const int64_t head = row / args.queries % args.heads;
  const int64_t sequence = args.first_sequence + row / (args.queries * args.heads);
  const auto seed = static_cast<uint64_t>(args.seed);
  alignas(64) uint16_t draws[kTile];
  for (int64_t start = 0; start < args.keys; start += kTile) {
    const int64_t count = std::min(kTile, args.keys - start);
    attention_draws(seed, sequence, head, query, start / kDrawsPerCall, count, draws);
    for (int64_t key = 0; key < count; ++key) {
      p[start + key] = draws[key] < args.threshold ? p[start + key] * args.scale : 0.0f;
    }
  }
}

}  // namespace

void dropout_host(const Dropout& args, int num_threads) {
  const int64_t rows = args.sequences * args.heads * args.queries;
  [[maybe_unused]] const int threads =
      static_cast<int>(std::clamp<int64_t>(rows * args.keys / kGrain, 1, num_threads));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    drop_row(args, row, args.probabilities + row * args.keys);
  }
}

}  // namespace fastbert::attention
