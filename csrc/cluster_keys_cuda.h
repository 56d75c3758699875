// Spherical k-means of one segment by one block, and its parts, for cluster_keys and grow_index.
//
// Scores are products of 16-bit numbers on the matrix units: keys as they are (float32 ones centred and
// rounded to bfloat16), centroids rounded to the same type. Where keys are not centred, the product of
// the mean with each centroid is subtracted instead, which gives the same up to float32.
#pragma once

#include "cluster_keys.h"
#include "cuda_common.h"

namespace retro {

// Sums over a segment or a group of clusters are made in this many parts, whatever the warps of a block.
constexpr int kStrands = 16;

template <typename T>
using Scored = std::conditional_t<std::is_same_v<T, __half>, __half, __nv_bfloat16>;

// Tokens of one (row, head), from the first of the segment.
template <typename T>
struct TokenRows {
  const T* first;
  int64_t stride;
  __device__ __forceinline__ const T* row(int64_t t) const { return first + t * stride; }
};

// A row is spread over a warp, kVector neighbours to a lane.
template <typename T, int kVector>
struct Vector {
  static constexpr int kBytes = kVector * static_cast<int>(sizeof(T));
  static constexpr int kWords = kBytes / 4;
  uint32_t words[kWords];

  __device__ __forceinline__ void load(const T* from) {
    if constexpr (kBytes % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i) {
        const uint4 own = reinterpret_cast<const uint4*>(from)[i];
        words[4 * i] = own.x, words[4 * i + 1] = own.y;
        words[4 * i + 2] = own.z, words[4 * i + 3] = own.w;
      }
    } else if constexpr (kBytes == 8) {
      const uint2 own = *reinterpret_cast<const uint2*>(from);
      words[0] = own.x, words[1] = own.y;
    } else {
      words[0] = *reinterpret_cast<const uint32_t*>(from);
    }
  }
  __device__ __forceinline__ void store(T* to) const {
    if constexpr (kBytes % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i) {
        reinterpret_cast<uint4*>(to)[i] =
            make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
      }
    } else if constexpr (kBytes == 8) {
      *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    } else {
      *reinterpret_cast<uint32_t*>(to) = words[0];
    }
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
  }
  __device__ __forceinline__ void to_floats(float (&out)[kVector]) const {
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) out[i] = __uint_as_float(words[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const float2 pair = unpack_pair<T>(words[i]);
        out[2 * i] = pair.x;
        out[2 * i + 1] = pair.y;
      }
    }
  }
  __device__ __forceinline__ void from_floats(const float (&in)[kVector]) {
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) words[i] = __float_as_uint(in[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = pack_pair<T>(in[2 * i], in[2 * i + 1]);
    }
  }
};

// Neighbours to a lane, and groups of 32 elements, that cover head_dim.
template <int kGroups>
inline constexpr int kVectorOf = kGroups <= 2 ? 2
    : kGroups <= 4                            ? 4
                                              : 8;

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// Sums over the threads of a block, in their order: of those before each, and of all.
template <int kWarps>
__device__ __forceinline__ int32_t sum_before(int32_t own, int32_t* warp_sums, int32_t& total) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int32_t sum = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int32_t before = sum - own;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += warp_sums[w];
    total += warp_sums[w];
  }
  __syncthreads();
  return before;
}

// What a segment's passes share, in global memory.
template <typename T>
struct SegmentMemory {
  float* mean;         // [D]
  Scored<T>* panels;   // unit centroids, eight together, as the lanes feed them to the matrix units
  float* biases;       // [clusters]: product of the mean with each
  int32_t* starts;     // [clusters + 1]: where each cluster begins in order
  int32_t* order;      // [tokens]: tokens by cluster, in their order
  int32_t* histogram;  // [warps, clusters]; where it does not fit into shared memory
};

template <int kGroups>
RETRO_HOST_DEVICE constexpr int64_t panel_elements(int64_t clusters) {
  return ceil_div(clusters, 8) * 8 * kGroups * 32;
}

