// Where the tokens of the retrieved clusters lie.
#pragma once

#include "views.h"

namespace retro {

struct ClusterGatherParams {
  int64_t batch, heads, retrieved_clusters, clusters;  // B, Hkv, R, C
  const int32_t* retrieved;                            // [B, Hkv, R]; -1: none
  const int32_t* offsets;                              // [B, Hkv, C + 1]
  int64_t* addresses;  // [B, Hkv, R, 2]: first slot, number of tokens
  int64_t* counters;   // [B, kCounters]
};

inline Call<ClusterGatherParams> cluster_gather_call(
    const Tensor& retrieved, const Tensor& offsets, const Tensor& counters, Tensor& addresses) {
  constexpr const char* kOp = "cluster_gather";
  check_shape(kOp, "retrieved", retrieved, "B, Hkv, R", {kAny, kAny, kAny});
  check_dtype(kOp, "retrieved", retrieved, ScalarType::Int);
  const int64_t batch = retrieved.size(0), heads = retrieved.size(1);
  check_shape(kOp, "offsets", offsets, "B, Hkv, C + 1", {batch, heads, kAny});
  check_dtype(kOp, "offsets", offsets, ScalarType::Int);
  check_device(kOp, "offsets", offsets, retrieved, "retrieved");
  check(offsets.size(2) >= 1, kOp, "offsets must hold C + 1 >= 1 entries, got 0");
  check_counters(kOp, counters, batch);
  check_device(kOp, "counters", counters, retrieved, "retrieved");

  addresses =
      torch::stable::new_empty(retrieved, {batch, heads, retrieved.size(2), 2}, ScalarType::Long);
  Call<ClusterGatherParams> call;
  ClusterGatherParams& params = call.params;
  params.batch = batch;
  params.heads = heads;
  params.retrieved_clusters = retrieved.size(2);
  params.clusters = offsets.size(2) - 1;
  params.retrieved =
      static_cast<const int32_t*>(call.hold(torch::stable::contiguous(retrieved)).data_ptr());
  params.offsets =
      static_cast<const int32_t*>(call.hold(torch::stable::contiguous(offsets)).data_ptr());
  params.addresses = static_cast<int64_t*>(addresses.data_ptr());
  params.counters = static_cast<int64_t*>(counters.data_ptr());
  return call;
}

}  // namespace retro
