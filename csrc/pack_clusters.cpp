#include "pack_clusters.h"

#include <vector>

#include "cpu_kernels.h"

namespace retro {

void check_index(
    const char* op,
    const Tensor& store,
    const Tensor& centroids,
    const Tensor& offsets,
    const Tensor& variances,
    const Tensor& residuals,
    const Tensor& counters,
    int64_t batch,
    int64_t heads,
    int64_t head_dim,
    ScalarType dtype) {
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
  check_shape(op, "residuals", residuals, "B, Hkv, D", {batch, heads, head_dim});
  check_dtype(op, "residuals", residuals, ScalarType::Float);
  check_contiguous(op, "residuals", residuals);
  check_counters(op, counters, batch);
}

void check_index_counts(
    const char* op, int64_t row, const int64_t* counters, int64_t tokens, int64_t clusters) {
  check_count(op, row, counters[kIndexedTokens], "indexed tokens", "the store", tokens);
  check_count(op, row, counters[kClusters], "clusters", "the index", clusters);
}

IndexView index_view(
    const Tensor& store,
    const Tensor& centroids,
    const Tensor& offsets,
    const Tensor& variances,
    const Tensor& residuals,
    const Tensor& counters) {
  IndexView view;
  view.store_keys = half_of(store, 0);
  view.store_values = half_of(store, 1);
  view.centroid_keys = half_of(centroids, 0);
  view.centroid_values = half_of(centroids, 1);
  view.offsets = static_cast<int32_t*>(offsets.data_ptr());
  view.variances = static_cast<float*>(variances.data_ptr());
  view.residuals = static_cast<float*>(residuals.data_ptr());
  view.counters = static_cast<int64_t*>(counters.data_ptr());
  view.heads = centroids.size(2);
  view.clusters = centroids.size(3);
  return view;
}

namespace {

constexpr const char* kOp = "pack_clusters";

void pack_clusters(
    const Tensor& keys,
    const Tensor& values,
    const Tensor& assignment,
    const Tensor& store,
    const Tensor& centroids,
    const Tensor& offsets,
    const Tensor& variances,
    const Tensor& residuals,
    const Tensor& counters,
    int64_t cluster_size) {
  check_shape(kOp, "keys", keys, "B, Hkv, T, D", {kAny, kAny, kAny, kAny});
  check_element_dtype(kOp, "keys", keys);
  const int64_t batch = keys.size(0), heads = keys.size(1), tokens = keys.size(2);
  const int64_t head_dim = keys.size(3);
  check_head_dim(kOp, head_dim);
  check_shape(kOp, "values", values, "B, Hkv, T, D", {batch, heads, tokens, head_dim});
  check_dtype(kOp, "values", values, keys.scalar_type());
  check_shape(kOp, "assignment", assignment, "B, Hkv, T", {batch, heads, tokens});
  check_dtype(kOp, "assignment", assignment, ScalarType::Int);
  check_index(
      kOp, store, centroids, offsets, variances, residuals, counters, batch, heads, head_dim,
      keys.scalar_type());
  check(cluster_size >= 1, kOp, "cluster_size must be at least 1 token, got ", cluster_size);

  const Tensor readable_keys = readable(keys), readable_values = readable(values);
  const Tensor contiguous_assignment = torch::stable::contiguous(assignment);
  PackClustersParams params;
  params.dtype = element_dtype(keys);
  params.batch = batch;
  params.heads = heads;
  params.tokens = tokens;
  params.head_dim = head_dim;
  params.keys = rows_of(readable_keys);
  params.values = rows_of(readable_values);
  params.assignment = static_cast<const int32_t*>(contiguous_assignment.data_ptr());
  params.cluster_size = cluster_size;
  params.index = index_view(store, centroids, offsets, variances, residuals, counters);

  // Everything is checked before anything is written, so that a refused call loses nothing.
  std::vector<int64_t> packed(static_cast<size_t>(batch), 0);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t* row = params.index.counters + b * kCounters;
    check_index_counts(kOp, b, row, store.size(3), centroids.size(3));
    for (int64_t h = 0; h < heads; ++h) {
      const int32_t* assigned = params.assignment + (b * heads + h) * tokens;
      int64_t count = 0;
      int32_t largest = -1;
      for (int64_t t = 0; t < tokens; ++t) {
        count += assigned[t] >= 0;
        largest = assigned[t] > largest ? assigned[t] : largest;
      }
      if (h == 0) packed[static_cast<size_t>(b)] = count;
      check(
          count == packed[static_cast<size_t>(b)], kOp, "assignment of row ", b,
          " must name as many tokens in every head, got ", packed[static_cast<size_t>(b)],
          " in head 0 and ", count, " in head ", h);
      const int64_t clusters = cluster_count(count, cluster_size);
      check(
          largest < clusters, kOp, "assignment of row ", b, ", head ", h, " must lie below ",
          clusters, " clusters (", count, " tokens of cluster_size ", cluster_size, "), got ",
          largest);
    }
    const int64_t count = packed[static_cast<size_t>(b)];
    const int64_t clusters = cluster_count(count, cluster_size);
    check(
        row[kIndexedTokens] + count <= store.size(3), kOp, "store of ", store.size(3),
        " tokens holds ", row[kIndexedTokens], " of row ", b, ", ", count, " more do not fit");
    check(
        row[kClusters] + clusters <= centroids.size(3), kOp, "index of ", centroids.size(3),
        " clusters holds ", row[kClusters], " of row ", b, ", ", clusters, " more do not fit");
  }
  params.packed = packed.data();
  cpu_kernels().pack_clusters(params);
  for (int64_t b = 0; b < batch; ++b) {
    int64_t* row = params.index.counters + b * kCounters;
    row[kIndexedTokens] += packed[static_cast<size_t>(b)];
    row[kClusters] += cluster_count(packed[static_cast<size_t>(b)], cluster_size);
  }
}

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CPU, m) {
  m.impl("pack_clusters", TORCH_BOX(&retro::pack_clusters));
}
