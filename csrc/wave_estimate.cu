#include <cooperative_groups.h>

#include <string>
#include <tuple>

#include "counters.h"
#include "wave_estimate_cuda.h"

namespace retro {
namespace {

namespace groups_of_threads = cooperative_groups;

constexpr int kScoreThreads = 256;
constexpr int kScoreWarps = kScoreThreads / 32;
constexpr int kTileClusters = 16;  // rows of a matrix instruction
// Blocks on a processor. As many (row, head) pairs as there may be, all blocks find room at once, and each
// of their warps goes through tiles to its end.
constexpr int64_t kScoreBlocks = 2;

struct ScoreParams {
  int64_t heads, groups, head_dim, clusters;
  int32_t warp_tiles;
  uint32_t early_blocks;  // that find room at once
  Rows query, centroid_keys;
  const int32_t* offsets;   // [B, Hkv, C + 1]
  const float* variances;   // [B, Hkv, C]
  const float* residuals;   // [B, Hkv, D]
  const int64_t* counters;  // [B, kCounters]
  bool use_variance;
  float scale;
  float* log2_mass;  // [B * Hkv, C, G]; -inf: no tokens, or not live
  float* ranked;     // the same without sizes, for the paper's ranking; else nullptr
  float2*
      sums;  // [B * Hkv, blocks, G]: largest ranked logit (base 2), sum of the others relative to it
  int32_t* tickets;
  int64_t ticket_count;
};

// Tiles of a warp in shared memory, by the groups of four chunks in a row.
RETRO_HOST_DEVICE constexpr int score_stages(int groups) {
  return groups <= 4 ? 3 : groups <= 8 ? 2 : 1;
}

// Chunks of a tile: keys, then where each cluster begins and its variance.
RETRO_HOST_DEVICE constexpr int score_chunks(int groups) {
  return 2 * groups * 32 + (2 * (kTileClusters + 1) * 4 + 15) / 16;
}

// Logits, base 2, of the clusters of a block, their masses, and their sum for each query. Rows lie over
// the lanes as in attention: lane 4 r + j reads every fourth chunk from j of clusters r and r + 8, and gets
// the products with queries 2 j and 2 j + 1.
template <typename T, int kGroups, int kQueryTiles>
__global__ void __launch_bounds__(
    kScoreThreads, kMatrix<T>&& kGroups <= 4 && kQueryTiles == 1 ? 2 : 1)
    score_kernel(const __grid_constant__ ScoreParams params) {
  constexpr int kElements = kChunk<T>;
  constexpr int kQueries = 8 * kQueryTiles;
  constexpr int kStages = score_stages(kGroups);
  constexpr int kKeyChunks = 2 * kGroups * 32;
  constexpr int kTileChunks = score_chunks(kGroups);
  extern __shared__ uint4 shared[];
  __shared__ float2 warp_sums[kScoreWarps][kQueries];
  __shared__ float spreads_of[kQueries];
  __shared__ float rows[kMatrix<T> ? 1 : kQueries * kGroups * 4 * kElements];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int r = lane / 4, j = lane % 4;
  release_successor();

  const int groups = static_cast<int>(params.groups), heads = static_cast<int>(params.heads);
  const int query_tiles = (groups + kQueries - 1) / kQueries;
  const int tile_task = static_cast<int>(blockIdx.y) / query_tiles;
  const int64_t task = tile_task;
  const int b = tile_task / heads, h = tile_task - b * heads;
  const int first_query = (static_cast<int>(blockIdx.y) - tile_task * query_tiles) * kQueries;
  const int queries = min(groups - first_query, kQueries);
  const int clusters = static_cast<int>(params.clusters);
  const int row_chunks = static_cast<int>(params.head_dim) / kElements;
  const int tiles = params.warp_tiles;
  const int first = (static_cast<int>(blockIdx.x) * kScoreWarps * tiles + warp) * kTileClusters;
  const T* keys = params.centroid_keys.row<const T>(b, h, 0);
  const int64_t stride = params.centroid_keys.stride_t;
  uint4* own_tiles = shared + warp * kStages * kTileChunks;

  // L2 is coherent: lines of the index may come there before the predecessor has ended.
  if (blockIdx.x + blockIdx.y * gridDim.x < params.early_blocks) {
#pragma unroll 1
    for (int t = 0; t < min(tiles, kStages); ++t) {
      const int c = first + t * kScoreWarps * kTileClusters + lane / 2;
      if (c >= clusters) continue;
      const char* row = reinterpret_cast<const char*>(keys + c * stride);
#pragma unroll 1
      for (int at = lane % 2 * 128; at < row_chunks * 16; at += 256) prefetch_line(row + at);
    }
  }
  wait_for_predecessor();

  const int32_t* offsets = params.offsets + task * (params.clusters + 1);
  const float* all_variances = params.variances + task * params.clusters;
  const auto copy = [&](int stage, int t) {
    if (t < tiles) {
      uint4* tile = own_tiles + stage * kTileChunks;
      const int first_row = first + t * kScoreWarps * kTileClusters;
#pragma unroll(kGroups <= 4 ? 8 : 2)
      for (int k = 0; k < 2 * kGroups; ++k) {
        const int index = k * 32 + lane, row = index / (4 * kGroups), chunk = index % (4 * kGroups);
        const bool inside = first_row + row < clusters;
        const T* from = keys + (inside ? first_row + row : 0) * stride;
        copy_async(
            tile + (row / 8 * kGroups + chunk / 4) * 32 + row % 8 * 4 + chunk % 4,
            reinterpret_cast<const uint4*>(from) + chunk, inside && chunk < row_chunks);
      }
      if (lane <= kTileClusters) {
        int32_t* facts = reinterpret_cast<int32_t*>(tile + kKeyChunks);
        const int c = first_row + lane;
        copy_async_word(facts + lane, offsets + (c <= clusters ? c : 0), c <= clusters);
        copy_async_word(
            facts + kTileClusters + 1 + lane, all_variances + (c < clusters ? c : 0), c < clusters);
      }
    }
    commit_copies();
  };
#pragma unroll 1
  for (int t = 0; t < kStages - 1; ++t) copy(t, t);

  const int64_t live = params.counters[b * kCounters + kClusters];
  if (blockIdx.x == 0 && blockIdx.y == 0) {
#pragma unroll 1
    for (int64_t i = thread; i < params.ticket_count; i += kScoreThreads) params.tickets[i] = 0;
  }

  // Queries, and the spread of each, v_gi / variance_i, which one warp computes for all.
  uint4 chunks[kQueryTiles][kMatrix<T> ? kGroups : 1];
#pragma unroll
  for (int n = 0; n < kQueryTiles; ++n) {
    const int query = 8 * n + r;
    const T* row = params.query.row<const T>(b, h, first_query + query);
    float weighted = 0.0f, total = 0.0f;
#pragma unroll
    for (int c = 0; c < kGroups; ++c) {
      const int chunk = 4 * c + j;
      const bool inside = chunk < row_chunks;
      const uint4 own = inside && query < queries ? reinterpret_cast<const uint4*>(row)[chunk]
                                                  : make_uint4(0, 0, 0, 0);
      if constexpr (kMatrix<T>) chunks[n][c] = own;
      if (warp != 0) continue;
      float elements[kElements];
      unpack_chunk<T>(own, elements);
      if (inside) {
        const float* residuals = params.residuals + task * params.head_dim + chunk * kElements;
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          const float residual = residuals[e];
          total += residual;
          weighted += elements[e] * elements[e] * residual;
        }
      }
      if constexpr (!kMatrix<T>) {
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          rows[query * kGroups * 4 * kElements + chunk * kElements + e] = elements[e];
        }
      }
    }
    if (warp != 0) continue;
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      total += __shfl_xor_sync(kAllLanes, total, step);
      weighted += __shfl_xor_sync(kAllLanes, weighted, step);
    }
    const bool spreads = params.use_variance && total > 0.0f;
    if (j == 0) {
      spreads_of[query] = spreads ? 0.5f * params.scale * params.scale * weighted / total : 0.0f;
    }
  }
  __syncthreads();
  float spread[kQueryTiles][2], top[kQueryTiles][2], sum[kQueryTiles][2];
