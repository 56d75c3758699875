// Scores all clusters of the wave index, chooses those to retrieve, and estimates the next ones from
// their centroids (RetroInfer, sections 4.1 and 4.2), all others, the tail, from the mean of all values.
#pragma once

#include <cmath>
#include <string>

#include "views.h"

namespace retro {

struct WaveEstimateParams {
  DType dtype;
  int64_t batch, heads, groups, head_dim, clusters;  // B, Hkv, G, D, C
  Rows query;                                        // [B, Hkv, G, D]
  Rows centroid_keys, centroid_values;               // [B, Hkv, C, D]
  const int32_t* offsets;                            // [B, Hkv, C + 1]
  const float* variances;                            // [B, Hkv, C]
  const float* residuals;                            // [B, Hkv, D]
  const float* value_sums;                           // [B, Hkv, D]
  const int64_t* counters;                           // [B, kCounters]
  int64_t max_retrieved, min_retrieved_clusters;
  double retrieval_budget, estimation_budget;
  bool use_variance;
  float scale;
  int32_t* retrieved;   // [B, Hkv, R], best first; -1 behind the last
  float* estimate;      // [B, Hkv, G, D]
  float* estimate_lse;  // [B, Hkv, G], natural log
};

// A fraction of `clusters`, rounded half to even as Python's round().
RETRO_HOST_DEVICE inline int64_t budget_count(double budget, int64_t clusters) {
  return static_cast<int64_t>(rint(budget * static_cast<double>(clusters)));
}

RETRO_HOST_DEVICE inline int64_t retrieved_count(double budget, int64_t floor, int64_t clusters) {
  const int64_t count = budget_count(budget, clusters);
  const int64_t floored = count > floor ? count : floor;
  return floored < clusters ? floored : clusters;
}

// Checks what both wave_estimate and decode_attention read; outputs are the caller's.
inline Call<WaveEstimateParams> wave_estimate_call(
    const char* op,
    const Tensor& query,
    const Tensor& centroids,
    const Tensor& offsets,
    const Tensor& variances,
    const Tensor& totals,
    const Tensor& counters,
    int64_t max_retrieved,
    double retrieval_budget,
    int64_t min_retrieved_clusters,
    double estimation_budget,
    const std::string& estimator,
    double scale) {
  check_shape(op, "query", query, "B, Hq, D", {kAny, kAny, kAny});
  check_element_dtype(op, "query", query);
  const int64_t batch = query.size(0), query_heads = query.size(1), head_dim = query.size(2);
  check_head_dim(op, head_dim);
  check_shape(op, "centroids", centroids, "2, B, Hkv, C, D", {2, batch, kAny, kAny, head_dim});
  check_dtype(op, "centroids", centroids, query.scalar_type());
  const int64_t heads = centroids.size(2), clusters = centroids.size(3);
  check(
      heads > 0 && query_heads % heads == 0, op, "query heads must be a multiple of KV heads, got ",
      query_heads, " and ", heads);
  check_shape(op, "offsets", offsets, "B, Hkv, C + 1", {batch, heads, clusters + 1});
  check_dtype(op, "offsets", offsets, ScalarType::Int);
  check_shape(op, "variances", variances, "B, Hkv, C", {batch, heads, clusters});
  check_dtype(op, "variances", variances, ScalarType::Float);
  check_shape(op, "totals", totals, "2, B, Hkv, D", {2, batch, heads, head_dim});
  check_dtype(op, "totals", totals, ScalarType::Float);
  check_counters(op, counters, batch);
  check_device(op, "centroids", centroids, query, "query");
  check_device(op, "offsets", offsets, query, "query");
  check_device(op, "variances", variances, query, "query");
  check_device(op, "totals", totals, query, "query");
  check_device(op, "counters", counters, query, "query");
  check(
      retrieval_budget >= 0.0 && retrieval_budget <= 1.0, op,
      "retrieval_budget must lie in 0..1, got ", retrieval_budget);
  check(
      estimation_budget >= 0.0 && estimation_budget <= 1.0, op,
      "estimation_budget must lie in 0..1, got ", estimation_budget);
  check(
      min_retrieved_clusters >= 0, op, "min_retrieved_clusters must not be negative, got ",
      min_retrieved_clusters);
  check(
      estimator == "variance" || estimator == "mean", op,
      "estimator must be 'variance' or 'mean', got '", estimator, "'");
  const int64_t needed = retrieved_count(retrieval_budget, min_retrieved_clusters, clusters);
  check(
      max_retrieved >= needed, op, "max_retrieved must be at least ", needed, " for ", clusters,
      " clusters at these budgets, got ", max_retrieved);

  Call<WaveEstimateParams> call;
  WaveEstimateParams& params = call.params;
  params.dtype = element_dtype(query);
  params.batch = batch;
  params.heads = heads;
  params.groups = query_heads / heads;
  params.head_dim = head_dim;
  params.clusters = clusters;
  params.query = query_rows(call.hold(readable(query)), params.groups);
  const Tensor readable_centroids = call.hold(readable(centroids));
  params.centroid_keys = half_of(readable_centroids, 0);
  params.centroid_values = half_of(readable_centroids, 1);
  params.offsets =
      static_cast<const int32_t*>(call.hold(torch::stable::contiguous(offsets)).data_ptr());
  params.variances =
      static_cast<const float*>(call.hold(torch::stable::contiguous(variances)).data_ptr());
  params.residuals =
      static_cast<const float*>(call.hold(torch::stable::contiguous(totals)).data_ptr());
  params.value_sums = params.residuals + totals.numel() / 2;
  params.counters = static_cast<const int64_t*>(counters.data_ptr());
  params.max_retrieved = max_retrieved;
  params.min_retrieved_clusters = min_retrieved_clusters;
  params.retrieval_budget = retrieval_budget;
  params.estimation_budget = estimation_budget;
  params.use_variance = estimator == "variance";
  params.scale = static_cast<float>(scale);
  params.retrieved = nullptr;
  params.estimate = nullptr;
  params.estimate_lse = nullptr;
  return call;
}

struct WaveEstimateResults {
  Tensor retrieved;     // [B, Hkv, R] int32
  Tensor estimate;      // [B, Hq, D] float32
  Tensor estimate_lse;  // [B, Hq] float32
};

inline WaveEstimateResults wave_estimate_results(WaveEstimateParams& params, const Tensor& query) {
  const int64_t batch = query.size(0), query_heads = query.size(1), head_dim = query.size(2);
  WaveEstimateResults results;
  results.retrieved =
      torch::stable::new_empty(query, {batch, params.heads, params.max_retrieved}, ScalarType::Int);
  results.estimate =
      torch::stable::new_empty(query, {batch, query_heads, head_dim}, ScalarType::Float);
  results.estimate_lse = torch::stable::new_empty(query, {batch, query_heads}, ScalarType::Float);
  params.retrieved = static_cast<int32_t*>(results.retrieved.data_ptr());
  params.estimate = static_cast<float*>(results.estimate.data_ptr());
  params.estimate_lse = static_cast<float*>(results.estimate_lse.data_ptr());
  return results;
}

}  // namespace retro
