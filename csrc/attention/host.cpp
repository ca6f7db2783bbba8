#include <algorithm>
#include <cstdint>

#include "../common/philox_host.h"
#include "dropout.h"

namespace fastbert::attention {
namespace {

constexpr int64_t kTile = 512;    // keys whose draws sit in the first-level cache
constexpr int64_t kGrain = 32768;  // elements below which waking another thread costs more than it saves

// The probabilities of one query: p [keys] from start on, count of them.
FASTBERT_HD void drop(const uint16_t* halves, int64_t count, AttentionKeep keep, float scale, float* p) {
  for (int64_t key = 0; key < count; ++key) p[key] = keep(halves[key]) ? p[key] * scale : 0.0f;
}

// The probabilities of the queries that share their words: p [queries, keys] of one head.
FASTBERT_CLONES void drop_rows(const Dropout& args, int64_t sequence, int64_t head, int64_t query_group, float* p) {
  const int64_t query = 16 * (query_group / 8) + query_group % 8;
  if (query >= args.queries) return;
  const AttentionKeep keep(args.threshold);
  alignas(64) uint16_t first[kTile];
  alignas(64) uint16_t second[kTile];
  for (int64_t start = 0; start < args.keys; start += kTile) {
    const int64_t count = std::min(kTile, args.keys - start);
    attention_draws(static_cast<uint64_t>(args.seed), sequence, head, query_group, start / 16, count, {first, second});
    drop(first, count, keep, args.scale, p + query * args.keys + start);
    if (query + 8 < args.queries) drop(second, count, keep, args.scale, p + (query + 8) * args.keys + start);
  }
}

}  // namespace

void dropout_host(const Dropout& args, int num_threads) {
  const int64_t heads = args.sequences * args.heads;
  const int64_t groups = (args.queries + 15) / 16 * 8;
  [[maybe_unused]] const int threads =
      static_cast<int>(std::clamp<int64_t>(heads * args.queries * args.keys / kGrain, 1, num_threads));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < heads * groups; ++i) {
    const int64_t head = i / groups;
    drop_rows(args, args.first_sequence + head / args.heads, head % args.heads, i % groups,
              args.probabilities + head * args.queries * args.keys);
  }
}

}  // namespace fastbert::attention
