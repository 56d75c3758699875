// Sort keys of clusters, and what both kernels that choose by them share.
#pragma once

#include <cooperative_groups.h>

#include "counters.h"
#include "select_clusters.h"
#include "wave_estimate.h"

namespace retro {

namespace groups_of_threads = cooperative_groups;

constexpr int64_t kMostBlocks = 8;  // of a portable thread block cluster
constexpr int kBins = 4096;
// The first bins are 64 to a factor of 2 in score, from 128 down; sums of at most G shares of 1 lie below
// that as a rule, and what does not falls into the first bin.
constexpr int kFirstShift = 17;
constexpr uint32_t kFirstBin = (0xfffffffdu - 0x43000000u) >> kFirstShift;
// Keys of one bin that are put in order by counting.
constexpr uint32_t kCandidates = 512;

__device__ __forceinline__ uint64_t pair_of(uint32_t low, uint32_t high) {
  return static_cast<uint64_t>(high) << 32 | low;
}

// Ascending keys are descending scores. A cluster without tokens, or whose score is not a number, comes
// behind all others, with this key; ties go by id.
constexpr uint32_t kLastKey = 0xfffffffeu;

__device__ __forceinline__ uint32_t sort_key(float score, bool empty) {
  return !empty && score >= 0.0f ? kLastKey - 1 - __float_as_uint(score) : kLastKey;
}

// A range of keys in which the last of the first k clusters lies.
struct Range {
  uint32_t low, high;  // first and last key
  uint32_t rank;       // of that cluster among those of the range
  uint32_t count;      // of clusters in the range

  // In order, no two keys need more thought: their clusters are few, or they are equal.
  __device__ __forceinline__ bool done() const { return count <= kCandidates || low == high; }
  __device__ __forceinline__ bool holds(uint32_t key) const { return key - low <= high - low; }
  __device__ __forceinline__ int shift() const {
    const int bits = 32 - __clz(static_cast<int>(high - low));
    return bits > 12 ? bits - 12 : 0;
  }
};
static_assert(kBins == 1 << 12);

__device__ __forceinline__ int first_bin(uint32_t key) {
  return __viaddmin_s32_relu(
      static_cast<int>(key >> kFirstShift), -static_cast<int>(kFirstBin), kBins - 1);
}

__device__ __forceinline__ void cut_first(int bin, Range& range) {
  range.low = bin == 0 ? 0 : (kFirstBin + bin) << kFirstShift;
  range.high = bin == kBins - 1 ? kLastKey : ((kFirstBin + bin + 1) << kFirstShift) - 1;
}

__device__ __forceinline__ void cut(int bin, Range& range) {
  const int shift = range.shift();
  const uint32_t low = range.low + (static_cast<uint32_t>(bin) << shift);
  const uint32_t width = (1u << shift) - 1;
  range.high = width < range.high - low ? low + width : range.high;
  range.low = low;
}

extern __shared__ __align__(kSharedLine) uint4 shared_memory[];

// The blocks that choose together for one (row, head), in a thread block cluster if they are several.
struct BlockCluster {
  bool several;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  groups_of_threads::cluster_group group = groups_of_threads::this_cluster();
#endif

  __device__ __forceinline__ explicit BlockCluster(bool are_several) : several(are_several) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    if (several) __trap();  // code for older GPUs on a newer one: blocks would not find each other
#endif
  }

  __device__ __forceinline__ void sync() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (several) {
      group.sync();
      return;
    }
#endif
    __syncthreads();
  }
  // sync() in two, of several blocks: all wait until all have arrived.
  __device__ __forceinline__ void arrive() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    group.barrier_arrive();
#endif
  }
  __device__ __forceinline__ void wait() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    group.barrier_wait();
#endif
  }
  __device__ __forceinline__ unsigned rank() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (several) return group.block_rank();
#endif
    return 0;
  }
  // The same variable in another block's shared memory.
  template <typename T>
  __device__ __forceinline__ T* in_block(T* variable, unsigned block) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (several) return group.map_shared_rank(variable, block);
#endif
    return variable;
  }
};

__device__ __forceinline__ uint32_t scan_warp(uint32_t sum) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, sum, step);
    if (static_cast<int>(threadIdx.x) % 32 >= step) sum += other;
  }
  return sum;
}

// Slot and tokens of the cluster at `offset`. An index in disorder must not lead outside the store.
__device__ __forceinline__ int32_t
slot_of(const int32_t* offset, int64_t store_capacity, int32_t& tokens) {
  const int32_t slot = offset[0];
  tokens = offset[1] - slot;
  const bool inside = slot >= 0 && tokens >= 0 && int64_t{slot} + tokens <= store_capacity;
  if (!inside) tokens = 0;
  return slot;
}

// What score block `i` has found for a query: the largest logit, and the sum of masses relative to it.
__device__ __forceinline__ float2
block_sum(const float2* sums, int64_t i, int64_t blocks, int stride) {
  return i < blocks ? __ldcg(sums + i * stride) : make_float2(-INFINITY, 0.0f);
}

// log2 of the sum of all masses of a query, which a warp adds up; `own` is block_sum of this lane.
__device__ __forceinline__ float norm_of(
    const float2* sums, float2 own, int64_t blocks, int stride) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float top = -INFINITY, sum = 0.0f;
#pragma unroll 1
  for (int64_t start = 0;;) {
    start += 32;
    const float2 next = block_sum(sums, start + lane, blocks, stride);  // while `own` is under way
    const float higher = fmaxf(top, own.x), origin = higher == -INFINITY ? 0.0f : higher;
    sum = sum * exp2_of(top - origin) + own.y * exp2_of(own.x - origin);
    top = higher;
    if (start >= blocks) break;
    own = next;
  }
  // As integers, negative numbers ascend with their magnitude.
  const auto flipped = [](int bits) { return bits ^ (bits >> 31 & 0x7fffffff); };
  const float all =
      __int_as_float(flipped(__reduce_max_sync(kAllLanes, flipped(__float_as_int(top)))));
  sum = top == -INFINITY ? 0.0f : sum * exp2_of(top - all);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return all + log2_of(sum);
}

// How many clusters of a row are live, and how many of them are chosen.
struct Budget {
  int live, retrieved, estimated;
};

__device__ __forceinline__ Budget budget_of(const SelectParams& params, int64_t counted_clusters) {
  Budget budget;
  budget.live = static_cast<int>(
      counted_clusters < 0                     ? 0
          : counted_clusters < params.clusters ? counted_clusters
                                               : params.clusters);
  const int64_t most =
      retrieved_count(params.retrieval_budget, params.min_retrieved_clusters, budget.live);
  budget.retrieved = static_cast<int>(most < params.max_retrieved ? most : params.max_retrieved);
  budget.estimated =
      min(static_cast<int>(budget_count(params.estimation_budget, budget.live)),
          budget.live - budget.retrieved);
  return budget;
}

}  // namespace retro
