#include "cluster_gather.h"

#include "counters.h"
#include "cuda_common.h"

namespace retro {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    cluster_gather_kernel(const __grid_constant__ ClusterGatherParams params) {
  release_successor();
  wait_for_predecessor();
  const int64_t task = blockIdx.x, ranks = params.retrieved_clusters;
  const int32_t* retrieved = params.retrieved + task * ranks;
  const int32_t* offsets = params.offsets + task * (params.clusters + 1);
  longlong2* addresses = reinterpret_cast<longlong2*>(params.addresses) + task * ranks;
  unsigned long long sum = 0;
  for (int64_t r = threadIdx.x; r < ranks; r += kThreads) {
    const int32_t cluster = retrieved[r];
    longlong2 address = make_longlong2(0, 0);
    if (cluster >= 0 && cluster < params.clusters) {  // other ids must not lead outside
      address.x = offsets[cluster];
      address.y = offsets[cluster + 1] - address.x;
    }
    addresses[r] = address;
    sum += static_cast<unsigned long long>(address.y);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  // Integers: any order of additions gives the same sum.
  unsigned long long* counters =
      reinterpret_cast<unsigned long long*>(params.counters + task / params.heads * kCounters);
  if (threadIdx.x % 32 == 0 && sum > 0) atomicAdd(counters + kRetrievedTokens, sum);
  if (threadIdx.x == 0 && task % params.heads == 0) atomicAdd(counters + kSteps, 1ull);
}

Tensor cluster_gather(const Tensor& retrieved, const Tensor& offsets, const Tensor& counters) {
  Tensor addresses;
  const Call<ClusterGatherParams> call =
      cluster_gather_call(retrieved, offsets, counters, addresses);
  const Launcher launch("cluster_gather", retrieved);
  launch(
      cluster_gather_kernel, grid_of(call.params.batch * call.params.heads), kThreads, 0, 1,
      call.params);
  return addresses;
}

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CUDA, m) {
  m.impl("cluster_gather", TORCH_BOX(&retro::cluster_gather));
}
