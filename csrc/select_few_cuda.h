// Chooses among clusters that one block of few threads, or the blocks of a thread block cluster, can hold in
// shared memory: the same choice as select_kernel's, in a third of its instructions. Its code runs straight
// through, once, so short code counts for as much as few instructions.
//
// Several blocks share out the clusters. Once all have begun they wait for each other four times: when each
// knows the counts of all; when each has its part, in order of their bins, of the clusters of all that may be
// retrieved, and the last block those that may be the last estimated; when the thresholds are found; when
// each knows how many estimated clusters lie before its own. Where too many clusters are candidates they wait
// once more, and for each time that these are halved.
#pragma once

#include <type_traits>

#include "select_keys_cuda.h"

namespace retro {

constexpr int kFewThreads = 512;
constexpr int kFewWarps = kFewThreads / 32;
// Blocks of a processor: registers for two, so that one may start beside the last scores. Where several
// blocks with many keys would need more registers than that, they get all.
RETRO_HOST_DEVICE constexpr int few_blocks(int keys, bool several) {
  return several && keys > 16 ? 1 : 2;
}
// Retrieved clusters at most: of one block a thread has one.
RETRO_HOST_DEVICE constexpr int few_retrieved(int keys, bool several) {
  return (!several ? 1 : keys > 16 ? 5 : 3) * kFewThreads;
}
constexpr int kWarpSpans = 32 / kFewWarps;         // of bins: a span for each lane
constexpr int kStretchBins = kBins / kFewThreads;  // a stretch of bins for each thread
constexpr int kPartBits = 7;                       // candidates fall into 2^7 parts, 4 to a lane
constexpr uint64_t kNone = ~0ull;
static_assert(kCandidates == kFewThreads);

// What a block of several has beside the rest.
struct FewOfSeveral {
  uint16_t counts[kMostBlocks][kFewThreads];  // of each block's keys, by stretch
  uint32_t stretch_starts[kFewThreads];       // how many keys of all blocks lie before a stretch
  // By bin, up to that in which retrieved clusters end: how many keys of all blocks lie before it, and the
  // place among the chosen of this block's next cluster. Two places to a word, which is counted in.
  uint16_t starts[kBins];
  uint32_t places[kBins / 2];
  int first_stretch;  // with keys
  // Places that are taken of the last bin, whose clusters may not all be chosen: in the block that has it.
  uint32_t last_taken;
  uint32_t far_parts[kMostBlocks], half_parts[2][kMostBlocks];  // far_totals, half_totals of each
};
// What one block has, which knows early where the tokens of its clusters lie.
template <int kKeys>
struct FewOfOne {
  int32_t offsets[kFewThreads * kKeys + 4];
};

// Threads of a block share this; norms, [G], lie behind it.
template <int kKeys, bool kSeveral>
struct alignas(16) Few {
  static constexpr int kRetrieved = few_retrieved(kKeys, kSeveral);
  static constexpr int kChosen = kRetrieved + static_cast<int>(kCandidates);
  // Of keys by bin; of one block then, up to the bin in which retrieved clusters end, how many keys lie
  // before each bin and, as `chosen` fills, before the next.
  uint32_t bins[kBins];
  // See exchanged(); at the end the ids of the estimated clusters.
  uint32_t keys[kFewThreads * kKeys];
  // pair_of(id, key) of all that may be retrieved, in order of their bins; of several blocks each has all of
  // some bins, and kNone elsewhere.
  alignas(16) uint64_t chosen[kChosen];
  uint64_t candidates[kCandidates];               // of the last estimated
  int32_t tokens[kRetrieved], slots[kRetrieved];  // of the retrieved clusters, by rank
  uint32_t parts[1 << kPartBits];                 // of candidates, by key
  uint32_t span_totals[32];                       // of bins
  uint32_t far_totals[kFewWarps], token_totals[kFewWarps];
  uint32_t half_totals[2][kFewWarps];
  Range ranges[2];         // in which retrieved, and estimated clusters end
  uint64_t thresholds[2];  // pair_of(id, key) of the last retrieved, and of the last estimated
  uint32_t candidate_count, part_count;
  Budget budget;
  std::conditional_t<kSeveral, FewOfSeveral, FewOfOne<kKeys>> extra;
};

// Where a warp keeps the key that one of its lanes reads in one of its rows of 32. Keys are written by
// rows, and read in chunks of four by threads whose clusters follow each other: neither meets in a bank.
template <int kKeys>
__device__ __forceinline__ int exchanged(int row, int column) {
  constexpr int kChunks = kKeys / 4;  // of a thread
  return row * 32 + (column ^ (row & (kChunks - 1)) * 4);
}

// The same by order of clusters.
template <int kKeys>
__device__ __forceinline__ int place_in_warp(int key) {
  return exchanged<kKeys>(key >> 5, key & 31);
}

// Sum of the first `count` totals, at most 32.
__device__ __forceinline__ uint32_t sum_of_first(const uint32_t* totals, int count) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return __reduce_add_sync(kAllLanes, lane < count ? totals[lane] : 0);
}

