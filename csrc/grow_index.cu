#include "grow_index.h"

#include "counters.h"
#include "pack_clusters_cuda.h"

namespace retro {
namespace {

constexpr int kWarps = 8;  // more would leave them too few registers
constexpr int kThreads = kWarps * 32;

struct GrowParams {
  GrowIndexParams op;
  int64_t clusters;  // of an update segment
  SortPlan sort;
  float* means;        // [B * Hkv, D]
  void* panels;        // [B * Hkv, panel_elements(clusters)]
  float* biases;       // [B * Hkv, clusters]
  int32_t* assigned;   // [B * Hkv, update_segment]
  int32_t* starts;     // [B * Hkv, clusters + 1]
  int32_t* order;      // [B * Hkv, update_segment]
  int32_t* histogram;  // [B * Hkv, warps, clusters]
};

// Tokens from `from` on move up by `distance` tokens, which is less than they may overlap themselves.
template <typename T>
__device__ void move_up(
    const Rows& rows,
    int64_t b,
    int64_t h,
    int64_t from,
    int64_t count,
    int64_t distance,
    int head_dim) {
  const int chunks = head_dim / kChunk<T>;
  for (int64_t start = 0; start < count; start += distance) {
    const int64_t together = count - start < distance ? count - start : distance;
    for (int64_t i = threadIdx.x; i < together * chunks; i += kThreads) {
      const int64_t t = from + start + i / chunks;
      reinterpret_cast<uint4*>(rows.row<T>(b, h, t - distance))[i % chunks] =
          reinterpret_cast<const uint4*>(rows.row<const T>(b, h, t))[i % chunks];
    }
    __syncthreads();
  }
}

// One block per (row, head). As a rule no segment is full, and it returns at once.
template <typename T, int kGroups>
__global__ void __launch_bounds__(kThreads, 1)
    grow_kernel(const __grid_constant__ GrowParams params) {
  extern __shared__ __align__(kSharedLine) uint4 shared[];
  __shared__ float sums[2 * kStrands * 32 * kVectorOf<kGroups>];
  release_successor();
  wait_for_predecessor();
  const GrowIndexParams& op = params.op;
  const IndexView& index = op.index;
  const int64_t task = blockIdx.x, segment = op.update_segment;
  const int64_t full = op.sink_tokens + op.local_tokens + segment;
  Packing packing;
  packing.b = task / op.heads;
  packing.h = task % op.heads;
  int64_t* counters = index.counters + packing.b * kCounters;
  int64_t steady = counters[kSteadyTokens];
  if (steady < full || steady > op.steady_capacity) return;
  packing.first_slot = counters[kIndexedTokens];
  packing.first_cluster = counters[kClusters];
  packing.clusters = params.clusters;
  const int head_dim = static_cast<int>(op.head_dim), thread = static_cast<int>(threadIdx.x);

  SegmentMemory<T> memory;
  memory.mean = params.means + task * op.head_dim;
  memory.panels =
      static_cast<Scored<T>*>(params.panels) + task * panel_elements<kGroups>(params.clusters);
  memory.biases = params.biases + task * params.clusters;
  memory.starts = params.starts + task * (params.clusters + 1);
  memory.order = params.order + task * segment;
  memory.histogram = params.sort.shared_bytes > 0
      ? reinterpret_cast<int32_t*>(shared)
      : params.histogram + task * params.sort.warps * params.clusters;
  int32_t* assigned = params.assigned + task * segment;
  packing.starts = memory.starts;
  packing.order = memory.order;
  const TokenRows<T> keys{
      op.steady_keys.row<const T>(packing.b, packing.h, op.sink_tokens), op.steady_keys.stride_t};
  const TokenRows<T> values{
      op.steady_values.row<const T>(packing.b, packing.h, op.sink_tokens),
      op.steady_values.stride_t};

  int64_t grown = 0;
  // Where store or index are full the tokens stay where they are.
  for (; steady >= full && packing.first_slot + segment <= index.tokens &&
       packing.first_cluster + params.clusters <= index.clusters;
       ++grown) {
    segment_mean<T, kVectorOf<kGroups>, kWarps>(keys, segment, head_dim, memory.mean, sums);
    first_centroids<T, kGroups, kWarps>(
        keys, segment, clusters_in_pass(segment, params.clusters, 0), head_dim, memory);
    for (int64_t pass = 0; pass < op.iterations; ++pass) {
      __syncthreads();
      if (pass > 0) {
        update_centroids<T, kGroups, kWarps>(
            keys, segment, params.clusters, pass, head_dim, memory, assigned, 0, params.sort.warps,
            memory.histogram);
        __syncthreads();
      }
      for (int64_t t = 0; t < segment; t += kWarps * kWarpTokens<kGroups>) {
        assign_tokens<T, kGroups, kWarps, kWarpTokens<kGroups>>(
            keys, t, segment, clusters_in_pass(segment, params.clusters, pass), head_dim, memory,
            assigned, 0, shared);
      }
    }
    __syncthreads();
    sort_by_cluster<kWarps>(
        assigned, segment, 0, params.clusters, params.sort.warps, memory.histogram, memory.starts,
        memory.order);
    write_offsets(index, packing);
    GroupSums added = {0.0f, 0.0f};
    for (int64_t group = 0; group < ceil_div(params.clusters, kGroupClusters); ++group) {
      const GroupSums own =
          pack_group<T, kGroups, kWarps>(index, packing, keys, values, group, head_dim, sums);
      added.residual += own.residual;
      added.value += own.value;
    }
    if (thread < head_dim) {
      index.residuals[task * op.head_dim + thread] += added.residual;
      index.value_sums[task * op.head_dim + thread] += added.value;
    }
    __syncthreads();
    const int64_t rest = op.sink_tokens + segment;
    move_up<T>(op.steady_keys, packing.b, packing.h, rest, steady - rest, segment, head_dim);
    move_up<T>(op.steady_values, packing.b, packing.h, rest, steady - rest, segment, head_dim);
    steady -= segment;
    packing.first_slot += segment;
    packing.first_cluster += params.clusters;
  }
  if (grown == 0) return;
  // All heads of a row have read its counters when the last of them changes these.
  __syncthreads();
  if (thread != 0) return;
  __threadfence();
  unsigned long long* finished = reinterpret_cast<unsigned long long*>(counters + kFinishedHeads);
  if (atomicAdd(finished, 1ull) + 1 != static_cast<unsigned long long>(op.heads)) return;
  *finished = 0;
  counters[kSteadyTokens] = steady;
  counters[kIndexedTokens] = packing.first_slot;
  counters[kClusters] = packing.first_cluster;
  counters[kUpdates] += grown;
}

template <typename T, int kGroups>
void run(const Launcher& launch, const Tensor& steady, GrowParams& params) {
  const int64_t tasks = params.op.batch * params.op.heads, segment = params.op.update_segment;
  Workspace workspace;
  const int64_t means = workspace.reserve<float>(tasks * params.op.head_dim);
  const int64_t panels =
      workspace.reserve<Scored<T>>(tasks * panel_elements<kGroups>(params.clusters));
  const int64_t biases = workspace.reserve<float>(tasks * params.clusters);
  const int64_t assigned = workspace.reserve<int32_t>(tasks * segment);
  const int64_t starts = workspace.reserve<int32_t>(tasks * (params.clusters + 1));
  const int64_t order = workspace.reserve<int32_t>(tasks * segment);
  const int64_t histogram =
      workspace.reserve<int32_t>(tasks * histogram_count(params.sort, params.clusters));
  workspace.allocate(steady);
  params.means = workspace.at<float>(means);
  params.panels = workspace.at<char>(panels);
  params.biases = workspace.at<float>(biases);
  params.assigned = workspace.at<int32_t>(assigned);
  params.starts = workspace.at<int32_t>(starts);
  params.order = workspace.at<int32_t>(order);
  params.histogram = workspace.at<int32_t>(histogram);
  launch(
      grow_kernel<T, kGroups>, grid_of(tasks), kThreads,
      std::max(params.sort.shared_bytes, kAssignBytes<kGroups>), 1, params);
}

template <typename T>
void run_typed(const Launcher& launch, const Tensor& steady, GrowParams& params) {
  RETRO_BUILD_DISPATCH(T, params.op.head_dim, run, launch, steady, params);
}

void grow_index(
    const Tensor& steady,
    const Tensor& store,
    const Tensor& centroids,
    const Tensor& offsets,
    const Tensor& variances,
    const Tensor& totals,
    const Tensor& counters,
    int64_t sink_tokens,
    int64_t local_tokens,
    int64_t update_segment,
    int64_t cluster_size,
    int64_t iterations) {
  const Call<GrowIndexParams> call = grow_index_call(
      steady, store, centroids, offsets, variances, totals, counters, sink_tokens, local_tokens,
      update_segment, cluster_size, iterations);
  // No row can come to hold that many tokens; beyond here the sum of the three cannot overflow.
  const int64_t capacity = steady.size(3);
  if (sink_tokens > capacity || local_tokens > capacity - sink_tokens ||
      update_segment > capacity - sink_tokens - local_tokens) {
    return;
  }
  const Launcher launch("grow_index", steady);
  GrowParams params = {};
  params.op = call.params;
  params.clusters = cluster_count(update_segment, cluster_size);
  params.sort = plan_sort(params.clusters, kWarps);
  RETRO_CUDA_DISPATCH(params.op.dtype, run_typed, launch, steady, params);
}

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CUDA, m) { m.impl("grow_index", TORCH_BOX(&retro::grow_index)); }