#pragma unroll
  for (int n = 0; n < kQueryTiles; ++n) {
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      spread[n][x] = spreads_of[8 * n + 2 * j + x];
      top[n][x] = -INFINITY;
      sum[n][x] = 0.0f;
    }
  }

  const float scale2 = params.scale * kLog2e;
  const bool pairs = groups % 2 == 0;
  int stage = 0, ahead = kStages - 1;
#pragma unroll 1
  for (int t = 0; t < tiles; ++t) {
    copy(ahead, t + kStages - 1);
    if (++ahead == kStages) ahead = 0;
    wait_for_copies<kStages - 1>();
    __syncwarp();
    const uint4* tile = own_tiles + stage * kTileChunks;
    if (++stage == kStages) stage = 0;
    const int32_t* facts = reinterpret_cast<const int32_t*>(tile + kKeyChunks);
    int32_t sizes[2];
    float variances[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sizes[i] = facts[r + 8 * i + 1] - facts[r + 8 * i];
      variances[i] = __int_as_float(facts[kTileClusters + 1 + r + 8 * i]);
    }

    float logits[kQueryTiles][4];
    if constexpr (kMatrix<T>) {
#pragma unroll
      for (int n = 0; n < kQueryTiles; ++n) {
        logits[n][0] = logits[n][1] = logits[n][2] = logits[n][3] = 0.0f;
      }
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const uint4 near = tile[g * 32 + lane], far = tile[(kGroups + g) * 32 + lane];
#pragma unroll
        for (int n = 0; n < kQueryTiles; ++n) {
          float (&s)[4] = logits[n];
          const uint4& q = chunks[n][g];
          multiply_tiles<T>(s[0], s[1], s[2], s[3], near.x, far.x, near.y, far.y, q.x, q.y);
          multiply_tiles<T>(s[0], s[1], s[2], s[3], near.z, far.z, near.w, far.w, q.z, q.w);
        }
      }
    } else {
      float parts[2][kQueries] = {};
#pragma unroll 2
      for (int g = 0; g < kGroups; ++g) {
        float key[2][kElements];
        unpack_chunk<T>(tile[g * 32 + lane], key[0]);
        unpack_chunk<T>(tile[(kGroups + g) * 32 + lane], key[1]);
#pragma unroll
        for (int query = 0; query < kQueries; ++query) {
#pragma unroll
          for (int e = 0; e < kElements; ++e) {
            const float q = rows[query * kGroups * 4 * kElements + (4 * g + j) * kElements + e];
            parts[0][query] += key[0][e] * q;
            parts[1][query] += key[1][e] * q;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int query = 0; query < kQueries; ++query) {
          float dot = parts[i][query];
          dot += __shfl_xor_sync(kAllLanes, dot, 1);
          dot += __shfl_xor_sync(kAllLanes, dot, 2);
          if (query % 8 / 2 == j) logits[query / 8][2 * i + query % 2] = dot;
        }
      }
    }

#pragma unroll
    for (int n = 0; n < kQueryTiles; ++n) {
      const int query = 8 * n + 2 * j;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int c = first + t * kScoreWarps * kTileClusters + r + 8 * i;
        const int32_t size = c < live && c < clusters ? sizes[i] : 0;
        float plain[2], mass[2];
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          float& logit = logits[n][2 * i + x];
          const float weight = static_cast<float>(size) * (1.0f + variances[i] * spread[n][x]);
          plain[x] = size > 0 ? logit * scale2 : -INFINITY;
          mass[x] = size > 0 ? logit * scale2 + log2_of(weight) : -INFINITY;
          logit = params.use_variance ? mass[x] : plain[x];
        }
        if (c >= clusters || query >= queries) continue;
        const int64_t at = (task * params.clusters + c) * groups + first_query + query;
        if (pairs) {
          *reinterpret_cast<float2*>(params.log2_mass + at) = make_float2(mass[0], mass[1]);
          if (params.ranked != nullptr) {
            *reinterpret_cast<float2*>(params.ranked + at) = make_float2(plain[0], plain[1]);
          }
          continue;
        }
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          if (query + x >= queries) continue;
          params.log2_mass[at + x] = mass[x];
          if (params.ranked != nullptr) params.ranked[at + x] = plain[x];
        }
      }
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        const float higher = fmaxf(top[n][x], fmaxf(logits[n][x], logits[n][2 + x]));
        const float origin = higher == -INFINITY ? 0.0f : higher;
        sum[n][x] = sum[n][x] * exp2_of(top[n][x] - origin) + exp2_of(logits[n][x] - origin) +
            exp2_of(logits[n][2 + x] - origin);
        top[n][x] = higher;
      }
    }
    __syncwarp();  // the tile's memory may be copied into again
  }