// How many entries from `first` on, before `end`, are smaller.
__device__ __forceinline__ uint32_t
count_smaller(const uint64_t* entries, uint32_t first, uint32_t end, uint64_t than) {
  constexpr uint32_t kTogether = 4;
  uint32_t smaller = 0;
#pragma unroll 1
  for (uint32_t i = first; i < end; i += kTogether) {
    uint64_t some[kTogether];
#pragma unroll
    for (uint32_t k = 0; k < kTogether; ++k) some[k] = i + k < end ? entries[i + k] : ~0ull;
#pragma unroll
    for (uint32_t k = 0; k < kTogether; ++k) smaller += some[k] < than;
  }
  return smaller;
}

struct Narrowed {
  Range range;
  uint64_t last;  // pair_of(id, key) that no cluster up to the range's rank comes behind
};

// Halves a range of too many candidates until they are few enough, or, where too many have equal keys, until
// `last` is the cluster of its rank.
template <int kKeys, bool kSeveral>
__device__ __noinline__ Narrowed narrow(Range range, int block, int blocks) {
  using Shared = Few<kKeys, kSeveral>;
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  const BlockCluster cluster(kSeveral);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const uint32_t first_id = static_cast<uint32_t>((block * kFewThreads + thread) * kKeys);
  int parity = 0;
  cluster.sync();  // half_totals and half_parts may be used again
  const auto count = [&](auto holds) -> uint32_t {
    uint32_t own = 0;
#pragma unroll 4
    for (int k = 0; k < kKeys; ++k) {
      const uint32_t key = shared.keys[warp * 32 * kKeys + place_in_warp<kKeys>(lane * kKeys + k)];
      own += holds(key, first_id + static_cast<uint32_t>(k));
    }
    own = __reduce_add_sync(kAllLanes, own);
    const int own_parity = parity;
    parity ^= 1;
    uint32_t* totals = shared.half_totals[own_parity];
    if (lane == 0) totals[warp] = own;
    __syncthreads();
    const uint32_t total = sum_of_first(totals, kFewWarps);
    if constexpr (kSeveral) {
      uint32_t* parts = shared.extra.half_parts[own_parity];
      if (thread < blocks) *cluster.in_block(parts + block, thread) = total;
      cluster.sync();
      return sum_of_first(parts, blocks);
    } else {
      return total;
    }
  };
#pragma unroll 1
  while (!range.done()) {
    const uint32_t width = (range.high - range.low) / 2;
    const uint32_t found = count([&](uint32_t key, uint32_t) { return key - range.low <= width; });
    if (range.rank < found) {
      range.high = range.low + width;
      range.count = found;
    } else {
      range.low += width + 1;
      range.rank -= found;
      range.count -= found;
    }
  }
  if (range.count <= kCandidates) return {range, pair_of(~0u, range.high)};
  uint32_t first = 0, last = static_cast<uint32_t>(blocks * kFewThreads * kKeys) - 1;
#pragma unroll 1
  while (first < last) {
    const uint32_t middle = (first + last) / 2;
    const uint32_t found =
        count([&](uint32_t key, uint32_t id) { return key == range.low && id <= middle; });
    if (range.rank < found) last = middle;
    else first = middle + 1;
  }
  return {range, pair_of(first, range.low)};
}

