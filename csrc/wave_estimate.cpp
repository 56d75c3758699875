#include "wave_estimate.h"

#include <string>
#include <tuple>

#include "cpu_kernels.h"
#include "cpu_ops.h"

namespace retro {
namespace {

constexpr const char* kOp = "wave_estimate";

}  // namespace

std::tuple<Tensor, Tensor, Tensor> wave_estimate(
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
    std::string estimator,
    double scale) {
  Call<WaveEstimateParams> call = wave_estimate_call(
      kOp, query, centroids, offsets, variances, totals, counters, max_retrieved, retrieval_budget,
      min_retrieved_clusters, estimation_budget, estimator, scale);
  WaveEstimateParams& params = call.params;
  const WaveEstimateResults results = wave_estimate_results(params, query);
  for (int64_t b = 0; b < params.batch; ++b) {
    const int64_t live = params.counters[b * kCounters + kClusters];
    check_count(kOp, b, live, "clusters", "the index", params.clusters);
  }
  cpu_kernels().wave_estimate(params);
  return {results.retrieved, results.estimate, results.estimate_lse};
}

}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CPU, m) {
  m.impl("wave_estimate", TORCH_BOX(&retro::wave_estimate));
}