template <typename T, int kVector, int kWarps>
__device__ void segment_mean(
    const TokenRows<T>& keys, int64_t tokens, int head_dim, float* mean, float* shared) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  constexpr int kTogether = 8;  // rows under way
  const bool inside = lane * kVector < head_dim;
  for (int strand = warp; strand < kStrands; strand += kWarps) {
    float sums[kVector] = {};
    for (int64_t t = strand; t < tokens; t += kTogether * kStrands) {
      Vector<T, kVector> rows[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        rows[i].clear();
        if (inside && t + i * kStrands < tokens) {
          rows[i].load(keys.row(t + i * kStrands) + lane * kVector);
        }
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        float row[kVector];
        rows[i].to_floats(row);
#pragma unroll
        for (int e = 0; e < kVector; ++e) sums[e] += row[e];
      }
    }
#pragma unroll
    for (int e = 0; e < kVector; ++e) shared[(strand * 32 + lane) * kVector + e] = sums[e];
  }
  __syncthreads();
  for (int d = thread; d < head_dim; d += kWarps * 32) {
    float sum = 0.0f;
    for (int strand = 0; strand < kStrands; ++strand) sum += shared[strand * 32 * kVector + d];
    mean[d] = sum / static_cast<float>(tokens);
  }
  __syncthreads();
}

// The direction of `row` becomes the centroid of `cluster`; a zero row keeps the old one, or gives a
// zero one where there is none yet.
template <typename T, int kGroups>
__device__ __forceinline__ void set_centroid(
    const SegmentMemory<T>& memory,
    int64_t cluster,
    const float (&row)[kVectorOf<kGroups>],
    const float (&mean)[kVectorOf<kGroups>],
    bool fresh) {
  constexpr int kVector = kVectorOf<kGroups>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float squares = 0.0f;
#pragma unroll
  for (int e = 0; e < kVector; ++e) squares += row[e] * row[e];
  const float norm = sqrtf(sum_of_warp(squares));
  const bool directed = norm > 0.0f;
  if (!directed && !fresh) return;
  float unit[kVector], rounded[kVector];
#pragma unroll
  for (int e = 0; e < kVector; ++e) unit[e] = directed ? row[e] / norm : 0.0f;
  Vector<Scored<T>, kVector> scored;
  scored.from_floats(unit);
  scored.to_floats(rounded);
  const int d = lane * kVector, chunk = d / 8;
  if (d < kGroups * 32) {
    const int64_t place =
        ((cluster / 8 * kGroups + chunk / 4) * 32 + cluster % 8 * 4 + chunk % 4) * 8 + d % 8;
    scored.store(memory.panels + place);
  }
  float bias = 0.0f;
  if constexpr (kMatrix<T>) {
#pragma unroll
    for (int e = 0; e < kVector; ++e) bias += mean[e] * rounded[e];
  }
  bias = sum_of_warp(bias);
  if (lane == 0) memory.biases[cluster] = bias;
}

template <int kVector>
__device__ __forceinline__ void load_mean(const float* mean, int head_dim, float (&out)[kVector]) {
  const int d = static_cast<int>(threadIdx.x) % 32 * kVector;
#pragma unroll
  for (int e = 0; e < kVector; ++e) out[e] = d < head_dim ? mean[d + e] : 0.0f;
}

// Centroids of evenly spaced keys.
template <typename T, int kGroups, int kWarps>
__device__ void first_centroids(
    const TokenRows<T>& keys,
    int64_t tokens,
    int64_t clusters,
    int head_dim,
    const SegmentMemory<T>& memory) {
  constexpr int kVector = kVectorOf<kGroups>;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  float mean[kVector];
  load_mean<kVector>(memory.mean, head_dim, mean);
  for (int64_t c = warp; c < clusters; c += kWarps) {
    Vector<T, kVector> raw;
    raw.clear();
    if (lane * kVector < head_dim) {
      raw.load(keys.row((2 * c + 1) * tokens / (2 * clusters)) + lane * kVector);
    }
    float row[kVector];
    raw.to_floats(row);
#pragma unroll
    for (int e = 0; e < kVector; ++e) row[e] -= mean[e];
    set_centroid<T, kGroups>(memory, c, row, mean, true);
  }
}