// Finds the cluster of a range's rank among the candidates, which are all of the range, and tells it. All
// threads of a block, each with a candidate.
template <typename Shared, typename Tell>
__device__ __forceinline__ void find_candidate(
    Shared& shared, const Range& range, const Tell& tell) {
  const uint32_t thread = threadIdx.x, lane = threadIdx.x % 32;
  const uint32_t width = range.high - range.low, rank = range.rank;
  const int shift = max(32 - __clz(static_cast<int>(width)) - kPartBits, 0);
  const bool some = thread < shared.candidate_count;
  const uint64_t own = some ? shared.candidates[thread] : 0;
  const uint32_t part = (static_cast<uint32_t>(own >> 32) - range.low) >> shift;
  if (some) atomicAdd(&shared.parts[part], 1u);
  __syncthreads();
  const uint4 counts = reinterpret_cast<const uint4*>(shared.parts)[lane];
  const uint32_t total = counts.x + counts.y + counts.z + counts.w;
  uint32_t less = scan_warp(total) - total, found = 4 * lane;
  const unsigned has = __ballot_sync(kAllLanes, rank - less < total);
  if (has == 0) return;  // not searched for
  if (rank - less >= counts.x) {
    less += counts.x, ++found;
    if (rank - less >= counts.y) {
      less += counts.y, ++found;
      if (rank - less >= counts.z) less += counts.z, ++found;
    }
  }
  const int from = __ffs(static_cast<int>(has)) - 1;
  less = __shfl_sync(kAllLanes, less, from);
  found = __shfl_sync(kAllLanes, found, from);
  if (some && part == found) shared.candidates[atomicAdd(&shared.part_count, 1u)] = own;
  __syncthreads();
  const uint32_t count = shared.part_count;
  if (thread >= count) return;
  const uint64_t candidate = shared.candidates[thread];
  if (less + count_smaller(shared.candidates, 0, count, candidate) == rank) tell(candidate);
}

// Adds up what all blocks count in a bin; `before_block` gets what those before this one do.
__device__ __forceinline__ uint32_t count_of_all(
    const uint32_t* bin,
    const BlockCluster& cluster,
    int block,
    int blocks,
    uint32_t& before_block) {
  uint32_t counts[kMostBlocks], total = 0;
#pragma unroll
  for (int k = 0; k < static_cast<int>(kMostBlocks); ++k) {
    counts[k] = k < blocks ? *cluster.in_block(bin, k) : 0;
  }
  before_block = 0;
#pragma unroll
  for (int k = 0; k < static_cast<int>(kMostBlocks); ++k) {
    if (k < block) before_block += counts[k];
    total += counts[k];
  }
  return total;
}

// Sum over the threads of a block before this one.
template <typename Shared>
__device__ __forceinline__ uint32_t sum_of_threads_before(Shared& shared, uint32_t own) {
  const uint32_t through = scan_warp(own);
  const int warp = static_cast<int>(threadIdx.x / 32);
  if (threadIdx.x % 32 == 31) shared.span_totals[warp] = through;
  __syncthreads();
  return sum_of_first(shared.span_totals, warp) + through - own;
}

// The bins in which retrieved and estimated clusters end, of all blocks: each gets the counts of all by
// stretches of bins, and asks for those of the bins where estimated clusters end, and of those with
// clusters that may be retrieved.
template <typename Shared>
__device__ __forceinline__ void find_bins_together(
    Shared& shared, const BlockCluster& cluster, int block, int blocks) {
  auto& extra = shared.extra;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const uint32_t ranks[2] = {shared.ranges[0].rank, shared.ranges[1].rank};
  uint32_t own = 0;
#pragma unroll
  for (int i = 0; i < kStretchBins / 4; ++i) {
    const uint4 four = reinterpret_cast<const uint4*>(shared.bins)[thread * (kStretchBins / 4) + i];
    own += four.x + four.y + four.z + four.w;
  }
  cluster.wait();  // all have begun
#pragma unroll 1
  for (int k = 0; k < blocks; ++k) {
    *cluster.in_block(&extra.counts[block][thread], k) = static_cast<uint16_t>(own);
  }
  cluster.sync();
  uint32_t total = 0;
#pragma unroll
  for (int k = 0; k < static_cast<int>(kMostBlocks); ++k) {
    total += k < blocks ? extra.counts[k][thread] : 0;
  }
  const uint32_t less = sum_of_threads_before(shared, total);
  extra.stretch_starts[thread] = less;
  if (less == 0 && total > 0) extra.first_stretch = thread;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    if (ranks[n] - less < total) {
      shared.ranges[n] = {static_cast<uint32_t>(thread), 0, ranks[n] - less, total};
    }
  }
  __syncthreads();

  const auto found = [&](int n, int bin, uint32_t rank, uint32_t count) {
    Range range = {0, 0, rank, count};
    cut_first(bin, range);
    shared.ranges[n] = range;
  };
  const Range near = shared.ranges[0], far = shared.ranges[1];
  __syncthreads();
  uint32_t before_block;
  // By the last warp, which as a rule has none of the other bins.
  if (thread >= kFewThreads - 32 && far.count > 0) {
    const int bin = static_cast<int>(far.low) * kStretchBins + lane % kStretchBins;
    const uint32_t count = count_of_all(shared.bins + bin, cluster, block, blocks, before_block);
    const uint32_t before = scan_warp(count) - count;
    if (lane < kStretchBins && far.rank - before < count) found(1, bin, far.rank - before, count);
  }
  if (near.count > 0) {
    const int end = (static_cast<int>(near.low) + 1) * kStretchBins;
#pragma unroll 1
    for (int start = extra.first_stretch * kStretchBins; start < end; start += kFewThreads) {
      const int bin = start + thread;
      uint32_t count = 0;
      before_block = 0;
      if (bin < end) count = count_of_all(shared.bins + bin, cluster, block, blocks, before_block);
      const uint32_t before =
          extra.stretch_starts[start / kStretchBins] + sum_of_threads_before(shared, count);
      if (bin < end) {
        // Behind the last that may be retrieved these may be too large, and are not used.
        extra.starts[bin] = static_cast<uint16_t>(before);
        reinterpret_cast<uint16_t*>(extra.places)[bin] =
            static_cast<uint16_t>(before + before_block);
      }
      if (ranks[0] - before < count) found(0, bin, ranks[0] - before, count);
      __syncthreads();
    }
  }
  __syncthreads();
}

