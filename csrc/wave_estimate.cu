#include <string>
#include <tuple>

#include "counters.h"
#include "wave_estimate_cuda.h"

namespace retro {
namespace {

constexpr int kScoreThreads = 256;
constexpr int kScoreWarps = kScoreThreads / 32;
constexpr int kTileClusters = 16;  // rows of a matrix instruction
// Blocks on a processor. As many (row, head) pairs as there may be, all blocks find room at once, and each
// of their warps goes through tiles to its end.
constexpr int64_t kScoreBlocks = 2;

struct ScoreParams {
  int64_t heads, groups, head_dim, clusters;
  int32_t warp_tiles;
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
  extern __shared__ __align__(kSharedLine) uint4 shared[];
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

  wait_for_predecessor();

  const int32_t* offsets = params.offsets + task * (params.clusters + 1);
  const float* all_variances = params.variances + task * params.clusters;
  const auto copy = [&](int stage, int t) {
    if (t < tiles) {
      uint4* tile = own_tiles + stage * kTileChunks;
      const int first_row = first + t * kScoreWarps * kTileClusters;
      const uint64_t policy = once_policy();
#pragma unroll(kGroups <= 4 ? 8 : 2)
      for (int k = 0; k < 2 * kGroups; ++k) {
        const int index = k * 32 + lane, row = index / (4 * kGroups), chunk = index % (4 * kGroups);
        const bool inside = first_row + row < clusters;
        const T* from = keys + (inside ? first_row + row : 0) * stride;
        copy_async_with(
            policy, tile + place_of<4 * kGroups>(row, chunk),
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
        const int chunk = 4 * g + j;
        const uint4 near = tile[place_of<4 * kGroups>(r, chunk)];
        const uint4 far = tile[place_of<4 * kGroups>(r + 8, chunk)];
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
        const int chunk = 4 * g + j;
        unpack_chunk<T>(tile[place_of<4 * kGroups>(r, chunk)], key[0]);
        unpack_chunk<T>(tile[place_of<4 * kGroups>(r + 8, chunk)], key[1]);
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

SelectParams select_params(const WaveEstimateParams& params) {
  SelectParams select = {};
  select.batch = params.batch;
  select.heads = params.heads;
  select.groups = params.groups;
  select.clusters = params.clusters;
  select.offsets = params.offsets;
  select.max_retrieved = params.max_retrieved;
  select.min_retrieved_clusters = params.min_retrieved_clusters;
  select.retrieval_budget = params.retrieval_budget;
  select.estimation_budget = params.estimation_budget;
  return select;
}

}  // namespace

ChoiceSpace reserve_choice(
    const Launcher& launch, Workspace& workspace, const WaveEstimateParams& params) {
  const int64_t tasks = params.batch * params.heads, ranks = params.max_retrieved;
  ChoiceSpace space;
  space.before = workspace.reserve<int32_t>(tasks * (ranks + 1));
  space.shift = workspace.reserve<int32_t>(tasks * ranks);
  space.estimated = workspace.reserve<int32_t>(tasks * params.clusters);
  space.estimated_counts = workspace.reserve<int32_t>(tasks);
  space.log2_mass = workspace.reserve<float>(tasks * params.clusters * params.groups);
  space.tail =
      workspace.reserve<uint32_t>(params.use_variance ? tasks * ceil_div(params.clusters, 32) : 0);
  space.ranked =
      workspace.reserve<float>(params.use_variance ? 0 : tasks * params.clusters * params.groups);
  space.sums =
      workspace.reserve<float2>(tasks * score_block_count(params.clusters, 1) * params.groups);
  space.select = reserve_select(launch, workspace, select_params(params));
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
  choice.tail = params.use_variance ? workspace.at<uint32_t>(space.tail) : nullptr;

  ScoreParams score;
  score.heads = params.heads;
  score.groups = params.groups;
  score.head_dim = params.head_dim;
  score.clusters = params.clusters;
  score.warp_tiles =
      static_cast<int32_t>(warp_tiles_of(params.clusters, tasks, launch.processors()));
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

  SelectParams select = select_params(params);
  select.score_blocks = score_block_count(params.clusters, score.warp_tiles);
  select.ranked = params.use_variance ? score.log2_mass : score.ranked;
  select.sums = score.sums;
  select.choice = choice;
  select_clusters(launch, workspace, space.select, select);
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
  attend.estimated.tail = choice.tail;
  attend.estimated.value_sums = params.value_sums;
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
    const Tensor& totals,
    const Tensor& counters,
    int64_t max_retrieved,
    double retrieval_budget,
    int64_t min_retrieved_clusters,
    double estimation_budget,
    std::string estimator,
    double scale) {
  Call<WaveEstimateParams> call = wave_estimate_call(
      "wave_estimate", query, centroids, offsets, variances, totals, counters, max_retrieved,
      retrieval_budget, min_retrieved_clusters, estimation_budget, estimator, scale);
  WaveEstimateParams& params = call.params;
  const Launcher launch("wave_estimate", query);
  const WaveEstimateResults results = wave_estimate_results(params, query);
  const int64_t tasks = params.batch * params.heads;
  if (tasks * params.groups == 0)
    return {results.retrieved, results.estimate, results.estimate_lse};

  Choice choice = {};
  AttendParams sizes = estimate_params(params, choice);
  plan_attend(launch, sizes);
  sizes.exact_warps = 0;
  Workspace workspace;
  const ChoiceSpace choice_space = reserve_choice(launch, workspace, params);
  const AttendSpace attend_space = reserve_attend(workspace, sizes);
  workspace.allocate(query);

  choice.retrieved = params.retrieved;
  choice.counters = const_cast<int64_t*>(params.counters);
  choice.tickets = workspace.at<int32_t>(attend_space.tickets);
  choice.ticket_count = ticket_count(sizes);
  choose(launch, params, workspace, choice_space, choice);

  AttendParams attention = estimate_params(params, choice);
  plan_attend(launch, attention);
  attention.exact_warps = 0;
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