// A stable counting sort. `assigned` holds first_cluster + cluster; others are left out. A warp counts
// and places a stretch of tokens, `warps` of them take part.
template <int kWarps>
__device__ void sort_by_cluster(
    const int32_t* assigned,
    int64_t tokens,
    int32_t first_cluster,
    int64_t clusters,
    int warps,
    int32_t* histogram,
    int32_t* starts,
    int32_t* order) {
  __shared__ int32_t warp_sums[kWarps];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  for (int64_t i = thread; i < warps * clusters; i += kWarps * 32) histogram[i] = 0;
  __syncthreads();
  const int64_t stretch = ceil_div(ceil_div(tokens, warps), 32) * 32;
  const int64_t first = warp * stretch;
  const int64_t last = first + stretch < tokens ? first + stretch : tokens;
  int32_t* own = histogram + warp * clusters;
  if (warp < warps) {
    for (int64_t t = first; t < last; t += 32) {
      const int32_t c = t + lane < last ? assigned[t + lane] - first_cluster : -1;
      const unsigned same = __match_any_sync(kAllLanes, c);
      if (c >= 0 && c < clusters && lane == __ffs(static_cast<int>(same)) - 1)
        own[c] += __popc(same);
      __syncwarp();
    }
  }
  __syncthreads();
  int32_t sum = 0;
  for (int64_t start = 0; start < clusters; start += kWarps * 32) {
    const int64_t c = start + thread;
    int32_t count = 0;
    if (c < clusters) {
      for (int w = 0; w < warps; ++w) count += histogram[w * clusters + c];
    }
    int32_t total;
    int32_t place = sum + sum_before<kWarps>(count, warp_sums, total);
    sum += total;
    if (c < clusters) {
      starts[c] = place;
      for (int w = 0; w < warps; ++w) {
        const int32_t here = histogram[w * clusters + c];
        histogram[w * clusters + c] = place;
        place += here;
      }
    }
  }
  if (thread == 0) starts[clusters] = sum;
  __syncthreads();
  if (warp < warps) {
    for (int64_t t = first; t < last; t += 32) {
      const int32_t c = t + lane < last ? assigned[t + lane] - first_cluster : -1;
      const unsigned same = __match_any_sync(kAllLanes, c);
      const int leader = __ffs(static_cast<int>(same)) - 1;
      int32_t place = 0;
      if (c >= 0 && c < clusters && lane == leader) {
        place = own[c];
        own[c] = place + __popc(same);
      }
      place = __shfl_sync(kAllLanes, place, leader);
      if (c >= 0 && c < clusters) {
        order[place + __popc(same & ((1u << lane) - 1))] = static_cast<int32_t>(t + lane);
      }
      __syncwarp();
    }
  }
  __syncthreads();
}

// Where the sort counts: warps that take part, and shared memory for it; 0: in global memory.
struct SortPlan {
  int32_t warps;
  int64_t shared_bytes;
};

inline SortPlan plan_sort(int64_t clusters, int64_t block_warps) {
  constexpr int64_t kMostBytes = 192 * 1024;
  const int64_t bytes = std::max<int64_t>(clusters, 1) * static_cast<int64_t>(sizeof(int32_t));
  const int64_t warps = std::min<int64_t>(kMostBytes / bytes, block_warps);
  if (warps == 0) return {static_cast<int32_t>(block_warps), 0};
  return {static_cast<int32_t>(warps), warps * bytes};
}

inline int64_t histogram_count(const SortPlan& plan, int64_t clusters) {
  return plan.shared_bytes > 0 ? 0 : plan.warps * clusters;
}

// New centroids from the sorted tokens; an empty cluster keeps its own.
template <typename T, int kGroups, int kWarps>
__device__ void next_centroids(
    const TokenRows<T>& keys, int64_t clusters, int head_dim, const SegmentMemory<T>& memory) {
  constexpr int kVector = kVectorOf<kGroups>;
  constexpr int kTogether = kVector <= 4 ? 8 : 4;  // rows under way
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const bool inside = lane * kVector < head_dim;
  float mean[kVector];
  load_mean<kVector>(memory.mean, head_dim, mean);
  for (int64_t c = warp; c < clusters; c += kWarps) {
    const int32_t first = memory.starts[c], last = memory.starts[c + 1];
    float sums[kVector] = {};
    for (int32_t start = first; start < last; start += 32) {
      const int32_t token = start + lane < last ? memory.order[start + lane] : 0;
      const int32_t count = last - start < 32 ? last - start : 32;
      for (int32_t k = 0; k < count; k += kTogether) {
        Vector<T, kVector> rows[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          const int32_t t = __shfl_sync(kAllLanes, token, (k + i) % 32);
          rows[i].clear();
          if (inside && k + i < count) rows[i].load(keys.row(t) + lane * kVector);
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          float row[kVector];
          rows[i].to_floats(row);
          if (k + i < count) {
#pragma unroll
            for (int e = 0; e < kVector; ++e) sums[e] += row[e] - mean[e];
          }
        }
      }
    }
    if (last > first) set_centroid<T, kGroups>(memory, c, sums, mean, false);
  }
}