#pragma unroll
  for (int n = 0; n < kQueryTiles; ++n) {
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      float higher = top[n][x];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        higher = fmaxf(higher, __shfl_xor_sync(kAllLanes, higher, step));
      }
      float all = higher == -INFINITY ? 0.0f : sum[n][x] * exp2_of(top[n][x] - higher);
#pragma unroll
      for (int step = 4; step < 32; step *= 2) all += __shfl_xor_sync(kAllLanes, all, step);
      if (r == 0) warp_sums[warp][8 * n + 2 * j + x] = make_float2(higher, all);
    }
  }
  __syncthreads();
  if (thread < queries) {
    float2 all = warp_sums[0][thread];
#pragma unroll 1
    for (int w = 1; w < kScoreWarps; ++w) {
      const float2 own = warp_sums[w][thread];
      const float higher = fmaxf(all.x, own.x), origin = higher == -INFINITY ? 0.0f : higher;
      all = make_float2(higher, all.y * exp2_of(all.x - origin) + own.y * exp2_of(own.x - origin));
    }
    params.sums[(task * gridDim.x + blockIdx.x) * groups + first_query + thread] = all;
  }
}

int64_t warp_tiles_of(int64_t clusters, int64_t tasks, int64_t processors) {
  const int64_t tiles = std::max<int64_t>(ceil_div(clusters, kTileClusters * kScoreWarps), 1);
  const int64_t blocks = std::max<int64_t>(kScoreBlocks * processors / tasks, 1);
  return ceil_div(tiles, blocks);
}

// Without clusters one block still sets the tickets.
int64_t score_block_count(int64_t clusters, int64_t warp_tiles) {
  return std::max<int64_t>(ceil_div(clusters, kTileClusters * kScoreWarps * warp_tiles), 1);
}

template <typename T, int kGroups>
void launch_score_groups(const Launcher& launch, const ScoreParams& params, int64_t tasks) {
  const int64_t blocks = score_block_count(params.clusters, params.warp_tiles);
  constexpr int64_t kBytes = kScoreWarps * score_stages(kGroups) * score_chunks(kGroups) * 16;
  if (params.groups <= 8 || kGroups > 4) {
    launch(
        score_kernel<T, kGroups, 1>, grid_of(blocks, tasks * ceil_div(params.groups, 8)),
        kScoreThreads, kBytes, 1, params);
  } else if constexpr (kGroups <= 4) {
    launch(
        score_kernel<T, kGroups, 2>, grid_of(blocks, tasks * ceil_div(params.groups, 16)),
        kScoreThreads, kBytes, 1, params);
  }
}

template <typename T>
void launch_score(const Launcher& launch, const ScoreParams& params, int64_t tasks) {
  constexpr int kScale = kMatrix<T> ? 1 : 2;  // float32 has twice the chunks
  if (params.head_dim <= 64) launch_score_groups<T, 2 * kScale>(launch, params, tasks);
  else if (params.head_dim <= 96) launch_score_groups<T, 3 * kScale>(launch, params, tasks);
  else if (params.head_dim <= 128) launch_score_groups<T, 4 * kScale>(launch, params, tasks);
  else launch_score_groups<T, 8 * kScale>(launch, params, tasks);
}

