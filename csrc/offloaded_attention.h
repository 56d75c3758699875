// wave_estimate, page_gather and merged_attention in one, and update_pages beside the step.
#pragma once

#include <string>

#include "page_gather.h"
#include "update_pages.h"
#include "wave_estimate.h"

namespace retro {

struct OffloadedAttentionCall {
  Call<WaveEstimateParams> estimate;
  Call<PageGatherParams> gather;
  Call<UpdatePagesParams> update;
};

// What does not depend on values. `retrieved`: an int32 tensor [B, Hkv, max_retrieved].
inline OffloadedAttentionCall offloaded_attention_call(
    const Tensor& query,
    const Tensor& steady,
    const Tensor& store,
    const Tensor& centroids,
    const Tensor& offsets,
    const Tensor& variances,
    const Tensor& totals,
    const Tensor& pages,
    const Tensor& page_table,
    const Tensor& free_pages,
    const Tensor& requests,
    const Tensor& cached,
    const Tensor& history,
    const Tensor& decisions,
    const Tensor& counters,
    int64_t max_retrieved,
    double retrieval_budget,
    int64_t min_retrieved_clusters,
    double estimation_budget,
    const std::string& estimator,
    double scale,
    int64_t page_size,
    const std::string& policy,
    Tensor& retrieved) {
  constexpr const char* kOp = "offloaded_attention";
  OffloadedAttentionCall call;
  call.estimate = wave_estimate_call(
      kOp, query, centroids, offsets, variances, totals, counters, max_retrieved, retrieval_budget,
      min_retrieved_clusters, estimation_budget, estimator, scale);
  const WaveEstimateParams& params = call.estimate.params;
  const int64_t batch = params.batch, heads = params.heads, head_dim = params.head_dim;
  check_shape(kOp, "steady", steady, "2, B, Hkv, S, D", {2, batch, heads, kAny, head_dim});
  check_dtype(kOp, "steady", steady, query.scalar_type());
  check_device(kOp, "steady", steady, query, "query");
  check_shape(kOp, "store", store, "2, B, Hkv, N, D", {2, batch, heads, kAny, head_dim});
  check_dtype(kOp, "store", store, query.scalar_type());
  check_device(kOp, "store", store, query, "query");
  retrieved = torch::stable::new_empty(query, {batch, heads, max_retrieved}, ScalarType::Int);
  call.gather = page_gather_call(
      kOp, query, "query", retrieved, offsets, store, pages, page_table, free_pages, decisions,
      requests, cached, counters, page_size, nullptr);
  call.update =
      update_pages_call(kOp, query, "query", requests, cached, history, decisions, policy);
  return call;
}

}  // namespace retro
