// Packing of sorted tokens, for pack_clusters and grow_index.
#pragma once

#include "cluster_keys_cuda.h"
#include "pack_clusters.h"

namespace retro {

// Clusters whose squared residuals and values one block sums; fixed, so that sums are too.
constexpr int kGroupClusters = 64;
constexpr int kStrandClusters = kGroupClusters / kStrands;
// Tokens summed before their sum joins that of the cluster: in one long sum of float32, a cluster of
// hundreds of tokens would lose digits.
constexpr int32_t kSumTokens = 32;

// Clusters of one (row, head) that go into the index behind what it holds.
struct Packing {
  int64_t b, h;
  int64_t first_slot, first_cluster, clusters;
  const int32_t* starts;  // [clusters + 1], in order
  const int32_t* order;   // tokens by cluster
};

// Where in the store the clusters begin.
__device__ inline void write_offsets(const IndexView& index, const Packing& packing) {
  int32_t* offsets = index.offsets + (packing.b * index.heads + packing.h) * (index.clusters + 1) +
      packing.first_cluster;
  for (int64_t c = threadIdx.x; c <= packing.clusters; c += blockDim.x) {
    offsets[c] = static_cast<int32_t>(packing.first_slot) + packing.starts[c];
  }
}

// sum += part; part = 0
template <int kCount>
__device__ __forceinline__ void fold(float (&sum)[kCount], float (&part)[kCount]) {
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    sum[e] += part[e];
    part[e] = 0.0f;
  }
}

// Sums over the tokens of some clusters, in element d.
struct GroupSums {
  float residual;  // squared distance of keys to their mean
  float value;
};

// Copies the tokens of 64 clusters, writes their means and variances, and gives thread d their sums in
// element d. Shared memory: [2, strands, 32 kVector].
template <typename T, int kGroups, int kWarps>
__device__ GroupSums pack_group(
    const IndexView& index,
    const Packing& packing,
    const TokenRows<T>& keys,
    const TokenRows<T>& values,
    int64_t group,
    int head_dim,
    float* shared) {
  constexpr int kVector = kVectorOf<kGroups>;
  constexpr int kTogether = kVector <= 4 ? 4 : 2;  // rows under way
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int d = lane * kVector;
  const bool inside = d < head_dim;
  for (int strand = warp; strand < kStrands; strand += kWarps) {
    float residuals[kVector] = {}, value_sums[kVector] = {};
    for (int i = 0; i < kStrandClusters; ++i) {
      const int64_t c = group * kGroupClusters + strand * kStrandClusters + i;
      if (c >= packing.clusters) break;
      const int32_t first = packing.starts[c], last = packing.starts[c + 1];
      float mean_key[kVector] = {}, mean_value[kVector] = {};
      float part_key[kVector] = {}, part_value[kVector] = {};
      for (int32_t start = first; start < last; start += kTogether) {
        if ((start - first) % kSumTokens == 0)
          fold(mean_key, part_key), fold(mean_value, part_value);
        Vector<T, kVector> key[kTogether], value[kTogether];
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          key[k].clear();
          value[k].clear();
          if (start + k < last && inside) {
            const int32_t t = packing.order[start + k];
            key[k].load(keys.row(t) + d);
            value[k].load(values.row(t) + d);
          }
        }
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          if (start + k < last && inside) {
            const int64_t slot = packing.first_slot + start + k;
            key[k].store(index.store_keys.row<T>(packing.b, packing.h, slot) + d);
            value[k].store(index.store_values.row<T>(packing.b, packing.h, slot) + d);
          }
          float row[kVector];
          key[k].to_floats(row);
#pragma unroll
          for (int e = 0; e < kVector; ++e) part_key[e] += row[e];
          value[k].to_floats(row);
#pragma unroll
          for (int e = 0; e < kVector; ++e) part_value[e] += row[e];
        }
      }
      fold(mean_key, part_key), fold(mean_value, part_value);
      const float size = static_cast<float>(last - first > 1 ? last - first : 1);
#pragma unroll
      for (int e = 0; e < kVector; ++e) value_sums[e] += mean_value[e];
#pragma unroll
      for (int e = 0; e < kVector; ++e) mean_key[e] /= size, mean_value[e] /= size;
      const int64_t at = packing.first_cluster + c;
      if (inside) {
        Vector<T, kVector> mean;
        mean.from_floats(mean_key);
        mean.store(index.centroid_keys.row<T>(packing.b, packing.h, at) + d);
        mean.from_floats(mean_value);
        mean.store(index.centroid_values.row<T>(packing.b, packing.h, at) + d);
      }
      float squares[kVector] = {}, part[kVector] = {};
      for (int32_t start = first; start < last; start += kTogether) {
        if ((start - first) % kSumTokens == 0) fold(squares, part);
        Vector<T, kVector> key[kTogether];
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          key[k].clear();
          if (start + k < last && inside) key[k].load(keys.row(packing.order[start + k]) + d);
        }
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          if (start + k >= last || !inside) continue;
          float row[kVector];
          key[k].to_floats(row);
#pragma unroll
          for (int e = 0; e < kVector; ++e) {
            part[e] += (row[e] - mean_key[e]) * (row[e] - mean_key[e]);
          }
        }
      }
      fold(squares, part);
      float total = 0.0f;
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        total += squares[e];
        residuals[e] += squares[e];
      }
      total = sum_of_warp(total);
      if (lane == 0) {
        index.variances[(packing.b * index.heads + packing.h) * index.clusters + at] = total / size;
      }
    }
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      shared[(strand * 32 + lane) * kVector + e] = residuals[e];
      shared[((kStrands + strand) * 32 + lane) * kVector + e] = value_sums[e];
    }
  }
  __syncthreads();
  GroupSums sums = {0.0f, 0.0f};
  if (thread < head_dim) {
    for (int strand = 0; strand < kStrands; ++strand) {
      sums.residual += shared[strand * 32 * kVector + thread];
      sums.value += shared[(kStrands + strand) * 32 * kVector + thread];
    }
  }
  __syncthreads();
  return sums;
}

}  // namespace retro