constexpr int kSelectThreads = 1024;
constexpr int kSelectWarps = kSelectThreads / 32;
constexpr int kBins = 2048;
constexpr int kThreadBins = kBins / kSelectThreads;
// Sort keys are cut into 11, 11 and 10 bits.
constexpr int kDigits = 3;
// Of a (row, head) with more clusters, several processors choose together.
constexpr int64_t kBlockKeys = 16384;
constexpr int64_t kMostBlocks = 8;  // of a portable thread block cluster
// Sort keys that fit into shared memory; beyond, they stay in global memory.
constexpr int64_t kKeysInShared = 32768;
// Retrieved clusters that are put in order by counting; beyond, by a sorting network.
constexpr int64_t kCountedRanks = 2048;
constexpr int kLanesPerRank = 8;

struct SelectParams {
  int64_t heads, groups, clusters, score_blocks;
  const int32_t* offsets;  // [B, Hkv, C + 1]
  const float* ranked;     // [B * Hkv, C, G]
  const float2* sums;      // [B * Hkv, blocks, G]
  int64_t max_retrieved, min_retrieved_clusters;
  double retrieval_budget, estimation_budget;
  uint32_t* keys;   // [B * Hkv, C], where they do not fit into shared memory
  uint64_t* order;  // [B * Hkv, R rounded up to a power of 2]: keys and ids of retrieved clusters
  int64_t order_capacity;
  Choice choice;
};

// Sums over the threads of a block, in their order; each thread gets the sum of those before it.
__device__ __noinline__ uint64_t sum_before(uint64_t own, uint64_t* warp_totals, uint64_t& total) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  uint64_t sum = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t other = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) warp_totals[warp] = sum;
  __syncthreads();
  uint64_t before = lane < kSelectWarps ? warp_totals[lane] : 0;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t other = __shfl_up_sync(kAllLanes, before, step);
    if (lane >= step) before += other;
  }
  total = __shfl_sync(kAllLanes, before, 31);
  const uint64_t previous = __shfl_sync(kAllLanes, before, warp > 0 ? warp - 1 : 0);
  __syncthreads();  // warp_totals may be used again
  return sum - own + (warp > 0 ? previous : 0);
}

__device__ __forceinline__ uint64_t pair_of(uint32_t low, uint32_t high) {
  return static_cast<uint64_t>(high) << 32 | low;
}

// Ascending keys are descending scores. A cluster without tokens, or whose score is not a number, comes
// behind all others; ties go by id.
__device__ __forceinline__ uint32_t sort_key(float score, int32_t size) {
  return size > 0 && score >= 0.0f ? 0xfffffffeu - __float_as_uint(score) : 0xffffffffu;
}

// The threshold of the first k clusters in order: those with smaller keys are among them, and of those
// with an equal key the first `equals` by id.
struct Threshold {
  uint32_t key;
  uint32_t equals;
};

struct SelectShared {
  uint32_t counts[kDigits][2][kBins];  // of keys by digit, for both thresholds
  uint64_t warp_totals[kSelectWarps];
  uint64_t block_totals[2];
  Threshold thresholds[2];
};

struct Cluster {
  bool several;
  groups_of_threads::cluster_group group;

  __device__ __noinline__ void sync() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (several) {
      group.sync();
      return;
    }
#endif
    __syncthreads();
  }
  __device__ __forceinline__ unsigned rank() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (several) return group.block_rank();
#endif
    return 0;
  }
  // The same variable in another block's shared memory.
  template <typename T>
  __device__ __forceinline__ const T* in_block(const T* variable, unsigned block) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (several) return group.map_shared_rank(const_cast<T*>(variable), block);
#endif
    return variable;
  }
};

// Refines both thresholds by one digit, from the counts of all blocks.
__device__ __noinline__ void refine(
    SelectShared& shared, const Cluster& cluster, unsigned blocks, int digit, int bits) {
  const int thread = static_cast<int>(threadIdx.x);
  cluster.sync();
  uint32_t counts[2][kThreadBins];  // [threshold][bin kThreadBins thread + ...]
  uint32_t sums[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int table = digit == 0 ? 0 : i;
#pragma unroll
    for (int bin = 0; bin < kThreadBins; ++bin) counts[i][bin] = 0;
#pragma unroll 1
    for (unsigned block = 0; block < blocks; ++block) {
      const uint32_t* own =
          cluster.in_block(shared.counts[digit][table] + kThreadBins * thread, block);
#pragma unroll
      for (int bin = 0; bin < kThreadBins; ++bin) counts[i][bin] += own[bin];
    }
#pragma unroll
    for (int bin = 0; bin < kThreadBins; ++bin) sums[i] += counts[i][bin];
  }
  const Threshold old[2] = {shared.thresholds[0], shared.thresholds[1]};
  uint64_t total;
  const uint64_t before = sum_before(pair_of(sums[0], sums[1]), shared.warp_totals, total);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t less = static_cast<uint32_t>(i == 0 ? before : before >> 32);
#pragma unroll
    for (int bin = 0; bin < kThreadBins; ++bin) {
      if (old[i].equals > less && old[i].equals <= less + counts[i][bin]) {
        shared.thresholds[i].key =
            old[i].key << bits | static_cast<uint32_t>(kThreadBins * thread + bin);
        shared.thresholds[i].equals = old[i].equals - less;
      }
      less += counts[i][bin];
    }
    if (thread == 0 && old[i].equals == 0) shared.thresholds[i].key = 0;  // nothing to choose
  }
  __syncthreads();
}

