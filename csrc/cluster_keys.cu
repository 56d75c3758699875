#include "cluster_keys_cuda.h"

namespace retro {
namespace {

constexpr int kAssignWarps = 8;
constexpr int kWarps = 16;  // of a block that has a segment for itself
constexpr int kThreads = kWarps * 32;

struct KMeansParams {
  ClusterKeysParams op;
  int64_t most_segments, most_tokens, most_clusters;  // of a row; of a segment
  SortPlan sort;
  float* means;        // [segments, D]
  void* panels;        // [segments, panel_elements(most_clusters)]
  float* biases;       // [segments, most_clusters]
  int32_t* starts;     // [segments, most_clusters + 1]
  int32_t* order;      // [B * Hkv, T]
  int32_t* histogram;  // [segments, warps, most_clusters]
};

// A segment as the kernels see it; without tokens where the row has fewer segments.
template <typename T>
struct Segment {
  int64_t tokens = 0, clusters = 0, first_cluster = 0;
  TokenRows<T> keys;
  SegmentMemory<T> memory;
  int32_t* assigned;

  __device__ __forceinline__ int64_t outliers() const { return outlier_count(tokens, clusters); }
};

struct Span {
  int64_t first, tokens;
};

__device__ __forceinline__ Span span_of(const ClusterKeysParams& op, int64_t b) {
  int64_t first = op.spans[2 * b], last = op.spans[2 * b + 1];
  first = first < 0 ? 0 : first;
  last = last < op.tokens ? last : op.tokens;
  return {first, last > first ? last - first : 0};
}

template <typename T, int kGroups>
__device__ __forceinline__ Segment<T> segment_at(const KMeansParams& params, int64_t index) {
  const ClusterKeysParams& op = params.op;
  const int64_t task = index / params.most_segments, own = index % params.most_segments;
  const int64_t b = task / op.heads, h = task % op.heads;
  const Span span = span_of(op, b);
  Segment<T> segment;
  const int64_t segments = segment_count(span.tokens, op.segment_size);
  if (span.tokens == 0 || own >= segments) return segment;
  const int64_t clusters = cluster_count(span.tokens, op.cluster_size);
  const int64_t begin = span.tokens * own / segments;
  segment.tokens = span.tokens * (own + 1) / segments - begin;
  segment.first_cluster = clusters * own / segments;
  segment.clusters = clusters * (own + 1) / segments - segment.first_cluster;
  segment.keys = {op.keys.row<const T>(b, h, span.first + begin), op.keys.stride_t};
  const int64_t place = task * op.tokens + span.first + begin;
  segment.assigned = op.assignment + place;
  segment.memory.mean = params.means + index * op.head_dim;
  segment.memory.panels = static_cast<Scored<T>*>(params.panels) +
      index * panel_elements<kGroups>(params.most_clusters);
  segment.memory.biases = params.biases + index * params.most_clusters;
  segment.memory.starts = params.starts + index * (params.most_clusters + 1);
  segment.memory.order = params.order + place;
  segment.memory.histogram = params.histogram + index * params.sort.warps * params.most_clusters;
  return segment;
}

// Means and first centroids.
template <typename T, int kGroups>
__global__ void __launch_bounds__(kThreads, 1)
    begin_kernel(const __grid_constant__ KMeansParams params) {
  __shared__ float sums[kStrands * 32 * kVectorOf<kGroups>];
  release_successor();
  wait_for_predecessor();
  const ClusterKeysParams& op = params.op;
  if (blockIdx.x % params.most_segments == 0) {
    const int64_t task = blockIdx.x / params.most_segments;
    const Span span = span_of(op, task / op.heads);
    for (int64_t t = threadIdx.x; t < op.tokens; t += kThreads) {
      if (t < span.first || t >= span.first + span.tokens) op.assignment[task * op.tokens + t] = -1;
    }
  }
  const Segment<T> segment = segment_at<T, kGroups>(params, blockIdx.x);
  if (segment.tokens == 0) return;
  const int head_dim = static_cast<int>(op.head_dim);
  segment_mean<T, kVectorOf<kGroups>, kWarps>(
      segment.keys, segment.tokens, head_dim, segment.memory.mean, sums);
  first_centroids<T, kGroups, kWarps>(
      segment.keys, segment.tokens, segment.clusters - segment.outliers(), head_dim,
      segment.memory);
}

template <typename T, int kGroups>
__global__ void __launch_bounds__(kAssignWarps * 32, 2)
    assign_kernel(const __grid_constant__ KMeansParams params, int64_t pass, int64_t blocks) {
  extern __shared__ __align__(kSharedLine) uint4 shared[];
  release_successor();
  wait_for_predecessor();
  const Segment<T> segment = segment_at<T, kGroups>(params, blockIdx.x / blocks);
  const int64_t begin = blockIdx.x % blocks * kAssignWarps * kWarpTokens<kGroups>;
  if (begin >= segment.tokens) return;
  assign_tokens<T, kGroups, kAssignWarps, kWarpTokens<kGroups>>(
      segment.keys, begin, segment.tokens,
      clusters_in_pass(segment.clusters, segment.outliers(), pass),
      static_cast<int>(params.op.head_dim), segment.memory, segment.assigned,
      static_cast<int32_t>(segment.first_cluster), shared);
}

template <typename T, int kGroups>
__global__ void __launch_bounds__(kThreads, 1)
    update_kernel(const __grid_constant__ KMeansParams params, int64_t pass) {
  extern __shared__ int32_t counts[];
  release_successor();
  wait_for_predecessor();
  const Segment<T> segment = segment_at<T, kGroups>(params, blockIdx.x);
  if (segment.tokens == 0) return;
  update_centroids<T, kGroups, kWarps>(
      segment.keys, segment.tokens, segment.clusters, segment.outliers(), pass,
      static_cast<int>(params.op.head_dim), segment.memory, segment.assigned,
      static_cast<int32_t>(segment.first_cluster), params.sort.warps,
      params.sort.shared_bytes > 0 ? counts : segment.memory.histogram);
}

template <typename T, int kGroups>
void run(const Launcher& launch, const Tensor& keys, KMeansParams& params) {
  const ClusterKeysParams& op = params.op;
  const int64_t segments = op.batch * op.heads * params.most_segments;
  Workspace workspace;
  const int64_t means = workspace.reserve<float>(segments * op.head_dim);
  const int64_t panels =
      workspace.reserve<Scored<T>>(segments * panel_elements<kGroups>(params.most_clusters));
  const int64_t biases = workspace.reserve<float>(segments * params.most_clusters);
  const int64_t starts = workspace.reserve<int32_t>(segments * (params.most_clusters + 1));
  const int64_t order = workspace.reserve<int32_t>(op.batch * op.heads * op.tokens);
  const int64_t histogram =
      workspace.reserve<int32_t>(segments * histogram_count(params.sort, params.most_clusters));
  workspace.allocate(keys);
  params.means = workspace.at<float>(means);
  params.panels = workspace.at<char>(panels);
  params.biases = workspace.at<float>(biases);
  params.starts = workspace.at<int32_t>(starts);
  params.order = workspace.at<int32_t>(order);
  params.histogram = workspace.at<int32_t>(histogram);

  const int64_t blocks = ceil_div(params.most_tokens, kAssignWarps * kWarpTokens<kGroups>);
  launch(begin_kernel<T, kGroups>, grid_of(segments), kThreads, 0, 1, params);
  for (int64_t pass = 0; pass < op.iterations; ++pass) {
    if (pass > 0) {
      launch(
          update_kernel<T, kGroups>, grid_of(segments), kThreads, params.sort.shared_bytes, 1,
          params, pass);
    }
    launch(
        assign_kernel<T, kGroups>, grid_of(segments * blocks), kAssignWarps * 32,
        kAssignBytes<kGroups>, 1, params, pass, blocks);
  }
}

template <typename T>
void run_typed(const Launcher& launch, const Tensor& keys, KMeansParams& params) {
  RETRO_BUILD_DISPATCH(T, params.op.head_dim, run, launch, keys, params);
}

Tensor cluster_keys(
    const Tensor& keys,
    const Tensor& spans,
    int64_t cluster_size,
    int64_t segment_size,
    int64_t iterations) {
  Tensor assignment;
  const Call<ClusterKeysParams> call =
      cluster_keys_call(keys, spans, cluster_size, segment_size, iterations, assignment);
  const Launcher launch("cluster_keys", keys);
  if (assignment.numel() == 0) return assignment;
  KMeansParams params = {};
  params.op = call.params;
  // Only the device knows the spans. One of n tokens has n / segment_size segments, rounded, so that
  // none is longer than a segment and a half.
  const int64_t tokens = call.params.tokens;
  params.most_segments = segment_count(tokens, segment_size);
  params.most_tokens =
      segment_size < tokens ? std::min(tokens, segment_size + segment_size / 2 + 1) : tokens;
  params.most_clusters = std::min(
      cluster_count(tokens, cluster_size), cluster_count(params.most_tokens, cluster_size) + 1);
  params.sort = plan_sort(params.most_clusters, kWarps);
  RETRO_CUDA_DISPATCH(params.op.dtype, run_typed, launch, keys, params);
  return assignment;
}

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CUDA, m) {
  m.impl("cluster_keys", TORCH_BOX(&retro::cluster_keys));
}
