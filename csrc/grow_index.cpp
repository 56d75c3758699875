#include "grow_index.h"

#include "cpu_kernels.h"

namespace retro {
namespace {

constexpr const char* kOp = "grow_index";

void grow_index(
    const Tensor& steady,
    const Tensor& store,
    const Tensor& centroids,
    const Tensor& offsets,
    const Tensor& variances,
    const Tensor& totals,
    const Tensor& counters,
    int64_t sink_tokens,
    int64_t local_tokens,
    int64_t update_segment,
    int64_t cluster_size,
    int64_t iterations,
    int64_t merged_updates,
    int64_t merge_iterations) {
  const Call<GrowIndexParams> call = grow_index_call(
      steady, store, centroids, offsets, variances, totals, counters, sink_tokens, local_tokens,
      update_segment, cluster_size, iterations, merged_updates, merge_iterations);
  const GrowIndexParams& params = call.params;

  const int64_t capacity = steady.size(3);
  for (int64_t b = 0; b < params.batch; ++b) {
    const int64_t* row = params.index.counters + b * kCounters;
    check_count(kOp, b, row[kSteadyTokens], "steady tokens", "the steady zone", capacity);
    check_index_counts(kOp, b, row, store.size(3), centroids.size(3));
    check_count(kOp, b, row[kOpenTokens], "open tokens", "the index", row[kIndexedTokens]);
    const int64_t open_updates = row[kOpenTokens] / update_segment;
    check(
        open_updates * cluster_count(update_segment, cluster_size) <= row[kClusters], kOp,
        "counters say that row ", b, " has ", row[kOpenTokens], " open tokens, but only ",
        row[kClusters], " clusters");
  }
  // No row can come to hold that many tokens; beyond here the sum of the three cannot overflow.
  if (sink_tokens > capacity || local_tokens > capacity - sink_tokens ||
      update_segment > capacity - sink_tokens - local_tokens) {
    return;
  }
  const int64_t full = sink_tokens + local_tokens + update_segment;
  for (int64_t b = 0; b < params.batch; ++b) {
    const int64_t* row = params.index.counters + b * kCounters;
    if (row[kSteadyTokens] < full) continue;
    const int64_t segments = (row[kSteadyTokens] - full) / update_segment + 1;
    check(
        row[kIndexedTokens] + segments * update_segment <= store.size(3), kOp, "store of ",
        store.size(3), " tokens holds ", row[kIndexedTokens], " of row ", b, ", ",
        segments * update_segment, " more do not fit");
    const int64_t clusters = segments * cluster_count(update_segment, cluster_size);
    check(
        row[kClusters] + clusters <= centroids.size(3), kOp, "index of ", centroids.size(3),
        " clusters holds ", row[kClusters], " of row ", b, ", ", clusters, " more do not fit");
  }
  cpu_kernels().grow_index(params);
}

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CPU, m) { m.impl("grow_index", TORCH_BOX(&retro::grow_index)); }