// Sorts all entries, by all blocks together; `order` has room up to a power of two.
__device__ __noinline__ void sort_entries(
    uint64_t* order, int count, int own_thread, int all_threads, const Cluster& cluster) {
  int size = 1;
  while (size < count) size *= 2;
  for (int i = count + own_thread; i < size; i += all_threads) order[i] = ~0ull;
#pragma unroll 1
  for (int run = 2; run <= size; run *= 2) {
#pragma unroll 1
    for (int distance = run / 2; distance > 0; distance /= 2) {
      __threadfence();
      cluster.sync();
#pragma unroll 1
      for (int i = own_thread; i < size / 2; i += all_threads) {
        const int low = (i & ~(distance - 1)) * 2 + (i & (distance - 1)), high = low + distance;
        const uint64_t a = __ldcg(order + low), b = __ldcg(order + high);
        if ((a > b) == ((low & run) == 0)) {
          __stcg(order + low, b);
          __stcg(order + high, a);
        }
      }
    }
  }
  __threadfence();
  cluster.sync();
}

__global__ void __launch_bounds__(kSelectThreads) select_kernel(
    const __grid_constant__ SelectParams params, int32_t blocks, int32_t keys_in_shared) {
  extern __shared__ uint4 memory[];
  SelectShared& shared = *reinterpret_cast<SelectShared*>(memory);
  float* norms = reinterpret_cast<float*>(&shared + 1);  // [G]: log2 of the sum of all masses
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  release_successor();
  const Cluster cluster{blocks > 1, groups_of_threads::this_cluster()};
  const int64_t task = static_cast<int32_t>(blockIdx.x) / blocks;
  const int64_t b = static_cast<int32_t>(task) / static_cast<int32_t>(params.heads);
  const unsigned block = cluster.rank();
#pragma unroll 1
  for (int i = thread; i < kDigits * 2 * kBins / 4; i += kSelectThreads) {
    reinterpret_cast<uint4*>(&shared.counts[0][0][0])[i] = make_uint4(0, 0, 0, 0);
  }
  wait_for_predecessor();

  const Choice& choice = params.choice;
  int64_t live = choice.counters[b * kCounters + kClusters];
  live = live < 0 ? 0 : live < params.clusters ? live : params.clusters;
  int64_t retrieved = retrieved_count(params.retrieval_budget, params.min_retrieved_clusters, live);
  retrieved = retrieved < params.max_retrieved ? retrieved : params.max_retrieved;
  int64_t estimated = budget_count(params.estimation_budget, live);
  estimated = estimated < live - retrieved ? estimated : live - retrieved;
  if (thread < 2) {
    const int64_t count = thread == 0 ? retrieved : retrieved + estimated;
    shared.thresholds[thread] = {0, static_cast<uint32_t>(count)};
  }
  // Sort keys of this block's share of the clusters, a multiple of four for each thread.
  const int round = blocks * kSelectThreads * 4;
  const int per_thread = (static_cast<int>(live) + round - 1) / round * 4;
  const int first = static_cast<int>(block) * per_thread * kSelectThreads;
  const int count = max(0, min(static_cast<int>(live) - first, per_thread * kSelectThreads));
  const int32_t* offsets = params.offsets + task * (params.clusters + 1) + first;
  const float* ranked = params.ranked + (task * params.clusters + first) * params.groups;
  uint32_t* keys = keys_in_shared != 0
      ? reinterpret_cast<uint32_t*>(norms + ceil_div(params.groups, 4) * 4)
      : params.keys + task * ceil_div(params.clusters, 4) * 4 + first;
  const bool quads = params.groups % 4 == 0;
  constexpr int kAhead = 4;  // scores of a thread that are under way
  float4 logits[kAhead];
  int2 ends[kAhead];
  const auto fetch = [&](int start) {
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int i = start + thread + k * kSelectThreads;
      if (i >= count) continue;
      ends[k] = make_int2(offsets[i], offsets[i + 1]);
      if (quads) logits[k] = *reinterpret_cast<const float4*>(ranked + i * params.groups);
    }
  };
  fetch(0);
  const int groups = static_cast<int>(params.groups);
#pragma unroll 1
  for (int g = warp; g < params.groups; g += kSelectWarps) {
    const float2* sums = params.sums + task * params.score_blocks * params.groups + g;
    float2 all = make_float2(-INFINITY, 0.0f);
#pragma unroll 1
    for (int i = lane; i < params.score_blocks; i += 32) {
      const float2 own = sums[i * params.groups];
      const float top = fmaxf(all.x, own.x), origin = top == -INFINITY ? 0.0f : top;
      all = make_float2(top, all.y * exp2_of(all.x - origin) + own.y * exp2_of(own.x - origin));
    }
#pragma unroll 1
    for (int step = 16; step > 0; step /= 2) {
      const float2 own = make_float2(
          __shfl_xor_sync(kAllLanes, all.x, step), __shfl_xor_sync(kAllLanes, all.y, step));
      const float top = fmaxf(all.x, own.x), origin = top == -INFINITY ? 0.0f : top;
      all = make_float2(top, all.y * exp2_of(all.x - origin) + own.y * exp2_of(own.x - origin));
    }
    if (lane == 0) norms[g] = all.x + log2_of(all.y);
  }
  __syncthreads();
