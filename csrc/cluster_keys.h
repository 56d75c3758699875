// Spherical k-means of the keys of each segment (RetroInfer, section 4.2).
#pragma once

#include "views.h"

namespace retro {

struct ClusterKeysParams {
  DType dtype;
  int64_t batch, heads, tokens, head_dim;
  Rows keys;             // [B, Hkv, T, D]
  const int64_t* spans;  // [B, 2]: first token to cluster, and the one after the last
  int64_t cluster_size, segment_size, iterations;
  int32_t* assignment;  // [B, Hkv, T]: cluster of each token; -1 outside the span
};

// tokens / size, halves up, at least one; any size, since nothing overflows.
RETRO_HOST_DEVICE inline int64_t parts(int64_t tokens, int64_t size) {
  const int64_t rest = tokens % size;
  const int64_t count = tokens / size + (rest >= size - rest);
  return count > 0 ? count : 1;
}

// Clusters that `tokens` tokens become: tokens / cluster_size, halves up, at least one.
RETRO_HOST_DEVICE inline int64_t cluster_count(int64_t tokens, int64_t cluster_size) {
  return tokens > 0 ? parts(tokens, cluster_size) : 0;
}

// Clusters of a segment, out of `clusters`, that are for outliers: the last ones, empty before the pass
// that gives them their keys. Where every token may have a cluster, there are none.
constexpr int64_t kOutlierShare = 8;
constexpr int64_t kOutlierPass = 2;

RETRO_HOST_DEVICE inline int64_t outlier_count(int64_t tokens, int64_t clusters) {
  return clusters < tokens ? clusters / kOutlierShare : 0;
}

// Clusters of a segment that take part in a pass.
RETRO_HOST_DEVICE inline int64_t clusters_in_pass(
    int64_t clusters, int64_t outliers, int64_t pass) {
  return pass < kOutlierPass ? clusters - outliers : clusters;
}

// Segments that a span of `tokens` tokens is cut into: tokens / segment_size, halves up, at least one.
RETRO_HOST_DEVICE inline int64_t segment_count(int64_t tokens, int64_t segment_size) {
  return parts(tokens, segment_size);
}

inline Call<ClusterKeysParams> cluster_keys_call(
    const Tensor& keys,
    const Tensor& spans,
    int64_t cluster_size,
    int64_t segment_size,
    int64_t iterations,
    Tensor& assignment) {
  constexpr const char* kOp = "cluster_keys";
  check_shape(kOp, "keys", keys, "B, Hkv, T, D", {kAny, kAny, kAny, kAny});
  check_element_dtype(kOp, "keys", keys);
  const int64_t batch = keys.size(0), heads = keys.size(1), tokens = keys.size(2);
  check_head_dim(kOp, keys.size(3));
  check_shape(kOp, "spans", spans, "B, 2", {batch, 2});
  check_dtype(kOp, "spans", spans, ScalarType::Long);
  check_device(kOp, "spans", spans, keys, "keys");
  check(cluster_size >= 1, kOp, "cluster_size must be at least 1 token, got ", cluster_size);
  check(
      segment_size >= cluster_size, kOp, "segment_size must be at least cluster_size (",
      cluster_size, " tokens), got ", segment_size);
  check(iterations >= 1, kOp, "iterations must be at least 1, got ", iterations);

  assignment = torch::stable::new_empty(keys, {batch, heads, tokens}, ScalarType::Int);
  Call<ClusterKeysParams> call;
  ClusterKeysParams& params = call.params;
  params.dtype = element_dtype(keys);
  params.batch = batch;
  params.heads = heads;
  params.tokens = tokens;
  params.head_dim = keys.size(3);
  params.keys = rows_of(call.hold(readable(keys)));
  params.spans =
      static_cast<const int64_t*>(call.hold(torch::stable::contiguous(spans)).data_ptr());
  params.cluster_size = cluster_size;
  params.segment_size = segment_size;
  params.iterations = iterations;
  params.assignment = static_cast<int32_t*>(assignment.data_ptr());
  return call;
}

}  // namespace retro