// kGroups: G where it is 4 or 8, which come in chunks; 0 for any other. Where kSeveral, `blocks` blocks, a
// power of two, choose together.
template <int kKeys, int kGroups, bool kSeveral>
__global__ void __launch_bounds__(kFewThreads, few_blocks(kKeys, kSeveral))
    select_few_kernel(const __grid_constant__ SelectParams params, int32_t blocks) {
  // A thread's clusters come in groups of four, two of which are under way.
  constexpr int kRows = 4, kBuffers = 2;
  static_assert(kKeys % (kRows * kBuffers) == 0);
  constexpr int kWidth = kGroups % 4 == 0 && kGroups > 0 ? 4 : 1;  // logits that come at once
  constexpr int kChunks = kKeys / 4;
  using Shared = Few<kKeys, kSeveral>;
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  const BlockCluster cluster(kSeveral);
  if constexpr (kSeveral) cluster.arrive();
  float* norms = reinterpret_cast<float*>(&shared + 1);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  release_successor();
  if constexpr (!kSeveral) blocks = 1;
  const int task = static_cast<int>(blockIdx.x) >> (kSeveral ? __ffs(blocks) - 1 : 0);
  const int block = kSeveral ? static_cast<int>(blockIdx.x) & (blocks - 1) : 0;
  const int b = task / static_cast<int>(params.heads);
  const int groups = kGroups > 0 ? kGroups : static_cast<int>(params.groups);
  const int all_clusters = static_cast<int>(params.clusters);
  // Of this block: its first cluster; what lies behind counts from there.
  const int first = block * kFewThreads * kKeys, clusters = all_clusters - first;
  const Choice& choice = params.choice;
#pragma unroll
  for (int i = 0; i < kBins / 4 / kFewThreads; ++i) {
    reinterpret_cast<uint4*>(shared.bins)[i * kFewThreads + thread] = make_uint4(0, 0, 0, 0);
  }
  if (thread < 1 << kPartBits) shared.parts[thread] = 0;
  if constexpr (kSeveral) {
#pragma unroll
    for (int i = 0; i < Shared::kChosen / kFewThreads; ++i) {
      shared.chosen[i * kFewThreads + thread] = kNone;
    }
  }
  wait_for_predecessor();

  // What others wait for comes first: norms, and how many clusters to choose.
  const float2* sums = params.sums + task * params.score_blocks * groups;
  float2 own_sum = make_float2(-INFINITY, 0.0f);
  int64_t counted_clusters = 0;
  if (warp < groups) own_sum = block_sum(sums + warp, lane, params.score_blocks, groups);
  if (warp == kFewWarps - 1) counted_clusters = choice.counters[b * kCounters + kClusters];
  // A warp reads clusters that follow each other, a row of 32 at a time.
  const int first_read = warp * 32 * kKeys + lane;
  const float* ranked =
      params.ranked + (int64_t{task} * all_clusters + first + first_read) * groups;
  const bool whole = first_read - lane + 32 * kKeys <= clusters;
  float logits[kBuffers][kRows][kWidth];
  int fetched_row = 0, fetched_g = 0;
  const auto fetch = [&](int buffer) {
    float (&into)[kRows][kWidth] = logits[buffer];
    const float* from = ranked + fetched_row * 32 * groups + fetched_g;
    const auto row = [&](int k) {
      const float* own = from + k * 32 * groups;
      if constexpr (kWidth == 4) {
        const float4 four = __ldcg(reinterpret_cast<const float4*>(own));
        into[k][0] = four.x, into[k][1] = four.y, into[k][2] = four.z, into[k][3] = four.w;
      } else {
        into[k][0] = *own;
      }
    };
    if (whole) {
#pragma unroll
      for (int k = 0; k < kRows; ++k) row(k);
    } else {
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        if (first_read + (fetched_row + k) * 32 < clusters) row(k);
        else into[k][0] = -INFINITY;
      }
    }
    fetched_g += kWidth;
    if (fetched_g >= groups) fetched_g = 0, fetched_row += kRows;
  };