#pragma unroll 1
  for (int start = 0; start < count; start += kAhead * kSelectThreads) {
    if (start > 0) fetch(start);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int i = start + thread + k * kSelectThreads;
      if (i >= count) continue;
      float score = 0.0f;
      const float* own = ranked + i * params.groups;
      if (quads) {
        score = exp2_of(logits[k].x - norms[0]) + exp2_of(logits[k].y - norms[1]) +
            exp2_of(logits[k].z - norms[2]) + exp2_of(logits[k].w - norms[3]);
      }
#pragma unroll 1
      for (int g = quads ? 4 : 0; g < groups; ++g) {
        score += exp2_of(own[g] - norms[g]);
      }
      const uint32_t key = sort_key(score, ends[k].y - ends[k].x);
      keys[i] = key;
      atomicAdd(&shared.counts[0][0][key >> 21], 1u);
    }
  }
  refine(shared, cluster, blocks, 0, 11);
  {
    const uint32_t near = shared.thresholds[0].key, far = shared.thresholds[1].key;
#pragma unroll 2
    for (int i = thread; i < count; i += kSelectThreads) {
      const uint32_t key = keys[i];
      if (key >> 21 == near) atomicAdd(&shared.counts[1][0][key >> 10 & 2047], 1u);
      if (key >> 21 == far) atomicAdd(&shared.counts[1][1][key >> 10 & 2047], 1u);
    }
  }
  refine(shared, cluster, blocks, 1, 11);
  {
    const uint32_t near = shared.thresholds[0].key, far = shared.thresholds[1].key;
#pragma unroll 2
    for (int i = thread; i < count; i += kSelectThreads) {
      const uint32_t key = keys[i];
      if (key >> 10 == near) atomicAdd(&shared.counts[2][0][key & 1023], 1u);
      if (key >> 10 == far) atomicAdd(&shared.counts[2][1][key & 1023], 1u);
    }
  }
  refine(shared, cluster, blocks, 2, 10);

  // Places in order of ids: those of a thread are neighbours.
  const Threshold near = shared.thresholds[0], far = shared.thresholds[1];
  const int begin = thread * per_thread, end = min(begin + per_thread, count);
  uint32_t less[2] = {0, 0}, equal[2] = {0, 0};
  const auto for_each_key = [&](const auto& use) {
#pragma unroll 1
    for (int i = begin; i < end; i += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(keys + i);
      use(i, four.x);
      if (i + 1 < end) use(i + 1, four.y);
      if (i + 2 < end) use(i + 2, four.z);
      if (i + 3 < end) use(i + 3, four.w);
    }
  };
  const auto count_key = [&](uint32_t key) {
    less[0] += key < near.key;
    less[1] += key < far.key;
    equal[0] += key == near.key;
    equal[1] += key == far.key;
  };
  for_each_key([&](int, uint32_t key) { count_key(key); });
  uint64_t less_total, equal_total;
  uint64_t less_before = sum_before(pair_of(less[0], less[1]), shared.warp_totals, less_total);
  uint64_t equal_before = sum_before(pair_of(equal[0], equal[1]), shared.warp_totals, equal_total);
  if (blocks > 1) {
    if (thread == 0) {
      shared.block_totals[0] = less_total;
      shared.block_totals[1] = equal_total;
    }
    cluster.sync();
#pragma unroll 1
    for (unsigned other = 0; other < block; ++other) {
      const uint64_t* totals = cluster.in_block(shared.block_totals, other);
      less_before += totals[0];
      equal_before += totals[1];
    }
  }
  less[0] = static_cast<uint32_t>(less_before);
  less[1] = static_cast<uint32_t>(less_before >> 32);
  equal[0] = static_cast<uint32_t>(equal_before);
  equal[1] = static_cast<uint32_t>(equal_before >> 32);
  // A single block keeps the retrieved clusters where its first counts were.
  const bool local = blocks == 1 && retrieved <= kCountedRanks;
  uint64_t* entries = reinterpret_cast<uint64_t*>(&shared.counts[0][0][0]);
  uint64_t* order = local ? entries : params.order + task * params.order_capacity;
  int32_t* estimated_ids = choice.estimated + task * params.clusters;
  for_each_key([&](int i, uint32_t key) {
    const bool is_near = key < near.key || (key == near.key && equal[0] < near.equals);
    const bool is_far = key < far.key || (key == far.key && equal[1] < far.equals);
    const uint32_t near_place = less[0] + min(equal[0], near.equals);
    const uint32_t far_place = less[1] + min(equal[1], far.equals);
    if (is_near) order[near_place] = pair_of(static_cast<uint32_t>(first + i), key);
    else if (is_far) estimated_ids[far_place - near_place] = static_cast<int32_t>(first + i);
    count_key(key);
  });
  if (block == 0 && thread == 0) choice.estimated_counts[task] = static_cast<int32_t>(estimated);
  if (!local) __threadfence();
  cluster.sync();

  // The retrieved clusters by rank.
  int32_t* ids =
      choice.retrieved == nullptr ? nullptr : choice.retrieved + task * params.max_retrieved;
  int32_t* before =
      choice.before == nullptr ? nullptr : choice.before + task * (params.max_retrieved + 1);
  int32_t* shift = choice.before == nullptr ? nullptr : choice.shift + task * params.max_retrieved;
  int32_t* rank_tokens = local ? reinterpret_cast<int32_t*>(&shared.counts[1][0][0]) : before + 1;
  int32_t* rank_slots = local ? rank_tokens + kCountedRanks : shift;
  const int32_t* all_offsets = params.offsets + task * (params.clusters + 1);
  const auto place_rank = [&](int rank, uint64_t entry) {
    const int64_t id = static_cast<int64_t>(entry & 0xffffffffu);
    if (ids != nullptr) ids[rank] = static_cast<int32_t>(id);
    if (before == nullptr) return;
    // An index in disorder must not lead outside the store.
    const int64_t slot = all_offsets[id], tokens = all_offsets[id + 1] - slot;
    const bool inside = slot >= 0 && tokens >= 0 && slot + tokens <= choice.store_capacity;
    rank_tokens[rank] = inside ? static_cast<int32_t>(tokens) : 0;
    rank_slots[rank] = static_cast<int32_t>(slot);
  };
  const int all_threads = blocks * kSelectThreads;
  const int own_thread = static_cast<int>(block) * kSelectThreads + thread;
  const int ranks = static_cast<int>(retrieved);
  if (ranks <= kCountedRanks) {
    if (!local) {
#pragma unroll 1
      for (int i = thread; i < ranks; i += kSelectThreads) entries[i] = __ldcg(order + i);
      __syncthreads();
    }
    const int part = thread % kLanesPerRank;
#pragma unroll 1
    for (int item = own_thread / kLanesPerRank;; item += all_threads / kLanesPerRank) {
      if (item - lane / kLanesPerRank >= ranks) break;  // alike in a warp
      const uint64_t own = item < ranks ? entries[item] : 0;
      uint32_t smaller = 0;
#pragma unroll 4
      for (int i = part; i < ranks; i += kLanesPerRank) smaller += entries[i] < own;
#pragma unroll
      for (int step = 1; step < kLanesPerRank; step *= 2) {
        smaller += __shfl_xor_sync(kAllLanes, smaller, step);
      }
      if (part == 0 && item < ranks) place_rank(static_cast<int>(smaller), own);
    }
  } else {
    sort_entries(order, ranks, own_thread, all_threads, cluster);
#pragma unroll 1
    for (int i = own_thread; i < ranks; i += all_threads) place_rank(i, __ldcg(order + i));
  }
  if (ids != nullptr) {
#pragma unroll 1
    for (int64_t i = ranks + own_thread; i < params.max_retrieved; i += all_threads) ids[i] = -1;
  }
  if (before == nullptr) {
    cluster.sync();  // others may still read this block's shared memory
    return;
  }
  if (!local) __threadfence();
  cluster.sync();
  if (block != 0) return;
  uint32_t sum = 0;
  const int most_ranks = static_cast<int>(params.max_retrieved);