// Centroids of outliers, behind the `regular` ones, from the sorted tokens: of the tokens t, t + outliers,
// ... each gets the one that is farthest from the mean of its cluster. Neighbours in the text, the digits
// of one number, do not compete. `distances` [tokens] gets the bits of squared distances.
template <typename T, int kGroups, int kWarps>
__device__ void outlier_centroids(
    const TokenRows<T>& keys,
    int64_t tokens,
    int64_t regular,
    int64_t outliers,
    int head_dim,
    const SegmentMemory<T>& memory,
    int32_t* distances) {
  constexpr int kVector = kVectorOf<kGroups>;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const bool inside = lane * kVector < head_dim;
  float mean[kVector];
  load_mean<kVector>(memory.mean, head_dim, mean);
  const auto load = [&](int64_t t, float (&row)[kVector]) {
    Vector<T, kVector> raw;
    raw.clear();
    if (inside) raw.load(keys.row(t) + lane * kVector);
    raw.to_floats(row);
#pragma unroll
    for (int e = 0; e < kVector; ++e) row[e] -= mean[e];
  };
  for (int64_t c = warp; c < regular; c += kWarps) {
    const int32_t first = memory.starts[c], last = memory.starts[c + 1];
    float center[kVector] = {}, row[kVector];
#pragma unroll 4
    for (int32_t i = first; i < last; ++i) {
      load(memory.order[i], row);
#pragma unroll
      for (int e = 0; e < kVector; ++e) center[e] += row[e];
    }
    const float inverse = 1.0f / static_cast<float>(last - first);
#pragma unroll
    for (int e = 0; e < kVector; ++e) center[e] *= inverse;
#pragma unroll 4
    for (int32_t i = first; i < last; ++i) {
      const int32_t t = memory.order[i];
      load(t, row);
      float squares = 0.0f;
#pragma unroll
      for (int e = 0; e < kVector; ++e) squares += (row[e] - center[e]) * (row[e] - center[e]);
      squares = sum_of_warp(squares);
      if (lane == 0) distances[t] = __float_as_int(squares);
    }
  }
  __syncthreads();
  for (int64_t i = warp; i < outliers; i += kWarps) {
    float best = -1.0f;
    int32_t farthest = 0;
    for (int64_t t = i + lane * outliers; t < tokens; t += 32 * outliers) {
      const float own = __int_as_float(distances[t]);
      if (own > best) best = own, farthest = static_cast<int32_t>(t);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(kAllLanes, best, step);
      const int32_t candidate = __shfl_xor_sync(kAllLanes, farthest, step);
      if (other > best || (other == best && candidate < farthest)) {
        best = other;
        farthest = candidate;
      }
    }
    float row[kVector] = {};
    if (best >= 0.0f) load(farthest, row);  // else no number
    set_centroid<T, kGroups>(memory, regular + i, row, mean, true);
  }
}

// The centroids of a pass after the first, from the assignment of the pass before; `assigned` is used up.
template <typename T, int kGroups, int kWarps>
__device__ void update_centroids(
    const TokenRows<T>& keys,
    int64_t tokens,
    int64_t clusters,
    int64_t outliers,
    int64_t pass,
    int head_dim,
    const SegmentMemory<T>& memory,
    int32_t* assigned,
    int32_t first_cluster,
    int warps,
    int32_t* histogram) {
  const int64_t before = clusters_in_pass(clusters, outliers, pass - 1);
  sort_by_cluster<kWarps>(
      assigned, tokens, first_cluster, before, warps, histogram, memory.starts, memory.order);
  next_centroids<T, kGroups, kWarps>(keys, before, head_dim, memory);
  if (clusters_in_pass(clusters, outliers, pass) > before) {
    outlier_centroids<T, kGroups, kWarps>(
        keys, tokens, before, outliers, head_dim, memory, assigned);
  }
}

constexpr int kTogetherClusters = 64;  // of which a block holds the centroids, twice

// Tokens that one warp compares with all clusters at a time, if its kernel does nothing else: their keys
// stay in registers.
template <int kGroups>
inline constexpr int kWarpTokens = kGroups <= 4 ? 32 : 16;

template <int kGroups>
inline constexpr int64_t kAssignBytes = 2 *
    (kTogetherClusters * kGroups * 64 + kTogetherClusters * static_cast<int64_t>(sizeof(float)));

