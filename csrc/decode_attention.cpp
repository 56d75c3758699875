// wave_estimate, cluster_gather and merged_attention, one after the other.
#include "cpu_ops.h"

namespace retro {
namespace {

Tensor decode_attention(
    const Tensor& query,
    const Tensor& steady,
    const Tensor& store,
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
  const auto [retrieved, estimate, estimate_lse] = wave_estimate(
      query, centroids, offsets, variances, residuals, counters, max_retrieved, retrieval_budget,
      min_retrieved_clusters, estimation_budget, estimator, scale);
  const Tensor addresses = cluster_gather(retrieved, offsets, counters);
  return std::get<0>(
      merged_attention(query, steady, store, addresses, counters, estimate, estimate_lse, scale));
}

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&retro::decode_attention));
}
