#include "pack_clusters.h"

#include <vector>

#include "cpu_kernels.h"

namespace retro {

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
    const Tensor& totals,
    const Tensor& counters,
    int64_t cluster_size) {
  Call<PackClustersParams> call = pack_clusters_call(
      keys, values, assignment, store, centroids, offsets, variances, totals, counters,
      cluster_size);
  PackClustersParams& params = call.params;
  const int64_t batch = params.batch, heads = params.heads, tokens = params.tokens;

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
    if (packed[static_cast<size_t>(b)] > 0) row[kOpenTokens] = 0;
  }
}

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CPU, m) {
  m.impl("pack_clusters", TORCH_BOX(&retro::pack_clusters));
}