#pragma unroll
  for (int buffer = 0; buffer < kBuffers; ++buffer) fetch(buffer);
  const int32_t* all_offsets = params.offsets + int64_t{task} * (all_clusters + 1);
  if constexpr (!kSeveral) {
    if (choice.before != nullptr) {
#pragma unroll 4
      for (int i = thread; i <= clusters; i += kFewThreads) {
        copy_async_word(shared.extra.offsets + i, all_offsets + i, true);
      }
      commit_copies();
    }
  }
#pragma unroll 1
  for (int g = warp; g < groups; g += kFewWarps) {
    if (g != warp) own_sum = block_sum(sums + g, lane, params.score_blocks, groups);
    const float norm = norm_of(sums + g, own_sum, params.score_blocks, groups);
    if (lane == 0) norms[g] = norm;
  }
  if (thread == kFewThreads - 1) {
    const Budget budget = budget_of(params, counted_clusters);
    const int wanted = budget.retrieved + budget.estimated;
    // The last of all live clusters needs no search.
    const bool searched = budget.estimated > 0 && wanted < budget.live;
    shared.budget = budget;
    // What is not searched for has no candidates, and all live keys before its range, or none.
    shared.ranges[0] = Range{0, 0, static_cast<uint32_t>(budget.retrieved) - 1, 0};
    shared.ranges[1] = Range{0, 0, searched ? static_cast<uint32_t>(wanted) - 1 : ~0u, 0};
    if (budget.estimated > 0) shared.ranges[1].low = shared.ranges[1].high = ~0u;
    shared.candidate_count = shared.part_count = 0;
    if constexpr (kSeveral) shared.extra.last_taken = 0;
    if (block == 0) choice.estimated_counts[task] = budget.estimated;
  }
  __syncthreads();

  const int live = shared.budget.live - first, retrieved = shared.budget.retrieved;
  float scores[kRows];
  int g = 0;
