// wave_estimate, cluster_gather and merged_attention, one after the other.
#include "cpu_ops.h"
#include "wave_estimate.h"

namespace retro {
namespace {

constexpr const char* kOp = "decode_attention";

Tensor decode_attention(
    const Tensor& query,
    const Tensor& steady,
    const Tensor& store,
    const Tensor& centroids,
    const Tensor& offsets,
    const Tensor& variances,
    const Tensor& totals,
    const Tensor& counters,
    int64_t max_retrieved,
    double retrieval_budget,
    int64_t min_retrieved_clusters,
    double estimation_budget,
    std::string estimator,
    double scale) {
  // As on CUDA. What depends on values the three ops check.
  const Call<WaveEstimateParams> call = wave_estimate_call(
      kOp, query, centroids, offsets, variances, totals, counters, max_retrieved, retrieval_budget,
      min_retrieved_clusters, estimation_budget, estimator, scale);
  const int64_t batch = query.size(0), heads = call.params.heads, head_dim = query.size(2);
  check_shape(kOp, "steady", steady, "2, B, Hkv, S, D", {2, batch, heads, kAny, head_dim});
  check_dtype(kOp, "steady", steady, query.scalar_type());
  check_device(kOp, "steady", steady, query, "query");
  check_shape(kOp, "store", store, "2, B, Hkv, N, D", {2, batch, heads, kAny, head_dim});
  check_dtype(kOp, "store", store, query.scalar_type());
  check_device(kOp, "store", store, query, "query");
  const auto [retrieved, estimate, estimate_lse] = wave_estimate(
      query, centroids, offsets, variances, totals, counters, max_retrieved, retrieval_budget,
      min_retrieved_clusters, estimation_budget, estimator, scale);
  Tensor counted = torch::stable::clone(counters);  // a refusal changes nothing
  const Tensor addresses = cluster_gather(retrieved, offsets, counted);
  const Tensor out = std::get<0>(merged_attention(
      query, steady, store, addresses, counters, estimate, estimate_lse, scale, std::nullopt,
      std::nullopt, 0));
  Tensor changed = counters;
  torch::stable::copy_(changed, counted);
  return out;
}

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&retro::decode_attention));
}
