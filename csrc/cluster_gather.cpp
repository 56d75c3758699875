#include "cluster_gather.h"

namespace retro {
namespace {

constexpr const char* kOp = "cluster_gather";

Tensor cluster_gather(const Tensor& retrieved, const Tensor& offsets, const Tensor& counters) {
  check_shape(kOp, "retrieved", retrieved, "B, Hkv, R", {kAny, kAny, kAny});
  check_dtype(kOp, "retrieved", retrieved, ScalarType::Int);
  const int64_t batch = retrieved.size(0), heads = retrieved.size(1);
  check_shape(kOp, "offsets", offsets, "B, Hkv, C + 1", {batch, heads, kAny});
  check_dtype(kOp, "offsets", offsets, ScalarType::Int);
  check(offsets.size(2) >= 1, kOp, "offsets must hold C + 1 >= 1 entries, got 0");
  check_counters(kOp, counters, batch);

  const Tensor contiguous_retrieved = torch::stable::contiguous(retrieved);
  const Tensor contiguous_offsets = torch::stable::contiguous(offsets);
  Tensor addresses =
      torch::stable::new_empty(retrieved, {batch, heads, retrieved.size(2), 2}, ScalarType::Long);
  ClusterGatherParams params;
  params.batch = batch;
  params.heads = heads;
  params.retrieved_clusters = retrieved.size(2);
  params.clusters = offsets.size(2) - 1;
  params.retrieved = static_cast<const int32_t*>(contiguous_retrieved.data_ptr());
  params.offsets = static_cast<const int32_t*>(contiguous_offsets.data_ptr());
  params.addresses = static_cast<int64_t*>(addresses.data_ptr());
  params.counters = static_cast<int64_t*>(counters.data_ptr());

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

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CPU, m) {
  m.impl("cluster_gather", TORCH_BOX(&retro::cluster_gather));
}