#pragma unroll 1
  for (int row = 0; row < kKeys;) {
#pragma unroll
    for (int buffer = 0; buffer < kBuffers; ++buffer) {
      float norm[kWidth];
#pragma unroll
      for (int x = 0; x < kWidth; ++x) norm[x] = norms[g + x];
      uint32_t* into = shared.keys + warp * 32 * kKeys;
      const bool last = g + kWidth >= groups;
      // Alike in a warp. What is left out lies behind all other clusters, and in no bin.
      if (first_read - lane + row * 32 < live) {
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
          const float (&own)[kWidth] = logits[buffer][k];
#pragma unroll
          for (int x = 0; x < kWidth; ++x) {
            const float share = exp2_of(own[x] - norm[x]);
            if (x > 0 || g > 0) scores[k] += share;
            else scores[k] = own[0] == -INFINITY ? NAN : share;  // without tokens
          }
          if (!last) continue;
          const uint32_t key = sort_key(scores[k], false);
          into[exchanged<kKeys>(row + k, lane)] = key;
          atomicAdd(&shared.bins[first_bin(key)], 1u);
        }
      } else if (last) {
#pragma unroll
        for (int k = 0; k < kRows; ++k) into[exchanged<kKeys>(row + k, lane)] = ~0u;
      }
      if (fetched_row < kKeys) fetch(buffer);
      g += kWidth;
      if (g >= groups) g = 0, row += kRows;
    }
  }
  // From here on a thread's clusters follow each other.
  const int own_first = thread * kKeys;
  const auto own_keys = [&](int c, uint32_t (&keys)[4]) {
    const int at = place_in_warp<kKeys>(lane * kKeys + 4 * c);
    const uint4 four = *reinterpret_cast<const uint4*>(shared.keys + warp * 32 * kKeys + at);
    keys[0] = four.x, keys[1] = four.y, keys[2] = four.z, keys[3] = four.w;
  };
  __syncthreads();

  if constexpr (kSeveral) {
    find_bins_together(shared, cluster, block, blocks);
  } else {  // The bins in which retrieved and estimated clusters end.
    uint4 counts[kWarpSpans];
    uint32_t own[kWarpSpans], total[kWarpSpans];
    uint4* bins = reinterpret_cast<uint4*>(shared.bins) + warp * kWarpSpans * 32 + lane;
#pragma unroll
    for (int s = 0; s < kWarpSpans; ++s) {
      counts[s] = bins[s * 32];
      own[s] = counts[s].x + counts[s].y + counts[s].z + counts[s].w;
      total[s] = __reduce_add_sync(kAllLanes, own[s]);
      if (lane == 0) shared.span_totals[warp * kWarpSpans + s] = total[s];
    }
    const uint32_t near_rank = shared.ranges[0].rank, far_rank = shared.ranges[1].rank;
    __syncthreads();
    uint32_t start = sum_of_first(shared.span_totals, warp * kWarpSpans);
#pragma unroll
    for (int s = 0; s < kWarpSpans; start += total[s], ++s) {
      const bool has_near = near_rank >= start, has_far = far_rank - start < total[s];
      if (!has_near && !has_far) continue;
      uint4 before;
      before.x = start + scan_warp(own[s]) - own[s];
      before.y = before.x + counts[s].x;
      before.z = before.y + counts[s].y;
      before.w = before.z + counts[s].z;
      if (has_near) bins[s * 32] = before;
#pragma unroll 1
      for (int n = 0; n < 2; ++n) {
        const uint32_t rank = n == 0 ? near_rank : far_rank;
        if (rank - before.x >= own[s]) continue;
        int bin = ((warp * kWarpSpans + s) * 32 + lane) * 4;
        uint32_t less = before.x, count = counts[s].x;
        if (rank >= before.y) less = before.y, count = counts[s].y, ++bin;
        if (rank >= before.z) less = before.z, count = counts[s].z, ++bin;
        if (rank >= before.w) less = before.w, count = counts[s].w, ++bin;
        Range range = {0, 0, rank - less, count};
        cut_first(bin, range);
        shared.ranges[n] = range;
      }
    }
    __syncthreads();
  }

  // Lists what may be retrieved, and what may be the last estimated.
  const int last_block = blocks - 1;
  const auto pair_at = [&](int own) {
    const int at = place_in_warp<kKeys>(own % (32 * kKeys));
    const uint32_t key = shared.keys[own / (32 * kKeys) * (32 * kKeys) + at];
    return pair_of(static_cast<uint32_t>(first + own), key);
  };
  // Behind the last cluster keys go on to the end of a row of 32, and come behind all others.
  const auto is_cluster = [&](uint64_t pair) {
    return static_cast<uint32_t>(pair) < static_cast<uint32_t>(all_clusters);
  };
  const auto bin_of = [](uint64_t pair) { return first_bin(static_cast<uint32_t>(pair >> 32)); };
  Range near_range = shared.ranges[0], far_range = shared.ranges[1];
  uint32_t chosen_count;
  // Of several blocks: in which retrieved clusters end; from the place of a bin's first cluster among the
  // chosen to the block that has them.
  int last_bin = 0, owner_shift = 0;
  // Of this thread's clusters: those that may be retrieved; those that may be the last estimated, and those
  // before these.
  uint32_t near_bits = 0, far_bits = 0, sure_bits = 0;
  const auto take = [&](uint32_t& bits) {
    const int own = own_first + __ffs(static_cast<int>(bits)) - 1;
    bits &= bits - 1;
    return own;
  };
  // Leaves those that come no later than `last`.
  const auto keep = [&](uint32_t& bits, uint64_t last) {
#pragma unroll 1
    for (uint32_t left = bits; left != 0;) {
      const uint32_t lowest = left & (0 - left);
      if (pair_at(take(left)) > last) bits ^= lowest;
    }
  };
  {
    uint64_t near_last = kNone;  // of too many equal keys
    if (near_range.count > kCandidates) {
      const Narrowed narrowed = narrow<kKeys, kSeveral>(near_range, block, blocks);
      near_range = narrowed.range;
      near_last = narrowed.last;
    }
    // Without retrieved clusters, whose rank is -1, none.
    chosen_count = static_cast<uint32_t>(retrieved);
    if (near_range.count <= kCandidates) chosen_count += near_range.count - near_range.rank - 1;
    if (far_range.count > kCandidates) {
      const Narrowed narrowed = narrow<kKeys, kSeveral>(far_range, block, blocks);
      far_range = narrowed.range;
      if (far_range.count > kCandidates && thread == 0) shared.thresholds[1] = narrowed.last;
    }
#pragma unroll 1
    for (int c = 0; c < kChunks; ++c) {
      uint32_t keys[4], near = 0, far = 0, sure = 0;
      own_keys(c, keys);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (keys[k] <= near_range.high) near |= 1u << k;
        if (far_range.holds(keys[k])) far |= 1u << k;
        if (keys[k] < far_range.low) sure |= 1u << k;
      }
      near_bits |= near << 4 * c;
      far_bits |= far << 4 * c;
      sure_bits |= sure << 4 * c;
    }
    if (near_range.count > kCandidates) keep(near_bits, near_last);
    if (far_range.count == 0) far_bits = 0;
    // Of too many equal keys none is a candidate: the last is known.
    uint32_t near_left = near_bits, far_left = far_range.count > kCandidates ? 0 : far_bits;
    if constexpr (kSeveral) {
      auto& extra = shared.extra;
      const int most = static_cast<int>(max(chosen_count, 1u) - 1) / blocks;
      owner_shift = 32 - __clz(most);
      last_bin = first_bin(near_range.high);
#pragma unroll 1
      while (near_left != 0) {
        const uint64_t own = pair_at(take(near_left));
        const int bin = bin_of(own), half = bin % 2 * 16;
        uint32_t at = extra.starts[bin];
        const uint32_t owner = at >> owner_shift;
        if (bin == last_bin) {
          at += atomicAdd(cluster.in_block(&extra.last_taken, owner), 1u);
        } else {
          at = atomicAdd(&extra.places[bin / 2], 1u << half) >> half & 0xffff;
        }
        *cluster.in_block(shared.chosen + at, owner) = own;
        if (choice.before != nullptr && is_cluster(own)) {
          prefetch_line(all_offsets + static_cast<uint32_t>(own));
        }
      }
      const uint32_t far_count = static_cast<uint32_t>(__popc(far_left));
      const uint32_t far_through = scan_warp(far_count);
      uint32_t at = 0;
      if (lane == 31 && far_through > 0) {
        at = atomicAdd(cluster.in_block(&shared.candidate_count, last_block), far_through);
      }
      at = __shfl_sync(kAllLanes, at, 31) + far_through - far_count;
#pragma unroll 1
      for (; far_left != 0; ++at) {
        *cluster.in_block(shared.candidates + at, last_block) = pair_at(take(far_left));
      }
    } else {
#pragma unroll 1
      while (near_left != 0) {
        const uint64_t own = pair_at(take(near_left));
        shared.chosen[atomicAdd(&shared.bins[bin_of(own)], 1u)] = own;
      }
#pragma unroll 1
      while (far_left != 0) {
        const uint64_t own = pair_at(take(far_left));
        shared.candidates[atomicAdd(&shared.candidate_count, 1u)] = own;
      }
      wait_for_copies<0>();
    }
    cluster.sync();
  }

  int32_t* ids =
      choice.retrieved == nullptr ? nullptr : choice.retrieved + task * params.max_retrieved;
  {
    const auto tell = [&](int n, uint64_t threshold) {
#pragma unroll 1
      for (int k = 0; k < blocks; ++k) *cluster.in_block(shared.thresholds + n, k) = threshold;
    };
    if (block == last_block) {
      find_candidate(shared, far_range, [&](uint64_t own) { tell(1, own); });
    }
    int32_t* all_slots = cluster.in_block(shared.slots, 0);
    int32_t* all_tokens = cluster.in_block(shared.tokens, 0);
    // From the last warp on, which had the fewest candidates.
    const uint32_t first_place = static_cast<uint32_t>(block) << owner_shift;
#pragma unroll 1
    for (uint32_t i = first_place + kFewThreads - 1 - static_cast<uint32_t>(thread);
         i < chosen_count; i += kFewThreads) {
      const uint64_t own = shared.chosen[i];
      const uint32_t id = static_cast<uint32_t>(own);
      const int bin = bin_of(own);
      uint32_t begin, end;
      int32_t slot = 0, tokens = 0;
      if constexpr (kSeveral) {
        if (own == kNone) continue;
        if (choice.before != nullptr && is_cluster(own)) {
          slot = slot_of(all_offsets + id, choice.store_capacity, tokens);
        }
        begin = shared.extra.starts[bin];
        end = bin == last_bin ? chosen_count : shared.extra.starts[bin + 1];
      } else {
        begin = bin > 0 ? shared.bins[bin - 1] : 0, end = shared.bins[bin];
      }
      const uint32_t rank = begin + count_smaller(shared.chosen, begin, end, own);
      if (rank >= static_cast<uint32_t>(retrieved)) continue;
      if (rank + 1 == static_cast<uint32_t>(retrieved)) tell(0, own);
      if (ids != nullptr) ids[rank] = static_cast<int32_t>(id);
      if (choice.before == nullptr) continue;
      if constexpr (!kSeveral) {
        slot = slot_of(shared.extra.offsets + id, choice.store_capacity, tokens);
      }
      all_slots[rank] = slot;
      all_tokens[rank] = tokens;
    }
  }
  cluster.sync();

  // Of all that may be, those that come no later than the last retrieved, and than the last estimated.
  keep(near_bits, shared.thresholds[0]);
  keep(far_bits, shared.thresholds[1]);
  const int held = min(max(live - own_first, 0), kKeys);
  const uint32_t live_bits = held > 0 ? ~0u >> (32 - held) : 0;
  far_bits = (far_bits | sure_bits) & live_bits & ~near_bits;
  if (choice.tail != nullptr && own_first < (live + 31) / 32 * 32) {
    const uint32_t tail = live_bits & ~(near_bits | far_bits);
    uint32_t* words = choice.tail + int64_t{task} * ((all_clusters + 31) / 32) + first / 32;
    if constexpr (kKeys == 32) words[thread] = tail;
    else if constexpr (kKeys == 16) {
      reinterpret_cast<uint16_t*>(words)[thread] = static_cast<uint16_t>(tail);
    } else {
      static_assert(kKeys == 8);
      reinterpret_cast<uint8_t*>(words)[thread] = static_cast<uint8_t>(tail);
    }
  }
  const uint32_t far_own = static_cast<uint32_t>(__popc(far_bits));
  const uint32_t far_through = scan_warp(far_own);
  // A thread's ranks follow each other.
  const bool places = choice.before != nullptr && block == 0;
  const int thread_ranks = kSeveral ? (retrieved + kFewThreads - 1) / kFewThreads : 1;
  const int first_rank = thread * thread_ranks;
  const int end_rank = min(first_rank + thread_ranks, retrieved);
  uint32_t own_tokens = 0, tokens_through = 0;
  if (places && warp * 32 * thread_ranks < retrieved) {
#pragma unroll 1
    for (int rank = first_rank; rank < end_rank; ++rank) {
      own_tokens += static_cast<uint32_t>(shared.tokens[rank]);
    }
    tokens_through = scan_warp(own_tokens);
  }
  if (lane == 31) {
    shared.far_totals[warp] = far_through;
    shared.token_totals[warp] = tokens_through;
  }
  __syncthreads();

  int estimated = shared.budget.estimated;
  int32_t* estimated_ids = choice.estimated + int64_t{task} * all_clusters;
  if constexpr (kSeveral) {
    const uint32_t all_own = sum_of_first(shared.far_totals, kFewWarps);
    uint32_t* parts = shared.extra.far_parts;
    if (thread < blocks) *cluster.in_block(parts + block, thread) = all_own;
    cluster.sync();
    estimated = static_cast<int>(all_own);  // of this block
    estimated_ids += sum_of_first(parts, block);
  }
  // Ids of the estimated clusters go out in whole lines.
  uint32_t at = sum_of_first(shared.far_totals, warp) + far_through - far_own;
