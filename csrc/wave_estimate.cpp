#include "wave_estimate.h"

#include <string>
#include <tuple>

#include "cpu_kernels.h"

namespace retro {
namespace {

constexpr const char* kOp = "wave_estimate";

std::tuple<Tensor, Tensor, Tensor> wave_estimate(
    const Tensor& query,
    const Tensor& centroids,
    const Tensor& offsets,
    const Tensor& variances,
    const Tensor& residuals,
    const Tensor& counters,
    int64_t max_retrieved,
    double retrieval_budget,
    int64_t min_retrieved_clusters,
    double estimation_budget,
    std::string estimator,
    double scale) {
  check_shape(kOp, "query", query, "B, Hq, D", {kAny, kAny, kAny});
  check_element_dtype(kOp, "query", query);
  const int64_t batch = query.size(0), query_heads = query.size(1), head_dim = query.size(2);
  check_head_dim(kOp, head_dim);
  check_shape(kOp, "centroids", centroids, "2, B, Hkv, C, D", {2, batch, kAny, kAny, head_dim});
  check_dtype(kOp, "centroids", centroids, query.scalar_type());
  const int64_t heads = centroids.size(2), clusters = centroids.size(3);
  check(
      heads > 0 && query_heads % heads == 0, kOp,
      "query heads must be a multiple of KV heads, got ", query_heads, " and ", heads);
  check_shape(kOp, "offsets", offsets, "B, Hkv, C + 1", {batch, heads, clusters + 1});
  check_dtype(kOp, "offsets", offsets, ScalarType::Int);
  check_shape(kOp, "variances", variances, "B, Hkv, C", {batch, heads, clusters});
  check_dtype(kOp, "variances", variances, ScalarType::Float);
  check_shape(kOp, "residuals", residuals, "B, Hkv, D", {batch, heads, head_dim});
  check_dtype(kOp, "residuals", residuals, ScalarType::Float);
  check_counters(kOp, counters, batch);
  check(
      retrieval_budget >= 0.0 && retrieval_budget <= 1.0, kOp,
      "retrieval_budget must lie in 0..1, got ", retrieval_budget);
  check(
      estimation_budget >= 0.0 && estimation_budget <= 1.0, kOp,
      "estimation_budget must lie in 0..1, got ", estimation_budget);
  check(
      min_retrieved_clusters >= 0, kOp, "min_retrieved_clusters must not be negative, got ",
      min_retrieved_clusters);
  check(
      estimator == "variance" || estimator == "mean", kOp,
      "estimator must be 'variance' or 'mean', got '", estimator, "'");
  const int64_t needed = retrieved_count(retrieval_budget, min_retrieved_clusters, clusters);
  check(
      max_retrieved >= needed, kOp, "max_retrieved must be at least ", needed, " for ", clusters,
      " clusters at these budgets, got ", max_retrieved);

  const Tensor readable_query = readable(query), readable_centroids = readable(centroids);
  const Tensor contiguous_offsets = torch::stable::contiguous(offsets);
  const Tensor contiguous_variances = torch::stable::contiguous(variances);
  const Tensor contiguous_residuals = torch::stable::contiguous(residuals);
  Tensor retrieved =
      torch::stable::new_empty(query, {batch, heads, max_retrieved}, ScalarType::Int);
  Tensor estimate =
      torch::stable::new_empty(query, {batch, query_heads, head_dim}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(query, {batch, query_heads}, ScalarType::Float);

  WaveEstimateParams params;
  params.dtype = element_dtype(query);
  params.batch = batch;
  params.heads = heads;
  params.groups = query_heads / heads;
  params.head_dim = head_dim;
  params.clusters = clusters;
  params.query = query_rows(readable_query, params.groups);
  params.centroid_keys = half_of(readable_centroids, 0);
  params.centroid_values = half_of(readable_centroids, 1);
  params.offsets = static_cast<const int32_t*>(contiguous_offsets.data_ptr());
  params.variances = static_cast<const float*>(contiguous_variances.data_ptr());
  params.residuals = static_cast<const float*>(contiguous_residuals.data_ptr());
  params.counters = static_cast<const int64_t*>(counters.data_ptr());
  params.max_retrieved = max_retrieved;
  params.min_retrieved_clusters = min_retrieved_clusters;
  params.retrieval_budget = retrieval_budget;
  params.estimation_budget = estimation_budget;
  params.use_variance = estimator == "variance";
  params.scale = static_cast<float>(scale);
  params.retrieved = static_cast<int32_t*>(retrieved.data_ptr());
  params.estimate = static_cast<float*>(estimate.data_ptr());
  params.estimate_lse = static_cast<float*>(lse.data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t live = params.counters[b * kCounters + kClusters];
    check_count(kOp, b, live, "clusters", "the index", clusters);
  }
  cpu_kernels().wave_estimate(params);
  return {retrieved, estimate, lse};
}

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CPU, m) {
  m.impl("wave_estimate", TORCH_BOX(&retro::wave_estimate));
}
