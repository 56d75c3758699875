#include "counters.h"
#include "pack_clusters_cuda.h"

namespace retro {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * 32;

// What the sort of a (row, head) finds.
struct Packed {
  int32_t assigned;  // tokens with a cluster
  int32_t packed;    // of those, the ones that go into the index
  int32_t clusters;  // 0 where store or index have no room
};

struct PackParams {
  PackClustersParams op;
  int64_t most_clusters, groups;
  SortPlan sort;
  int32_t* starts;     // [B * Hkv, most_clusters + 1]
  int32_t* order;      // [B * Hkv, T]
  int32_t* histogram;  // [B * Hkv, warps, most_clusters]
  Packed* packed;      // [B * Hkv]
  GroupSums* sums;     // [B * Hkv, groups, D]
};

__device__ __forceinline__ Packing packing_of(const PackParams& params, int64_t task) {
  const PackClustersParams& op = params.op;
  Packing packing;
  packing.b = task / op.heads;
  packing.h = task % op.heads;
  const int64_t* counters = op.index.counters + packing.b * kCounters;
  packing.first_slot = counters[kIndexedTokens];
  packing.first_cluster = counters[kClusters];
  packing.clusters = params.packed[task].clusters;
  packing.starts = params.starts + task * (params.most_clusters + 1);
  packing.order = params.order + task * op.tokens;
  return packing;
}

__global__ void __launch_bounds__(kThreads, 1)
    sort_kernel(const __grid_constant__ PackParams params) {
  extern __shared__ int32_t counts[];
  __shared__ int32_t warp_sums[kWarps];
  release_successor();
  wait_for_predecessor();
  const PackClustersParams& op = params.op;
  const int64_t task = blockIdx.x;
  const int32_t* assigned = op.assignment + task * op.tokens;
  int32_t own = 0, tokens;
  for (int64_t t = threadIdx.x; t < op.tokens; t += kThreads) own += assigned[t] >= 0;
  sum_before<kWarps>(own, warp_sums, tokens);
  const int64_t clusters = cluster_count(tokens, op.cluster_size);
  int32_t* starts = params.starts + task * (params.most_clusters + 1);
  sort_by_cluster<kWarps>(
      assigned, op.tokens, 0, clusters, params.sort.warps,
      params.sort.shared_bytes > 0
          ? counts
          : params.histogram + task * params.sort.warps * params.most_clusters,
      starts, params.order + task * op.tokens);
  const int64_t* counters = op.index.counters + task / op.heads * kCounters;
  const int64_t slots = counters[kIndexedTokens], used = counters[kClusters];
  const bool fits = slots >= 0 && used >= 0 && slots + tokens <= op.index.tokens &&
      used + clusters <= op.index.clusters;
  if (threadIdx.x == 0) {
    params.packed[task] = {
        tokens, fits ? starts[clusters] : 0, fits ? static_cast<int32_t>(clusters) : 0};
  }
  __syncthreads();
  if (fits) write_offsets(op.index, packing_of(params, task));
}

template <typename T, int kGroups>
__global__ void __launch_bounds__(kThreads, 1)
    pack_kernel(const __grid_constant__ PackParams params) {
  __shared__ float shared[2 * kStrands * 32 * kVectorOf<kGroups>];
  release_successor();
  wait_for_predecessor();
  const PackClustersParams& op = params.op;
  const int64_t task = blockIdx.x / params.groups, group = blockIdx.x % params.groups;
  const Packing packing = packing_of(params, task);
  if (group * kGroupClusters >= packing.clusters) return;
  const GroupSums sums = pack_group<T, kGroups, kWarps>(
      op.index, packing,
      TokenRows<T>{op.keys.row<const T>(packing.b, packing.h, 0), op.keys.stride_t},
      TokenRows<T>{op.values.row<const T>(packing.b, packing.h, 0), op.values.stride_t}, group,
      static_cast<int>(op.head_dim), shared);
  if (threadIdx.x < op.head_dim) {
    params.sums[(task * params.groups + group) * op.head_dim + threadIdx.x] = sums;
  }
}

__global__ void __launch_bounds__(kMaxHeadDim)
    finish_kernel(const __grid_constant__ PackParams params) {
  release_successor();
  wait_for_predecessor();
  const PackClustersParams& op = params.op;
  const int64_t task = blockIdx.x;
  const Packed packed = params.packed[task];
  if (threadIdx.x < op.head_dim) {
    GroupSums sums = {0.0f, 0.0f};
    const int64_t groups = ceil_div(packed.clusters, kGroupClusters);
#pragma unroll 8
    for (int64_t group = 0; group < groups; ++group) {
      const GroupSums own = params.sums[(task * params.groups + group) * op.head_dim + threadIdx.x];
      sums.residual += own.residual;
      sums.value += own.value;
    }
    op.index.residuals[task * op.head_dim + threadIdx.x] += sums.residual;
    op.index.value_sums[task * op.head_dim + threadIdx.x] += sums.value;
  }
  if (task % op.heads == 0 && threadIdx.x == 0) {
    int64_t* counters = op.index.counters + task / op.heads * kCounters;
    counters[kIndexedTokens] += packed.packed;
    counters[kClusters] += packed.clusters;
    counters[kDroppedTokens] += packed.assigned - packed.packed;
    if (packed.packed > 0) counters[kOpenTokens] = 0;
  }
}

template <typename T, int kGroups>
void launch_pack(const Launcher& launch, const PackParams& params) {
  launch(
      pack_kernel<T, kGroups>, grid_of(params.op.batch * params.op.heads * params.groups), kThreads,
      0, 1, params);
}

template <typename T>
void launch_pack_typed(const Launcher& launch, const PackParams& params) {
  RETRO_BUILD_DISPATCH(T, params.op.head_dim, launch_pack, launch, params);
}

void pack_clusters(
    const Tensor& keys,
    const Tensor& values,
    const Tensor& assignment,
    const Tensor& store,
    const Tensor& centroids,
    const Tensor& offsets,
    const Tensor& variances,
    const Tensor& totals,
    const Tensor& counters,
    int64_t cluster_size) {
  const Call<PackClustersParams> call = pack_clusters_call(
      keys, values, assignment, store, centroids, offsets, variances, totals, counters,
      cluster_size);
  const Launcher launch("pack_clusters", keys);
  PackParams params = {};
  params.op = call.params;
  const int64_t tasks = params.op.batch * params.op.heads;
  params.most_clusters = cluster_count(params.op.tokens, cluster_size);
  params.groups = std::max<int64_t>(ceil_div(params.most_clusters, kGroupClusters), 1);
  params.sort = plan_sort(params.most_clusters, kWarps);
  Workspace workspace;
  const int64_t starts = workspace.reserve<int32_t>(tasks * (params.most_clusters + 1));
  const int64_t order = workspace.reserve<int32_t>(tasks * params.op.tokens);
  const int64_t histogram =
      workspace.reserve<int32_t>(tasks * histogram_count(params.sort, params.most_clusters));
  const int64_t packed = workspace.reserve<Packed>(tasks);
  const int64_t sums = workspace.reserve<GroupSums>(tasks * params.groups * params.op.head_dim);
  workspace.allocate(keys);
  params.starts = workspace.at<int32_t>(starts);
  params.order = workspace.at<int32_t>(order);
  params.histogram = workspace.at<int32_t>(histogram);
  params.packed = workspace.at<Packed>(packed);
  params.sums = workspace.at<GroupSums>(sums);
  launch(sort_kernel, grid_of(tasks), kThreads, params.sort.shared_bytes, 1, params);
  RETRO_CUDA_DISPATCH(params.op.dtype, launch_pack_typed, launch, params);
  launch(finish_kernel, grid_of(tasks), kMaxHeadDim, 0, 1, params);
}

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CUDA, m) {
  m.impl("pack_clusters", TORCH_BOX(&retro::pack_clusters));
}
