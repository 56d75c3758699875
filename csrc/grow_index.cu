#include "grow_index.h"

#include "counters.h"
#include "pack_clusters_cuda.h"

namespace retro {
namespace {

constexpr int kWarps = 8;  // more would leave them too few registers
constexpr int kThreads = kWarps * 32;

// Tokens that are clustered together, and where they are counted by cluster.
struct Batch {
  int64_t tokens, clusters, iterations;
  SortPlan sort;
};

struct GrowParams {
  GrowIndexParams op;
  Batch update, merge;                 // merge.tokens is 0 where nothing is merged
  int64_t most_tokens, most_clusters;  // of the two
  float* means;                        // [B * Hkv, D]
  void* panels;                        // [B * Hkv, panel_elements(most_clusters)]
  float* biases;                       // [B * Hkv, most_clusters]
  int32_t* assigned;                   // [B * Hkv, most_tokens]
  int32_t* starts;                     // [B * Hkv, most_clusters + 1]
  int32_t* order;                      // [B * Hkv, most_tokens]
  int32_t* histogram;                  // [B * Hkv, histogram_size]
  int64_t histogram_size;
  void* copies;  // [B * Hkv, 2, merge.tokens, D]: keys and values of what is merged
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

// Sums of all groups of clusters in element d of thread d; see pack_group.
template <typename T, int kGroups>
__device__ GroupSums pack_groups(
    const IndexView& index,
    const Packing& packing,
    const TokenRows<T>& keys,
    const TokenRows<T>& values,
    int head_dim,
    float* sums) {
  GroupSums all = {0.0f, 0.0f};
  for (int64_t group = 0; group < ceil_div(packing.clusters, kGroupClusters); ++group) {
    const GroupSums own =
        pack_group<T, kGroups, kWarps>(index, packing, keys, values, group, head_dim, sums);
    all.residual += own.residual;
    all.value += own.value;
  }
  return all;
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
  const int64_t task = blockIdx.x, segment = params.update.tokens, merged = params.merge.tokens;
  const int64_t full = op.sink_tokens + op.local_tokens + segment;
  const int64_t b = task / op.heads, h = task % op.heads;
  int64_t* counters = index.counters + b * kCounters;
  int64_t steady = counters[kSteadyTokens];
  if (steady < full || steady > op.steady_capacity) return;
  int64_t slots = counters[kIndexedTokens], clusters = counters[kClusters];
  int64_t open = counters[kOpenTokens];
  const int head_dim = static_cast<int>(op.head_dim), thread = static_cast<int>(threadIdx.x);

  SegmentMemory<T> memory;
  memory.mean = params.means + task * op.head_dim;
  memory.panels =
      static_cast<Scored<T>*>(params.panels) + task * panel_elements<kGroups>(params.most_clusters);
  memory.biases = params.biases + task * params.most_clusters;
  memory.starts = params.starts + task * (params.most_clusters + 1);
  memory.order = params.order + task * params.most_tokens;
  int32_t* assigned = params.assigned + task * params.most_tokens;
  T* const copied_keys = static_cast<T*>(params.copies) + task * 2 * merged * head_dim;
  T* const copied_values = copied_keys + merged * head_dim;

  int64_t grown = 0;
  for (;;) {
    const bool merging =
        merged > 0 && open == merged && slots >= merged && clusters >= params.merge.clusters;
    // Where store or index are full the tokens stay where they are.
    if (!merging &&
        (steady < full || slots + segment > index.tokens ||
         clusters + params.update.clusters > index.clusters)) {
      break;
    }
    const Batch& batch = merging ? params.merge : params.update;
    memory.histogram = batch.sort.shared_bytes > 0
        ? reinterpret_cast<int32_t*>(shared)
        : params.histogram + task * params.histogram_size;
    Packing packing = {b, h, slots, clusters, batch.clusters, memory.starts, memory.order};
    TokenRows<T> keys, values, seeds;
    int64_t seed_tokens = segment, outliers = outlier_count(segment, batch.clusters);
    GroupSums old = {0.0f, 0.0f};
    if (merging) {
      // Packed once more as they are, but into a copy, which also says what they add to the totals.
      packing.first_slot -= merged;
      packing.first_cluster -= batch.clusters;
      const int32_t* offsets = index.offsets + task * (index.clusters + 1) + packing.first_cluster;
      for (int64_t c = thread; c <= batch.clusters; c += kThreads) {
        memory.starts[c] = offsets[c] - static_cast<int32_t>(packing.first_slot);
      }
      for (int64_t t = thread; t < merged; t += kThreads) {
        memory.order[t] = static_cast<int32_t>(t);
      }
      __syncthreads();
      IndexView copy = index;
      copy.store_keys = {copied_keys - packing.first_slot * head_dim, 0, 0, head_dim};
      copy.store_values = {copied_values - packing.first_slot * head_dim, 0, 0, head_dim};
      old = pack_groups<T, kGroups>(
          copy, packing,
          TokenRows<T>{
              index.store_keys.row<const T>(b, h, packing.first_slot), index.store_keys.stride_t},
          TokenRows<T>{
              index.store_values.row<const T>(b, h, packing.first_slot),
              index.store_values.stride_t},
          head_dim, sums);
      __syncthreads();
      keys = {copied_keys, head_dim};
      values = {copied_values, head_dim};
      // The clusters so far are what k-means begins with, so that it needs few passes.
      seeds = {
          index.centroid_keys.row<const T>(b, h, packing.first_cluster),
          index.centroid_keys.stride_t};
      seed_tokens = batch.clusters;
      outliers = 0;  // theirs are among them
    } else {
      keys = {op.steady_keys.row<const T>(b, h, op.sink_tokens), op.steady_keys.stride_t};
      values = {op.steady_values.row<const T>(b, h, op.sink_tokens), op.steady_values.stride_t};
      seeds = keys;
    }

    segment_mean<T, kVectorOf<kGroups>, kWarps>(keys, batch.tokens, head_dim, memory.mean, sums);
    first_centroids<T, kGroups, kWarps>(
        seeds, seed_tokens, clusters_in_pass(batch.clusters, outliers, 0), head_dim, memory);
    for (int64_t pass = 0; pass < batch.iterations; ++pass) {
      __syncthreads();
      if (pass > 0) {
        update_centroids<T, kGroups, kWarps>(
            keys, batch.tokens, batch.clusters, outliers, pass, head_dim, memory, assigned, 0,
            batch.sort.warps, memory.histogram);
        __syncthreads();
      }
      for (int64_t t = 0; t < batch.tokens; t += kWarps * kWarpTokens<kGroups>) {
        assign_tokens<T, kGroups, kWarps, kWarpTokens<kGroups>>(
            keys, t, batch.tokens, clusters_in_pass(batch.clusters, outliers, pass), head_dim,
            memory, assigned, 0, shared);
      }
    }
    __syncthreads();
    sort_by_cluster<kWarps>(
        assigned, batch.tokens, 0, batch.clusters, batch.sort.warps, memory.histogram,
        memory.starts, memory.order);
    write_offsets(index, packing);
    const GroupSums added = pack_groups<T, kGroups>(index, packing, keys, values, head_dim, sums);
    if (thread < head_dim) {
      float& residual = index.residuals[task * op.head_dim + thread];
      // Sums in another order may differ in their last digits: no residual falls below zero.
      residual = fmaxf(residual - old.residual, 0.0f) + added.residual;
      float& value_sum = index.value_sums[task * op.head_dim + thread];
      value_sum = value_sum - old.value + added.value;
    }
    __syncthreads();
    if (merging) {
      open = 0;
      continue;
    }
    const int64_t rest = op.sink_tokens + segment;
    move_up<T>(op.steady_keys, b, h, rest, steady - rest, segment, head_dim);
    move_up<T>(op.steady_values, b, h, rest, steady - rest, segment, head_dim);
    steady -= segment;
    slots += segment;
    clusters += batch.clusters;
    if (merged > 0) open += segment;
    ++grown;
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
  counters[kIndexedTokens] = slots;
  counters[kClusters] = clusters;
  counters[kOpenTokens] = open;
  counters[kUpdates] += grown;
}

template <typename T, int kGroups>
void run(const Launcher& launch, const Tensor& steady, GrowParams& params) {
  const int64_t tasks = params.op.batch * params.op.heads;
  Workspace workspace;
  const int64_t means = workspace.reserve<float>(tasks * params.op.head_dim);
  const int64_t panels =
      workspace.reserve<Scored<T>>(tasks * panel_elements<kGroups>(params.most_clusters));
  const int64_t biases = workspace.reserve<float>(tasks * params.most_clusters);
  const int64_t assigned = workspace.reserve<int32_t>(tasks * params.most_tokens);
  const int64_t starts = workspace.reserve<int32_t>(tasks * (params.most_clusters + 1));
  const int64_t order = workspace.reserve<int32_t>(tasks * params.most_tokens);
  const int64_t histogram = workspace.reserve<int32_t>(tasks * params.histogram_size);
  const int64_t copies = workspace.reserve<T>(tasks * 2 * params.merge.tokens * params.op.head_dim);
  workspace.allocate(steady);
  params.means = workspace.at<float>(means);
  params.panels = workspace.at<char>(panels);
  params.biases = workspace.at<float>(biases);
  params.assigned = workspace.at<int32_t>(assigned);
  params.starts = workspace.at<int32_t>(starts);
  params.order = workspace.at<int32_t>(order);
  params.histogram = workspace.at<int32_t>(histogram);
  params.copies = workspace.at<char>(copies);
  const int64_t sort_bytes =
      std::max(params.update.sort.shared_bytes, params.merge.sort.shared_bytes);
  launch(
      grow_kernel<T, kGroups>, grid_of(tasks), kThreads,
      std::max(sort_bytes, kAssignBytes<kGroups>), 1, params);
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
    int64_t iterations,
    int64_t merged_updates,
    int64_t merge_iterations) {
  const Call<GrowIndexParams> call = grow_index_call(
      steady, store, centroids, offsets, variances, totals, counters, sink_tokens, local_tokens,
      update_segment, cluster_size, iterations, merged_updates, merge_iterations);
  // No row can come to hold that many tokens; beyond here the sum of the three cannot overflow.
  const int64_t capacity = steady.size(3);
  if (sink_tokens > capacity || local_tokens > capacity - sink_tokens ||
      update_segment > capacity - sink_tokens - local_tokens) {
    return;
  }
  const Launcher launch("grow_index", steady);
  GrowParams params = {};
  params.op = call.params;
  const int64_t clusters = cluster_count(update_segment, cluster_size);
  params.update = {update_segment, clusters, iterations, plan_sort(clusters, kWarps)};
  params.merge.tokens = merged_tokens(params.op);
  if (params.merge.tokens > 0) {
    const int64_t together = merged_updates * clusters;
    params.merge = {params.merge.tokens, together, merge_iterations, plan_sort(together, kWarps)};
  }
  params.most_tokens = std::max(params.update.tokens, params.merge.tokens);
  params.most_clusters = std::max(params.update.clusters, params.merge.clusters);
  params.histogram_size = std::max(
      histogram_count(params.update.sort, params.update.clusters),
      histogram_count(params.merge.sort, params.merge.clusters));
  RETRO_CUDA_DISPATCH(params.op.dtype, run_typed, launch, steady, params);
}

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CUDA, m) { m.impl("grow_index", TORCH_BOX(&retro::grow_index)); }
