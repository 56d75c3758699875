#include "cluster_gather.h"

#include "cpu_ops.h"

namespace retro {
namespace {

constexpr const char* kOp = "cluster_gather";

}  // namespace

Tensor cluster_gather(const Tensor& retrieved, const Tensor& offsets, const Tensor& counters) {
  Tensor addresses;
  const Call<ClusterGatherParams> call =
      cluster_gather_call(retrieved, offsets, counters, addresses);
  const ClusterGatherParams& params = call.params;
  const int64_t batch = params.batch, heads = params.heads;
  for (int64_t i = 0; i < batch * heads * params.retrieved_clusters; ++i) {
    check(
        params.retrieved[i] >= -1 && params.retrieved[i] < params.clusters, kOp,
        "retrieved must lie in -1 .. ", params.clusters - 1, ", got ", params.retrieved[i]);
  }
  for (int64_t b = 0; b < batch; ++b) {
    int64_t* row = params.counters + b * kCounters;
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t task = b * heads + h;
      const int32_t* head_offsets = params.offsets + task * (params.clusters + 1);
      for (int64_t r = 0; r < params.retrieved_clusters; ++r) {
        const int64_t i = task * params.retrieved_clusters + r;
        const int32_t cluster = params.retrieved[i];
        const int64_t first = cluster < 0 ? 0 : head_offsets[cluster];
        const int64_t tokens = cluster < 0 ? 0 : head_offsets[cluster + 1] - first;
        params.addresses[2 * i] = first;
        params.addresses[2 * i + 1] = tokens;
        row[kRetrievedTokens] += tokens;
      }
    }
    row[kSteps] += 1;
  }
  return addresses;
}

}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CPU, m) {
  m.impl("cluster_gather", TORCH_BOX(&retro::cluster_gather));
}