#pragma unroll 1
  while (far_bits != 0) shared.keys[at++] = static_cast<uint32_t>(first + take(far_bits));
  if (places) {
    int32_t* before = choice.before + task * (params.max_retrieved + 1);
    int32_t* shift = choice.shift + task * params.max_retrieved;
    const int32_t tokens = static_cast<int32_t>(sum_of_first(shared.token_totals, kFewWarps));
    if (warp * 32 * thread_ranks < retrieved) {
      const uint32_t through_warps = sum_of_first(shared.token_totals, warp) + tokens_through;
      int32_t through = static_cast<int32_t>(through_warps - own_tokens);
#pragma unroll 1
      for (int rank = first_rank; rank < end_rank; ++rank) {
        shift[rank] = shared.slots[rank] - through;
        through += shared.tokens[rank];
        before[rank + 1] = through;
      }
    }
#pragma unroll 1
    for (int64_t rank = retrieved + thread; rank < params.max_retrieved; rank += kFewThreads) {
      before[rank + 1] = tokens;
      shift[rank] = 0;
    }
    if (thread == 0) {
      before[0] = 0;
      unsigned long long* row =
          reinterpret_cast<unsigned long long*>(choice.counters + b * kCounters);
      atomicAdd(row + kRetrievedTokens, static_cast<unsigned long long>(tokens));
      if (task == b * params.heads) atomicAdd(row + kSteps, 1ull);
    }
  }
  if (ids != nullptr && block == 0) {
#pragma unroll 1
    for (int64_t rank = retrieved + thread; rank < params.max_retrieved; rank += kFewThreads) {
      ids[rank] = -1;
    }
  }
  __syncthreads();
#pragma unroll 4
  for (int i = thread; i < estimated; i += kFewThreads) {
    estimated_ids[i] = static_cast<int32_t>(shared.keys[i]);
  }
}

}  // namespace retro