#pragma unroll 1
  for (int start = 0; start < most_ranks; start += kSelectThreads) {
    const int rank = start + thread;
    const uint32_t tokens = rank < ranks ? static_cast<uint32_t>(rank_tokens[rank]) : 0;
    const int32_t slot = rank < ranks ? rank_slots[rank] : 0;
    uint64_t total;
    const uint32_t behind =
        sum + static_cast<uint32_t>(sum_before(tokens, shared.warp_totals, total));
    if (rank < most_ranks) {
      before[rank + 1] = static_cast<int32_t>(behind + tokens);
      shift[rank] = slot - static_cast<int32_t>(behind);
    }
    sum += static_cast<uint32_t>(total);
  }
  if (thread == 0) {
    before[0] = 0;
    unsigned long long* row =
        reinterpret_cast<unsigned long long*>(choice.counters + b * kCounters);
    atomicAdd(row + kRetrievedTokens, static_cast<unsigned long long>(sum));
    if (task % params.heads == 0) atomicAdd(row + kSteps, 1ull);
  }
}

int64_t power_of_two(int64_t count) {
  int64_t size = 1;
  while (size < count) size *= 2;
  return size;
}

}  // namespace

ChoiceSpace reserve_choice(Workspace& workspace, const WaveEstimateParams& params) {
  const int64_t tasks = params.batch * params.heads, ranks = params.max_retrieved;
  ChoiceSpace space;
  space.before = workspace.reserve<int32_t>(tasks * (ranks + 1));
  space.shift = workspace.reserve<int32_t>(tasks * ranks);
  space.estimated = workspace.reserve<int32_t>(tasks * params.clusters);
  space.estimated_counts = workspace.reserve<int32_t>(tasks);
  space.log2_mass = workspace.reserve<float>(tasks * params.clusters * params.groups);
  space.ranked =
      workspace.reserve<float>(params.use_variance ? 0 : tasks * params.clusters * params.groups);
  space.sums =
      workspace.reserve<float2>(tasks * score_block_count(params.clusters, 1) * params.groups);
  space.keys = workspace.reserve<uint32_t>(tasks * ceil_div(params.clusters, 4) * 4);
  space.order = workspace.reserve<uint64_t>(tasks * power_of_two(ranks));
  return space;
}

