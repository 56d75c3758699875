// wave_estimate, page_gather, merged_attention and update_pages, one after the other.
#include "offloaded_attention.h"

#include "cpu_ops.h"

namespace retro {
namespace {

Tensor offloaded_attention(
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
    std::string estimator,
    double scale,
    int64_t page_size,
    std::string policy,
    bool join) {
  // As on CUDA. What depends on values the ops check.
  Tensor unused;
  const OffloadedAttentionCall call = offloaded_attention_call(
      query, steady, store, centroids, offsets, variances, totals, pages, page_table, free_pages,
      requests, cached, history, decisions, counters, max_retrieved, retrieval_budget,
      min_retrieved_clusters, estimation_budget, estimator, scale, page_size, policy, unused);
  (void)call;
  const auto [retrieved, estimate, estimate_lse] = wave_estimate(
      query, centroids, offsets, variances, totals, counters, max_retrieved, retrieval_budget,
      min_retrieved_clusters, estimation_budget, estimator, scale);
  const Tensor addresses = page_gather(
      retrieved, offsets, store, pages, page_table, free_pages, decisions, requests, cached,
      counters, page_size);
  const Tensor out = std::get<0>(merged_attention(
      query, steady, store, addresses, counters, estimate, estimate_lse, scale, pages, page_table,
      page_size));
  update_pages(requests, cached, history, decisions, policy, join);
  return out;
}

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CPU, m) {
  m.impl("offloaded_attention", TORCH_BOX(&retro::offloaded_attention));
}
