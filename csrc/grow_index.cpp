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
    const Tensor& residuals,
    const Tensor& counters,
    int64_t sink_tokens,
    int64_t local_tokens,
    int64_t update_segment,
    int64_t cluster_size,
    int64_t iterations) {
  check_shape(kOp, "steady", steady, "2, B, Hkv, S, D", {2, kAny, kAny, kAny, kAny});
  check_element_dtype(kOp, "steady", steady);
  check_rows(kOp, "steady", steady);
  const int64_t batch = steady.size(1), heads = steady.size(2), head_dim = steady.size(4);
  check_head_dim(kOp, head_dim);
  check_index(
      kOp, store, centroids, offsets, variances, residuals, counters, batch, heads, head_dim,
      steady.scalar_type());
  check(sink_tokens >= 0, kOp, "sink_tokens must not be negative, got ", sink_tokens);
  check(local_tokens >= 0, kOp, "local_tokens must not be negative, got ", local_tokens);
  check(cluster_size >= 1, kOp, "cluster_size must be at least 1 token, got ", cluster_size);
  check(
      update_segment >= cluster_size, kOp, "update_segment must be at least cluster_size (",
      cluster_size, " tokens), got ", update_segment);
  check(iterations >= 1, kOp, "iterations must be at least 1, got ", iterations);

  GrowIndexParams params;
  params.dtype = element_dtype(steady);
  params.batch = batch;
  params.heads = heads;
  params.head_dim = head_dim;
  params.steady_keys = half_of(steady, 0);
  params.steady_values = half_of(steady, 1);
  params.sink_tokens = sink_tokens;
  params.local_tokens = local_tokens;
  params.update_segment = update_segment;
  params.cluster_size = cluster_size;
  params.iterations = iterations;
  params.index = index_view(store, centroids, offsets, variances, residuals, counters);

  const int64_t capacity = steady.size(3);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t* row = params.index.counters + b * kCounters;
    check_count(kOp, b, row[kSteadyTokens], "steady tokens", "the steady zone", capacity);
    check_index_counts(kOp, b, row, store.size(3), centroids.size(3));
  }
  // No row can come to hold that many tokens; beyond here the sum of the three cannot overflow.
  if (sink_tokens > capacity || local_tokens > capacity - sink_tokens ||
      update_segment > capacity - sink_tokens - local_tokens) {
    return;
  }
  const int64_t full = sink_tokens + local_tokens + update_segment;
  for (int64_t b = 0; b < batch; ++b) {
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