void choose(
    const Launcher& launch,
    const WaveEstimateParams& params,
    const Workspace& workspace,
    const ChoiceSpace& space,
    Choice& choice) {
  const int64_t tasks = params.batch * params.heads;
  choice.estimated = workspace.at<int32_t>(space.estimated);
  choice.estimated_counts = workspace.at<int32_t>(space.estimated_counts);
  choice.log2_mass = workspace.at<float>(space.log2_mass);

  ScoreParams score;
  score.heads = params.heads;
  score.groups = params.groups;
  score.head_dim = params.head_dim;
  score.clusters = params.clusters;
  score.warp_tiles =
      static_cast<int32_t>(warp_tiles_of(params.clusters, tasks, launch.processors()));
  score.early_blocks = static_cast<uint32_t>(kScoreBlocks * launch.processors());
  score.query = params.query;
  score.centroid_keys = params.centroid_keys;
  score.offsets = params.offsets;
  score.variances = params.variances;
  score.residuals = params.residuals;
  score.counters = params.counters;
  score.use_variance = params.use_variance;
  score.scale = params.scale;
  score.log2_mass = choice.log2_mass;
  score.ranked = params.use_variance ? nullptr : workspace.at<float>(space.ranked);
  score.sums = workspace.at<float2>(space.sums);
  score.tickets = choice.tickets;
  score.ticket_count = choice.ticket_count;
  RETRO_CUDA_DISPATCH(params.dtype, launch_score, launch, score, tasks);

  SelectParams select;
  select.heads = params.heads;
  select.groups = params.groups;
  select.clusters = params.clusters;
  select.score_blocks = score_block_count(params.clusters, score.warp_tiles);
  select.offsets = params.offsets;
  select.ranked = params.use_variance ? score.log2_mass : score.ranked;
  select.sums = score.sums;
  select.max_retrieved = params.max_retrieved;
  select.min_retrieved_clusters = params.min_retrieved_clusters;
  select.retrieval_budget = params.retrieval_budget;
  select.estimation_budget = params.estimation_budget;
  select.keys = workspace.at<uint32_t>(space.keys);
  select.order = workspace.at<uint64_t>(space.order);
  select.order_capacity = power_of_two(params.max_retrieved);
  select.choice = choice;
  int64_t blocks = 1;
  while (launch.hopper() && blocks < kMostBlocks && blocks * kBlockKeys < params.clusters)
    blocks *= 2;
  const int64_t block_keys =
      ceil_div(std::max<int64_t>(params.clusters, 1), blocks * kSelectThreads * 4) * 4 *
      kSelectThreads;
  const bool keys_in_shared = block_keys <= kKeysInShared;
  const int64_t bytes = static_cast<int64_t>(sizeof(SelectShared)) +
      ceil_div(params.groups, 4) * 16 + (keys_in_shared ? block_keys * 4 : 0);
  launch(
      select_kernel, grid_of(tasks * blocks), kSelectThreads, bytes, blocks, select,
      static_cast<int32_t>(blocks), static_cast<int32_t>(keys_in_shared));
}

AttendParams estimate_params(const WaveEstimateParams& params, const Choice& choice) {
  AttendParams attend = {};
  attend.dtype = params.dtype;
  attend.batch = params.batch;
  attend.heads = params.heads;
  attend.groups = params.groups;
  attend.head_dim = params.head_dim;
  attend.query = params.query;
  attend.counters = params.counters;
  attend.estimated.ids = choice.estimated;
  attend.estimated.counts = choice.estimated_counts;
  attend.estimated.log2_mass = choice.log2_mass;
  attend.estimated.centroid_values = params.centroid_values;
  attend.estimated.clusters = params.clusters;
  attend.scale = params.scale;
  return attend;
}

namespace {

std::tuple<Tensor, Tensor, Tensor> wave_estimate(
    const Tensor& query,
    const Tensor& centroids,
    const Tensor& offsets,
    const Tensor& variances,
    const Tensor& residuals,
    const Tensor& counters,
    int64_t max_retrieved,
    double retrieval_budget,
    int64_t min_retrieved_clusters,
    double estimation_budget,
    std::string estimator,
    double scale) {
  Call<WaveEstimateParams> call = wave_estimate_call(
      "wave_estimate", query, centroids, offsets, variances, residuals, counters, max_retrieved,
      retrieval_budget, min_retrieved_clusters, estimation_budget, estimator, scale);
  WaveEstimateParams& params = call.params;
  const Launcher launch("wave_estimate", query);
  const WaveEstimateResults results = wave_estimate_results(params, query);
  const int64_t tasks = params.batch * params.heads;
  if (tasks * params.groups == 0)
    return {results.retrieved, results.estimate, results.estimate_lse};

  Choice choice = {};
  AttendParams sizes = estimate_params(params, choice);
  sizes.estimate_pieces = estimate_piece_count(tasks, launch.processors());
  Workspace workspace;
  const ChoiceSpace choice_space = reserve_choice(workspace, params);
  const AttendSpace attend_space = reserve_attend(workspace, sizes);
  workspace.allocate(query);

  choice.retrieved = params.retrieved;
  choice.counters = const_cast<int64_t*>(params.counters);
  choice.tickets = workspace.at<int32_t>(attend_space.tickets);
  choice.ticket_count = ticket_count(sizes);
  choose(launch, params, workspace, choice_space, choice);

  AttendParams attention = estimate_params(params, choice);
  attention.estimate_pieces = sizes.estimate_pieces;
  use_attend(attend_space, workspace, attention);
  attention.estimate = params.estimate;
  attention.estimate_lse = params.estimate_lse;
  attend(launch, attention);
  return {results.retrieved, results.estimate, results.estimate_lse};
}

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CUDA, m) {
  m.impl("wave_estimate", TORCH_BOX(&retro::wave_estimate));
}
