// Tokens that have gathered in the steady zone become clusters of the index (RetroInfer, section 4.2).
#pragma once

#include "pack_clusters.h"

namespace retro {

struct GrowIndexParams {
  DType dtype;
  int64_t batch, heads, head_dim;
  Rows steady_keys, steady_values;  // [B, Hkv, S, D]
  int64_t steady_capacity;
  int64_t sink_tokens, local_tokens, update_segment, cluster_size, iterations;
  int64_t merged_updates, merge_iterations;
  IndexView index;
};

// Tokens that are clustered anew together; 0: never, since there is no room for so many, or nothing to
// merge.
RETRO_HOST_DEVICE inline int64_t merged_tokens(const GrowIndexParams& params) {
  if (params.merged_updates < 2) return 0;
  if (params.merged_updates > params.index.tokens / params.update_segment) return 0;
  return params.merged_updates * params.update_segment;
}

inline Call<GrowIndexParams> grow_index_call(
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
  constexpr const char* kOp = "grow_index";
  check_shape(kOp, "steady", steady, "2, B, Hkv, S, D", {2, kAny, kAny, kAny, kAny});
  check_element_dtype(kOp, "steady", steady);
  check_rows(kOp, "steady", steady);
  const int64_t batch = steady.size(1), heads = steady.size(2), head_dim = steady.size(4);
  check_head_dim(kOp, head_dim);
  check_index(
      kOp, store, centroids, offsets, variances, totals, counters, steady, "steady", batch, heads,
      head_dim);
  check(sink_tokens >= 0, kOp, "sink_tokens must not be negative, got ", sink_tokens);
  check(local_tokens >= 0, kOp, "local_tokens must not be negative, got ", local_tokens);
  check(cluster_size >= 1, kOp, "cluster_size must be at least 1 token, got ", cluster_size);
  check(
      update_segment >= cluster_size, kOp, "update_segment must be at least cluster_size (",
      cluster_size, " tokens), got ", update_segment);
  check(iterations >= 1, kOp, "iterations must be at least 1, got ", iterations);
  check(merged_updates >= 1, kOp, "merged_updates must be at least 1, got ", merged_updates);
  check(merge_iterations >= 1, kOp, "merge_iterations must be at least 1, got ", merge_iterations);

  Call<GrowIndexParams> call;
  GrowIndexParams& params = call.params;
  params.dtype = element_dtype(steady);
  params.batch = batch;
  params.heads = heads;
  params.head_dim = head_dim;
  params.steady_keys = half_of(steady, 0);
  params.steady_values = half_of(steady, 1);
  params.steady_capacity = steady.size(3);
  params.sink_tokens = sink_tokens;
  params.local_tokens = local_tokens;
  params.update_segment = update_segment;
  params.cluster_size = cluster_size;
  params.iterations = iterations;
  params.merged_updates = merged_updates;
  params.merge_iterations = merge_iterations;
  params.index = index_view(store, centroids, offsets, variances, totals, counters);
  return call;
}

}  // namespace retro