// Eight neighbours of a key, from element d on, as they are scored.
template <typename T>
__device__ __forceinline__ uint4 scored_chunk(const T* row, int d, const float* mean) {
  if constexpr (kMatrix<T>) {
    return *reinterpret_cast<const uint4*>(row + d);
  } else {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = pack_pair<Scored<T>>(
          row[d + 2 * i] - mean[d + 2 * i], row[d + 2 * i + 1] - mean[d + 2 * i + 1]);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// The cluster with the largest product for each of the block's kWarps * kTokens tokens from `begin`; ties
// go to the lower cluster. `assigned` gets first_cluster + cluster.
template <typename T, int kGroups, int kWarps, int kTokens>
__device__ void assign_tokens(
    const TokenRows<T>& keys,
    int64_t begin,
    int64_t tokens,
    int64_t clusters,
    int head_dim,
    const SegmentMemory<T>& memory,
    int32_t* assigned,
    int32_t first_cluster,
    uint4* shared) {
  constexpr int kTiles = kTokens / 16;
  constexpr int kPanels = kTogetherClusters / 8;
  constexpr int kPanelChunks = kGroups * 32;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int r = lane / 4, j = lane % 4;
  float* biases = reinterpret_cast<float*>(shared + 2 * kPanels * kPanelChunks);

  const int64_t first = begin + warp * kTokens;
  uint4 rows[kTiles][2][kGroups];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t t = first + 16 * m + 8 * i + r;
      const T* row = keys.row(t < tokens ? t : 0);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const int d = (4 * g + j) * 8;
        rows[m][i][g] = t < tokens && d < head_dim ? scored_chunk<T>(row, d, memory.mean)
                                                   : make_uint4(0, 0, 0, 0);
      }
    }
  }
  float best[kTiles][2];
  int32_t chosen[kTiles][2];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) best[m][i] = -INFINITY, chosen[m][i] = 0;
  }

  const int64_t rounds = ceil_div(clusters, kTogetherClusters), panels = ceil_div(clusters, 8);
  const uint4* source = reinterpret_cast<const uint4*>(memory.panels);
  const auto copy = [&](int stage, int64_t round) {
    for (int i = thread; i < kPanels * kPanelChunks; i += kWarps * 32) {
      const bool inside = round * kPanels + i / kPanelChunks < panels;
      copy_async(
          shared + stage * kPanels * kPanelChunks + i,
          source + (inside ? round * kPanels * kPanelChunks + i : 0), inside);
    }
    for (int i = thread; i < kTogetherClusters; i += kWarps * 32) {
      const int64_t c = round * kTogetherClusters + i;
      biases[stage * kTogetherClusters + i] = c < clusters ? -memory.biases[c] : -INFINITY;
    }
  };
  copy(0, 0);
  commit_copies();
  for (int64_t round = 0; round < rounds; ++round) {
    const int stage = static_cast<int>(round % 2);
    if (round + 1 < rounds) copy(1 - stage, round + 1);
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();
    const uint4* panel = shared + stage * kPanels * kPanelChunks;
    const float* bias = biases + stage * kTogetherClusters;
#pragma unroll 2
    for (int n = 0; n < kPanels; ++n) {
      const float2 origin = *reinterpret_cast<const float2*>(bias + n * 8 + 2 * j);
      float scores[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        scores[m][0] = scores[m][2] = origin.x;
        scores[m][1] = scores[m][3] = origin.y;
      }
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const uint4 own = panel[n * kPanelChunks + g * 32 + lane];
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          const uint4 &near = rows[m][0][g], &far = rows[m][1][g];
          float (&s)[4] = scores[m];
          multiply_tiles<Scored<T>>(
              s[0], s[1], s[2], s[3], near.x, far.x, near.y, far.y, own.x, own.y);
          multiply_tiles<Scored<T>>(
              s[0], s[1], s[2], s[3], near.z, far.z, near.w, far.w, own.z, own.w);
        }
      }
      const int32_t c = static_cast<int32_t>(round * kTogetherClusters) + n * 8;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int x = 0; x < 2; ++x) {
            const bool better = scores[m][2 * i + x] > best[m][i];
            best[m][i] = better ? scores[m][2 * i + x] : best[m][i];
            chosen[m][i] = better ? c + x : chosen[m][i];
          }
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float score = best[m][i];
      int32_t cluster = chosen[m][i] + 2 * j;
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        const float other = __shfl_xor_sync(kAllLanes, score, step);
        const int32_t candidate = __shfl_xor_sync(kAllLanes, cluster, step);
        if (other > score || (other == score && candidate < cluster)) {
          score = other;
          cluster = candidate;
        }
      }
      const int64_t t = first + 16 * m + 8 * i + r;
      if (j == 0 && t < tokens) assigned[t] = first_cluster + cluster;
    }
  }
}

// Calls function<T, groups>(...) with the groups of 32 elements that cover head_dim.
#define RETRO_BUILD_DISPATCH(T, head_dim, function, ...)     \
  do {                                                       \
    if ((head_dim) <= 64) function<T, 2>(__VA_ARGS__);       \
    else if ((head_dim) <= 96) function<T, 3>(__VA_ARGS__);  \
    else if ((head_dim) <= 128) function<T, 4>(__VA_ARGS__); \
    else function<T, 8>(__VA_ARGS__);                        \
  } while (false)

}  // namespace retro
