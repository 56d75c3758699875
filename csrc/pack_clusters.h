// Writes clustered tokens into the KV store, cluster after cluster, and describes them in the wave index.
#pragma once

#include "views.h"

namespace retro {

// The wave index and the KV store, as the ops that write them see them.
struct IndexView {
  Rows store_keys, store_values;        // [B, Hkv, N, D]
  Rows centroid_keys, centroid_values;  // [B, Hkv, C, D]: mean key, mean value
  int32_t* offsets;                     // [B, Hkv, C + 1]: first slot of each cluster in the store
  float* variances;                 // [B, Hkv, C]: mean squared distance of a key to its centroid
  float* residuals;                 // [B, Hkv, D]: squared residuals summed over indexed keys
  float* value_sums;                // [B, Hkv, D]: values summed over indexed tokens
  int64_t* counters;                // [B, kCounters]
  int64_t heads, clusters, tokens;  // Hkv, C, N
};

struct PackClustersParams {
  DType dtype;
  int64_t batch, heads, tokens, head_dim;
  Rows keys, values;          // [B, Hkv, T, D]
  const int32_t* assignment;  // [B, Hkv, T]; -1: not packed
  int64_t cluster_size;
  const int64_t* packed;  // [B]: tokens to pack of each row; CPU only
  IndexView index;
};

// Shapes, dtypes and layout of the tensors behind an IndexView; `like` says on which device.
inline void check_index(
    const char* op,
    const Tensor& store,
    const Tensor& centroids,
    const Tensor& offsets,
    const Tensor& variances,
    const Tensor& totals,
    const Tensor& counters,
    const Tensor& like,
    const char* like_name,
    int64_t batch,
    int64_t heads,
    int64_t head_dim) {
  const ScalarType dtype = like.scalar_type();
  check_shape(op, "store", store, "2, B, Hkv, N, D", {2, batch, heads, kAny, head_dim});
  check_dtype(op, "store", store, dtype);
  check_rows(op, "store", store);
  check_shape(op, "centroids", centroids, "2, B, Hkv, C, D", {2, batch, heads, kAny, head_dim});
  check_dtype(op, "centroids", centroids, dtype);
  check_rows(op, "centroids", centroids);
  const int64_t clusters = centroids.size(3);
  check_shape(op, "offsets", offsets, "B, Hkv, C + 1", {batch, heads, clusters + 1});
  check_dtype(op, "offsets", offsets, ScalarType::Int);
  check_contiguous(op, "offsets", offsets);
  check_shape(op, "variances", variances, "B, Hkv, C", {batch, heads, clusters});
  check_dtype(op, "variances", variances, ScalarType::Float);
  check_contiguous(op, "variances", variances);
  check_shape(op, "totals", totals, "2, B, Hkv, D", {2, batch, heads, head_dim});
  check_dtype(op, "totals", totals, ScalarType::Float);
  check_contiguous(op, "totals", totals);
  check_counters(op, counters, batch);
  check_device(op, "store", store, like, like_name);
  check_device(op, "centroids", centroids, like, like_name);
  check_device(op, "offsets", offsets, like, like_name);
  check_device(op, "variances", variances, like, like_name);
  check_device(op, "totals", totals, like, like_name);
  check_device(op, "counters", counters, like, like_name);
}

// What the counters of a row say of an index for `tokens` tokens and `clusters` clusters.
inline void check_index_counts(
    const char* op, int64_t row, const int64_t* counters, int64_t tokens, int64_t clusters) {
  check_count(op, row, counters[kIndexedTokens], "indexed tokens", "the store", tokens);
  check_count(op, row, counters[kClusters], "clusters", "the index", clusters);
}

inline IndexView index_view(
    const Tensor& store,
    const Tensor& centroids,
    const Tensor& offsets,
    const Tensor& variances,
    const Tensor& totals,
    const Tensor& counters) {
  IndexView view;
  view.store_keys = half_of(store, 0);
  view.store_values = half_of(store, 1);
  view.centroid_keys = half_of(centroids, 0);
  view.centroid_values = half_of(centroids, 1);
  view.offsets = static_cast<int32_t*>(offsets.data_ptr());
  view.variances = static_cast<float*>(variances.data_ptr());
  view.residuals = static_cast<float*>(totals.data_ptr());
  view.value_sums = view.residuals + totals.numel() / 2;
  view.counters = static_cast<int64_t*>(counters.data_ptr());
  view.heads = centroids.size(2);
  view.clusters = centroids.size(3);
  view.tokens = store.size(3);
  return view;
}

inline Call<PackClustersParams> pack_clusters_call(
    const Tensor& keys,
    const Tensor& values,
    const Tensor& assignment,
    const Tensor& store,
    const Tensor& centroids,
    const Tensor& offsets,
    const Tensor& variances,
    const Tensor& totals,
    const Tensor& counters,
    int64_t cluster_size) {
  constexpr const char* kOp = "pack_clusters";
  check_shape(kOp, "keys", keys, "B, Hkv, T, D", {kAny, kAny, kAny, kAny});
  check_element_dtype(kOp, "keys", keys);
  const int64_t batch = keys.size(0), heads = keys.size(1), tokens = keys.size(2);
  const int64_t head_dim = keys.size(3);
  check_head_dim(kOp, head_dim);
  check_shape(kOp, "values", values, "B, Hkv, T, D", {batch, heads, tokens, head_dim});
  check_dtype(kOp, "values", values, keys.scalar_type());
  check_device(kOp, "values", values, keys, "keys");
  check_shape(kOp, "assignment", assignment, "B, Hkv, T", {batch, heads, tokens});
  check_dtype(kOp, "assignment", assignment, ScalarType::Int);
  check_device(kOp, "assignment", assignment, keys, "keys");
  check_index(
      kOp, store, centroids, offsets, variances, totals, counters, keys, "keys", batch, heads,
      head_dim);
  check(cluster_size >= 1, kOp, "cluster_size must be at least 1 token, got ", cluster_size);

  Call<PackClustersParams> call;
  PackClustersParams& params = call.params;
  params.dtype = element_dtype(keys);
  params.batch = batch;
  params.heads = heads;
  params.tokens = tokens;
  params.head_dim = head_dim;
  params.keys = rows_of(call.hold(readable(keys)));
  params.values = rows_of(call.hold(readable(values)));
  params.assignment =
      static_cast<const int32_t*>(call.hold(torch::stable::contiguous(assignment)).data_ptr());
  params.cluster_size = cluster_size;
  params.packed = nullptr;
  params.index = index_view(store, centroids, offsets, variances, totals, counters);
  return call;
}

}  // namespace retro
