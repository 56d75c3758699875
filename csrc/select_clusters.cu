#include "select_clusters.h"

#include "select_few_cuda.h"
#include "select_keys_cuda.h"

namespace retro {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kThreadBins = kBins / kThreads;
static_assert(kCandidates <= kThreads / 2, "a thread for each candidate of both thresholds");
// Retrieved clusters that are put in order by counting; beyond, by a sorting network.
constexpr uint32_t kCountedRanks = 2048;
constexpr int kLanesPerRank = 8;
// Of a (row, head) with more clusters, several processors choose together.
constexpr int64_t kBlockKeys = 16384;
constexpr int kAhead = 8;     // scores of a thread that are under way
constexpr int kTogether = 4;  // keys of a thread that are looked at together

// What the phases of a block share.
struct alignas(16) State {
  int32_t blocks, first, count;  // of clusters: the first of this block, and how many it has
  int32_t block_keys;
  int32_t retrieved;   // by all blocks
  bool open[2];        // whether a threshold must be searched
  uint32_t* far_keys;  // where keys do not fit behind this

  uint32_t warp_totals[kWarps];
  uint64_t thresholds[2];  // pair_of(id, key) of the last retrieved, and of the last estimated
  Range ranges[2];
  uint32_t candidate_counts[2];
  uint32_t near_count, far_count;  // of this block: retrieved and estimated clusters
  int32_t all_tokens;              // of the retrieved clusters
  uint64_t candidates[2][kCandidates];
  union alignas(16) {
    uint32_t counts[2][kBins];  // of keys by bin, for each threshold; at first for both
    struct {                    // the retrieved clusters, by id
      uint32_t keys[kCountedRanks];
      int32_t tokens[kCountedRanks];
      int32_t ids[kCountedRanks];
      int32_t slots[kCountedRanks];
    } chosen;
  };

  // Too many equal keys are not listed: their ids alone decide.
  __device__ __forceinline__ bool listed(int n) const {
    return open[n] && ranges[n].count <= kCandidates;
  }
  __device__ __forceinline__ bool counted() const {
    return retrieved <= static_cast<int32_t>(kCountedRanks);
  }
};

// Through these the compiler knows that it is shared memory.
__device__ __forceinline__ State& state() { return *reinterpret_cast<State*>(shared_memory); }

// Behind the state, 32 clusters to a word: a bit for each that is retrieved, or estimated, and how many
// such bits lie before the word.
struct Words {
  uint32_t near, far, near_before, far_before;
};

__device__ __forceinline__ Words* words() {
  return reinterpret_cast<Words*>(shared_memory + sizeof(State) / 16);
}

// Behind the words.
template <bool kInShared>
__device__ __forceinline__ uint32_t* keys() {
  if constexpr (kInShared) return reinterpret_cast<uint32_t*>(words() + state().block_keys / 32);
  else return state().far_keys;
}

// Sums over the threads of a block, in their order; each thread gets the sum of those before it.
__device__ __forceinline__ uint32_t sum_before(uint32_t own, uint32_t& total) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const uint32_t sum = scan_warp(own);
  if (lane == 31) state().warp_totals[warp] = sum;
  __syncthreads();
  const uint32_t through = scan_warp(state().warp_totals[lane]);
  total = __shfl_sync(kAllLanes, through, 31);
  const uint32_t previous = __shfl_sync(kAllLanes, through, warp > 0 ? warp - 1 : 0);
  __syncthreads();  // warp_totals may be used again
  return sum - own + (warp > 0 ? previous : 0);
}

// Adds up the counts of all blocks: each adds up a part and tells the others.
__device__ __noinline__ void add_counts(int table) {
  constexpr int kMost = static_cast<int>(kMostBlocks);
  static_assert(kBins / 2 <= 4 * kThreads, "a thread adds up at most four bins");
  State& shared = state();
  const BlockCluster cluster(shared.blocks > 1);
  const unsigned blocks = static_cast<unsigned>(shared.blocks);
  const int part = kBins / shared.blocks / 4;  // groups of four bins
  const int at = static_cast<int>(cluster.rank()) * part + static_cast<int>(threadIdx.x);
  const bool adds = static_cast<int>(threadIdx.x) < part;
  uint4* counts = reinterpret_cast<uint4*>(shared.counts[table]);
  cluster.sync();
  uint4 sum = make_uint4(0, 0, 0, 0);
  if (adds) {
#pragma unroll 1
    for (unsigned block = 0; block < blocks && block < kMost; ++block) {
      const uint4 own = *cluster.in_block(counts + at, block);
      sum.x += own.x, sum.y += own.y, sum.z += own.z, sum.w += own.w;
    }
  }
  cluster.sync();
  if (adds) {
#pragma unroll 1
    for (unsigned block = 0; block < blocks; ++block) *cluster.in_block(counts + at, block) = sum;
  }
  cluster.sync();
}

// Finds the bins in which ranges `first_range` to `last_range` end.
__device__ __noinline__ void find_bins(int table, int first_range, int last_range, bool first) {
  State& shared = state();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  if (shared.blocks > 1) add_counts(table);
  else __syncthreads();
  static_assert(kThreadBins == 4);
  const uint4 counts = reinterpret_cast<const uint4*>(shared.counts[table])[thread];
  const uint32_t own = counts.x + counts.y + counts.z + counts.w;
  const uint32_t warp_total = __reduce_add_sync(kAllLanes, own);
  if (lane == 0) shared.warp_totals[warp] = warp_total;
  const uint32_t ranks[2] = {shared.ranges[0].rank, shared.ranges[1].rank};
  __syncthreads();  // from here on one thread changes a range, and no other reads it
  const uint32_t through = scan_warp(shared.warp_totals[lane]);
#pragma unroll 1
  for (int n = first_range; n <= last_range; ++n) {
    const uint32_t rank = n == 0 ? ranks[0] : ranks[1];
    const unsigned beyond = __ballot_sync(kAllLanes, rank < through);
    if (__ffs(static_cast<int>(beyond)) - 1 != warp) continue;
    const uint32_t before_warp = __shfl_sync(kAllLanes, through, warp) - warp_total;
    uint32_t less = before_warp + scan_warp(own) - own;
    if (rank < less || rank >= less + own) continue;
    Range range = shared.ranges[n];
    int bin = 4 * thread;
    uint32_t count = counts.x;
    if (range.rank >= less + count) less += count, count = counts.y, ++bin;
    if (range.rank >= less + count) less += count, count = counts.z, ++bin;
    if (range.rank >= less + count) less += count, count = counts.w, ++bin;
    if (first) cut_first(bin, range);
    else cut(bin, range);
    range.rank -= less;
    range.count = count;
    shared.ranges[n] = range;
  }
  __syncthreads();
}

// Sorts all entries, by all blocks together; `order` has room up to a power of two.
__device__ __noinline__ void sort_entries(
    uint64_t* order, int count, int own_thread, int all_threads, const BlockCluster& cluster) {
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

// Fills in how many bits lie before each word, and how many there are.
template <bool kInShared>
__device__ __forceinline__ void count_bits(int count) {
  const int per_thread = (count + kThreads - 1) / kThreads;
  const int begin = static_cast<int>(threadIdx.x) * per_thread;
  const int end = min(begin + per_thread, count);
  uint32_t near = 0, far = 0, near_total, far_total;
#pragma unroll 1
  for (int w = begin; w < end; ++w) {
    near += __popc(words()[w].near);
    far += __popc(words()[w].far);
  }
  if constexpr (kInShared) {  // fewer than 65,536 clusters: one sum does for both
    uint32_t total;
    const uint32_t before = sum_before(near << 16 | far, total);
    near = before >> 16, far = before & 0xffffu;
    near_total = total >> 16, far_total = total & 0xffffu;
  } else {
    near = sum_before(near, near_total);
    far = sum_before(far, far_total);
  }
#pragma unroll 1
  for (int w = begin; w < end; ++w) {
    words()[w].near_before = near;
    words()[w].far_before = far;
    near += __popc(words()[w].near);
    far += __popc(words()[w].far);
  }
  if (threadIdx.x == 0) {
    state().near_count = near_total;
    state().far_count = far_total;
  }
}

// The threshold of a range of equal keys: clusters come in order of their ids.
template <bool kInShared>
__device__ __noinline__ void find_equal(int n) {
  State& shared = state();
  const BlockCluster cluster(shared.blocks > 1);
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t equal = shared.ranges[n].low, rank = shared.ranges[n].rank;
  const int count = (shared.count + 31) / 32;
#pragma unroll 1
  for (int i = thread; i / 32 < count; i += kThreads) {
    const uint32_t bits =
        __ballot_sync(kAllLanes, i < shared.count && keys<kInShared>()[i] == equal);
    if (thread % 32 == 0) words()[i / 32] = {0, bits, 0, 0};
  }
  __syncthreads();
  count_bits<kInShared>(count);
  cluster.sync();
  uint32_t behind = 0;
#pragma unroll 1
  for (unsigned other = 0; other < cluster.rank(); ++other) {
    behind += *cluster.in_block(&shared.far_count, other);
  }
  // One thread finds the cluster, and tells all blocks.
#pragma unroll 1
  for (int w = thread; w < count; w += kThreads) {
    uint32_t bits = words()[w].far;
    const uint32_t low = behind + words()[w].far_before;
    if (rank < low || rank - low >= static_cast<uint32_t>(__popc(bits))) continue;
    for (uint32_t skip = rank - low; skip > 0; --skip) bits &= bits - 1;
    const int id = shared.first + w * 32 + __ffs(static_cast<int>(bits)) - 1;
#pragma unroll 1
    for (unsigned other = 0; other < static_cast<unsigned>(shared.blocks); ++other) {
      *cluster.in_block(&shared.thresholds[n], other) = pair_of(static_cast<uint32_t>(id), equal);
    }
  }
  cluster.sync();
}

// Narrows both ranges until they are done.
template <bool kInShared>
__device__ __noinline__ void find_ranges() {
  State& shared = state();
  const BlockCluster cluster(shared.blocks > 1);
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
  while ((shared.open[0] && !shared.ranges[0].done()) ||
         (shared.open[1] && !shared.ranges[1].done())) {
    const Range ranges[2] = {shared.ranges[0], shared.ranges[1]};
    const bool cuts[2] = {shared.open[0] && !ranges[0].done(), shared.open[1] && !ranges[1].done()};
    cluster.sync();  // all have read counts and ranges
#pragma unroll 1
    for (int i = thread; i < 2 * kBins / 4; i += kThreads) {
      reinterpret_cast<uint4*>(&shared.counts[0][0])[i] = make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
#pragma unroll 1
    for (int i = thread; i < shared.count; i += kThreads) {
      const uint32_t key = keys<kInShared>()[i];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        if (cuts[n] && ranges[n].holds(key)) {
          atomicAdd(&shared.counts[n][(key - ranges[n].low) >> ranges[n].shift()], 1u);
        }
      }
    }
    if (cuts[0]) find_bins(0, 0, 0, false);
    if (cuts[1]) find_bins(1, 1, 1, false);
  }
#pragma unroll 1
  for (int n = 0; n < 2; ++n) {
    if (shared.open[n] && !shared.listed(n)) find_equal<kInShared>(n);
  }
}

// The thresholds that lie in ranges of few clusters: those are put in order.
template <bool kInShared>
__device__ __noinline__ void find_thresholds() {
  State& shared = state();
  const BlockCluster cluster(shared.blocks > 1);
  const int thread = static_cast<int>(threadIdx.x);
  {
    const int count = shared.count, first = shared.first;
    const uint32_t* own_keys = keys<kInShared>();
    // A range that is not listed holds no key.
    uint32_t low[2], width[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const bool listed = shared.listed(n);
      low[n] = listed ? shared.ranges[n].low : ~0u;
      width[n] = listed ? shared.ranges[n].high - low[n] : 0;
    }
#pragma unroll 1
    for (int start = thread; start < count; start += kTogether * kThreads) {
      uint32_t some[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        const int i = start + k * kThreads;
        some[k] = i < count ? own_keys[i] : kLastKey;
      }
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        const int i = start + k * kThreads;
        if (some[k] - low[0] > width[0] && some[k] - low[1] > width[1]) continue;
        if (i >= count) continue;
#pragma unroll 1
        for (int n = 0; n < 2; ++n) {
          if (some[k] - (n == 0 ? low[0] : low[1]) > (n == 0 ? width[0] : width[1])) continue;
          const uint32_t at = atomicAdd(cluster.in_block(&shared.candidate_counts[n], 0), 1u);
          *cluster.in_block(&shared.candidates[n][at], 0) =
              pair_of(static_cast<uint32_t>(first + i), some[k]);
        }
      }
    }
  }
  cluster.sync();
  const int n = thread / static_cast<int>(kCandidates);
  const uint32_t c = static_cast<uint32_t>(thread) % kCandidates;
  const uint32_t candidates = shared.listed(n) ? shared.ranges[n].count : 0;
  if (cluster.rank() != 0) {
    if (c < candidates) shared.candidates[n][c] = *cluster.in_block(&shared.candidates[n][c], 0);
    __syncthreads();
  }
  if (c < candidates) {
    const uint64_t own = shared.candidates[n][c];
    uint32_t smaller = 0;
#pragma unroll 4
    for (uint32_t i = 0; i < candidates; ++i) smaller += shared.candidates[n][i] < own;
    if (smaller == shared.ranges[n].rank) shared.thresholds[n] = own;
  }
  cluster.sync();  // the counts make room for the chosen clusters
}

// Ids of the estimated clusters in their order; the retrieved ones by id, to all blocks or to `order`.
template <bool kInShared>
__device__ __noinline__ void part_clusters(
    const int32_t* all_offsets,
    int64_t store_capacity,
    int32_t* estimated_ids,
    uint32_t* tail,
    uint64_t* order) {
  State& shared = state();
  const BlockCluster cluster(shared.blocks > 1);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int count = shared.count, first = shared.first, retrieved = shared.retrieved;
  const uint32_t* own_keys = keys<kInShared>();
  {
    const uint64_t near = shared.thresholds[0], far = shared.thresholds[1];
#pragma unroll 1
    for (int start = thread; start - lane < count; start += kTogether * kThreads) {
      uint32_t some[kTogether];
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        const int i = start + k * kThreads;
        some[k] = i < count ? own_keys[i] : 0;
      }
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        const int i = start + k * kThreads;
        if (i - lane >= count) continue;  // alike in a warp
        const uint64_t own = pair_of(static_cast<uint32_t>(first + i), some[k]);
        const uint32_t near_bits = __ballot_sync(kAllLanes, i < count && own <= near);
        const uint32_t far_bits = __ballot_sync(kAllLanes, i < count && own <= far);
        const uint32_t tail_bits = __ballot_sync(kAllLanes, i < count && own > far && own > near);
        if (lane == 0) {
          words()[i / 32] = {near_bits, far_bits & ~near_bits, 0, 0};
          if (tail != nullptr) tail[(first + i) / 32] = tail_bits;
        }
      }
    }
  }
  __syncthreads();
  const int word_count = (count + 31) / 32;
  count_bits<kInShared>(word_count);
  cluster.sync();
  uint32_t near_behind = 0;
#pragma unroll 1
  for (unsigned other = 0; other < cluster.rank(); ++other) {
    near_behind += *cluster.in_block(&shared.near_count, other);
    estimated_ids += *cluster.in_block(&shared.far_count, other);
  }
  // Lists are read four at a time, to their end and beyond.
  if (thread < kLanesPerRank * 4 && retrieved + thread < static_cast<int>(kCountedRanks)) {
    shared.chosen.keys[retrieved + thread] = ~0u;
  }
  const uint32_t lower_lanes = (1u << lane) - 1;
#pragma unroll 2
  for (int w = warp; w < word_count; w += kWarps) {
    const Words own = words()[w];
    if (!(own.near >> lane & 1)) continue;
    const int id = first + w * 32 + lane;
    const uint32_t at = near_behind + own.near_before + __popc(own.near & lower_lanes);
    const uint32_t key = own_keys[w * 32 + lane];
    if (!shared.counted()) {
      __stcg(order + at, pair_of(static_cast<uint32_t>(id), key));
      continue;
    }
#pragma unroll 1
    for (unsigned other = 0; other < static_cast<unsigned>(shared.blocks); ++other) {
      *cluster.in_block(&shared.chosen.keys[at], other) = key;
      *cluster.in_block(&shared.chosen.ids[at], other) = id;
    }
  }
  if (!shared.counted()) __threadfence();
  cluster.sync();
  // Where a thread's chosen cluster lies is asked for before, and used after, estimated ids are written.
  int32_t slot = 0, tokens = 0;
  const bool places = shared.counted() && thread < retrieved;
  if (places) slot = slot_of(all_offsets + shared.chosen.ids[thread], store_capacity, tokens);
#pragma unroll 2
  for (int w = warp; w < word_count; w += kWarps) {
    const Words own = words()[w];
    if (own.far >> lane & 1) {
      estimated_ids[own.far_before + __popc(own.far & lower_lanes)] = first + w * 32 + lane;
    }
  }
  if (!shared.counted()) return;
  if (places) {
    shared.chosen.tokens[thread] = tokens;
    shared.chosen.slots[thread] = slot;
  }
#pragma unroll 1
  for (int i = thread + kThreads; i < retrieved; i += kThreads) {
    shared.chosen.slots[i] = slot_of(all_offsets + shared.chosen.ids[i], store_capacity, tokens);
    shared.chosen.tokens[i] = tokens;
  }
  __syncthreads();
}

// Puts the chosen clusters in order and writes ids, `before` and `shift`, where they are wanted; returns
// all tokens.
__device__ __noinline__ int32_t rank_chosen(int32_t* ids, int32_t* before, int32_t* shift) {
  State& shared = state();
  const BlockCluster cluster(shared.blocks > 1);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int retrieved = shared.retrieved, all_threads = shared.blocks * kThreads;
  const int part = thread % kLanesPerRank;
  const int own_thread = static_cast<int>(cluster.rank()) * kThreads + thread;
  const uint4* all_keys = reinterpret_cast<const uint4*>(shared.chosen.keys);
  const int4* all_tokens = reinterpret_cast<const int4*>(shared.chosen.tokens);
#pragma unroll 1
  for (int item = own_thread / kLanesPerRank;; item += all_threads / kLanesPerRank) {
    if (item - lane / kLanesPerRank >= retrieved) break;  // alike in a warp
    const uint32_t own = item < retrieved ? shared.chosen.keys[item] : 0;
    uint32_t smaller = 0;
    int32_t behind = 0;
    // Of equal keys, those of lower ids come first.
    const auto add = [&](uint32_t key, int32_t tokens, int i) {
      const bool is_before = key < own + (i < item);
      smaller += is_before;
      behind += is_before ? tokens : 0;
    };
#pragma unroll 2
    for (int i = part; i < (retrieved + 3) / 4; i += kLanesPerRank) {
      const uint4 four = all_keys[i];
      const int4 tokens = all_tokens[i];
      add(four.x, tokens.x, 4 * i);
      add(four.y, tokens.y, 4 * i + 1);
      add(four.z, tokens.z, 4 * i + 2);
      add(four.w, tokens.w, 4 * i + 3);
    }
#pragma unroll
    for (int step = 1; step < kLanesPerRank; step *= 2) {
      smaller += __shfl_xor_sync(kAllLanes, smaller, step);
      behind += __shfl_xor_sync(kAllLanes, behind, step);
    }
    if (part != 0 || item >= retrieved) continue;
    if (ids != nullptr) ids[smaller] = shared.chosen.ids[item];
    if (before == nullptr) continue;
    const int32_t through = behind + shared.chosen.tokens[item];
    before[smaller + 1] = through;
    shift[smaller] = shared.chosen.slots[item] - behind;
    if (static_cast<int>(smaller) == retrieved - 1) {
      *cluster.in_block(&shared.all_tokens, 0) = through;
    }
  }
  cluster.sync();
  return retrieved > 0 ? shared.all_tokens : 0;
}

// The same for clusters in `order`, which are too many to be counted.
__device__ __noinline__ int32_t rank_order(
    uint64_t* order,
    const int32_t* all_offsets,
    int64_t store_capacity,
    int32_t* ids,
    int32_t* before,
    int32_t* shift) {
  State& shared = state();
  const BlockCluster cluster(shared.blocks > 1);
  const int thread = static_cast<int>(threadIdx.x), retrieved = shared.retrieved;
  const int own_thread = static_cast<int>(cluster.rank()) * kThreads + thread;
  const int all_threads = shared.blocks * kThreads;
  sort_entries(order, retrieved, own_thread, all_threads, cluster);
  if (ids != nullptr) {
#pragma unroll 1
    for (int i = own_thread; i < retrieved; i += all_threads) {
      ids[i] = static_cast<int32_t>(__ldcg(order + i) & 0xffffffffu);
    }
  }
  int32_t all_tokens = 0;
  if (before != nullptr && cluster.rank() == 0) {
#pragma unroll 1
    for (int start = 0; start < retrieved; start += kThreads) {
      const int rank = start + thread;
      int32_t slot = 0, tokens = 0;
      if (rank < retrieved) {
        slot = slot_of(all_offsets + (__ldcg(order + rank) & 0xffffffffu), store_capacity, tokens);
      }
      uint32_t total;
      const int32_t behind =
          all_tokens + static_cast<int32_t>(sum_before(static_cast<uint32_t>(tokens), total));
      if (rank < retrieved) {
        before[rank + 1] = behind + tokens;
        shift[rank] = slot - behind;
      }
      all_tokens += static_cast<int32_t>(total);
    }
  }
  cluster.sync();  // nobody ends while others read its shared memory
  return all_tokens;
}

template <bool kInShared>
__global__ void __launch_bounds__(kThreads)
    select_kernel(const __grid_constant__ SelectParams params, int32_t blocks, int32_t block_keys) {
  State& shared = state();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  release_successor();
  const int task = static_cast<int>(blockIdx.x) / blocks;
  const int b = task / static_cast<int>(params.heads);
  const int groups = static_cast<int>(params.groups);
  const Choice& choice = params.choice;
  const int32_t* all_offsets = params.offsets + task * (params.clusters + 1);
  {
    const int block = static_cast<int>(blockIdx.x) - task * blocks, first = block * block_keys;
    // Behind words and keys: log2 of the sum of all masses, [G].
    float* norms =
        reinterpret_cast<float*>(words() + block_keys / 32) + (kInShared ? block_keys : 0);
#pragma unroll 1
    for (int i = thread; i < kBins / 4; i += kThreads) {
      reinterpret_cast<uint4*>(shared.counts[0])[i] = make_uint4(0, 0, 0, 0);
    }
    if (thread == 0) {
      shared.block_keys = block_keys;
      shared.far_keys = params.keys + static_cast<int64_t>(blockIdx.x) * block_keys;
    }
    wait_for_predecessor();

    const int64_t counted_clusters = choice.counters[b * kCounters + kClusters];
    const int held = max(0, min(static_cast<int>(params.clusters) - first, block_keys));
    const float* ranked = params.ranked + (task * params.clusters + first) * params.groups;
    const bool quads = groups % 4 == 0;
    float4 logits[kAhead];
    const auto fetch = [&](int start) {
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int i = start + thread + k * kThreads;
        if (!quads || i >= held) continue;
        logits[k] =
            __ldcg(reinterpret_cast<const float4*>(ranked + static_cast<int64_t>(i) * groups));
      }
    };
    fetch(0);
#pragma unroll 1
    for (int g = warp; g < groups; g += kWarps) {
      const float2* sums = params.sums + task * params.score_blocks * groups + g;
      const float norm = norm_of(
          sums, block_sum(sums, lane, params.score_blocks, groups), params.score_blocks, groups);
      if (lane == 0) norms[g] = norm;
    }
    const Budget budget = budget_of(params, counted_clusters);
    const int live = budget.live, count = max(0, min(live - first, block_keys));
    // A warp that has no norms to add up.
    const int other = thread - (kThreads - 32);
    if (other == 0 || other == 1) {
      const int retrieved = budget.retrieved, estimated = budget.estimated;
      const int wanted = other == 0 ? retrieved : retrieved + estimated;
      // The first and the last of all clusters need no search.
      shared.thresholds[other] = wanted == 0 ? 0 : ~0ull;
      shared.open[other] = wanted > 0 && wanted < live;
      shared.ranges[other] = {0, kLastKey, static_cast<uint32_t>(wanted) - 1, 0};
      shared.candidate_counts[other] = 0;
      if (other == 0) {
        shared.retrieved = retrieved;
        shared.blocks = blocks;
        shared.first = first;
        shared.count = count;
        if (block == 0) choice.estimated_counts[task] = estimated;
      }
    }
    __syncthreads();

    float norm[4];
#pragma unroll
    for (int g = 0; g < 4; ++g) norm[g] = quads ? norms[g] : 0.0f;
#pragma unroll 1
    for (int start = 0; start < count; start += kAhead * kThreads) {
      if (start > 0) fetch(start);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int i = start + thread + k * kThreads;
        if (i >= count) continue;
        const float* own = ranked + static_cast<int64_t>(i) * groups;
        float score = 0.0f;
        if (quads) {
          score = exp2_of(logits[k].x - norm[0]) + exp2_of(logits[k].y - norm[1]) +
              exp2_of(logits[k].z - norm[2]) + exp2_of(logits[k].w - norm[3]);
        }
        const float one = quads ? logits[k].x : own[0];
        if (groups > 4 || !quads) {
#pragma unroll 1
          for (int g = quads ? 4 : 0; g < groups; ++g) score += exp2_of(own[g] - norms[g]);
        }
        const uint32_t key = sort_key(score, one == -INFINITY);
        keys<kInShared>()[i] = key;
        atomicAdd(&shared.counts[0][first_bin(key)], 1u);
      }
    }
  }

  if (shared.open[0] || shared.open[1]) {
    find_bins(0, shared.open[0] ? 0 : 1, shared.open[1] ? 1 : 0, true);
    find_ranges<kInShared>();
    find_thresholds<kInShared>();
  } else {
    BlockCluster(blocks > 1).sync();
  }
  uint64_t* order = params.order + task * params.order_capacity;
  part_clusters<kInShared>(
      all_offsets, choice.store_capacity, choice.estimated + task * params.clusters,
      choice.tail == nullptr ? nullptr : choice.tail + task * ceil_div(params.clusters, 32), order);
  int32_t* ids =
      choice.retrieved == nullptr ? nullptr : choice.retrieved + task * params.max_retrieved;
  int32_t* before =
      choice.before == nullptr ? nullptr : choice.before + task * (params.max_retrieved + 1);
  int32_t* shift = choice.before == nullptr ? nullptr : choice.shift + task * params.max_retrieved;
  const int32_t tokens = shared.counted()
      ? rank_chosen(ids, before, shift)
      : rank_order(order, all_offsets, choice.store_capacity, ids, before, shift);
  const int block = static_cast<int>(blockIdx.x) - task * blocks;
  if (block != 0) return;
#pragma unroll 1
  for (int64_t rank = shared.retrieved + thread; rank < params.max_retrieved; rank += kThreads) {
    if (ids != nullptr) ids[rank] = -1;
    if (before == nullptr) continue;
    before[rank + 1] = tokens;
    shift[rank] = 0;
  }
  if (thread != 0 || before == nullptr) return;
  before[0] = 0;
  unsigned long long* row = reinterpret_cast<unsigned long long*>(choice.counters + b * kCounters);
  atomicAdd(row + kRetrievedTokens, static_cast<unsigned long long>(tokens));
  if (task % params.heads == 0) atomicAdd(row + kSteps, 1ull);
}

struct Plan {
  int64_t blocks, block_keys, shared_bytes;
  bool in_shared;
};

// How select_few_kernel takes clusters: keys to a thread, in how many blocks; 0: it does not.
struct FewPlan {
  int keys;
  int64_t blocks;
};

// Two blocks with 16 keys to a thread, or one with 32, fit into the shared memory of an H100's processor.
static_assert(2 * sizeof(Few<16, true>) <= 222 * 1024 && sizeof(Few<32, true>) <= 222 * 1024);

FewPlan plan_few(const Launcher& launch, const SelectParams& params) {
  const int64_t norm_bytes = ceil_div(params.groups, 4) * 16, most = launch.shared_bytes();
  const auto fits = [&](int keys, bool several, int64_t blocks, size_t bytes) {
    return params.clusters <= blocks * kFewThreads * keys &&
        params.max_retrieved <= few_retrieved(keys, several) &&
        static_cast<int64_t>(bytes) + norm_bytes <= most;
  };
  if (fits(8, false, 1, sizeof(Few<8, false>))) return {8, 1};
  if (fits(16, false, 1, sizeof(Few<16, false>))) return {16, 1};
  if (fits(32, false, 1, sizeof(Few<32, false>))) return {32, 1};
  if (!launch.hopper()) return {0, 0};
  for (int64_t blocks = 2; blocks <= kMostBlocks; blocks *= 2) {
    if (fits(16, true, blocks, sizeof(Few<16, true>))) return {16, blocks};
  }
  for (int64_t blocks = 2; blocks <= kMostBlocks; blocks *= 2) {
    if (fits(32, true, blocks, sizeof(Few<32, true>))) return {32, blocks};
  }
  return {0, 0};
}

template <int kKeys, bool kSeveral>
void launch_few(const Launcher& launch, const SelectParams& params, int64_t blocks) {
  const auto run = [&](auto kernel) {
    launch(
        kernel, grid_of(params.batch * params.heads * blocks), kFewThreads,
        static_cast<int64_t>(sizeof(Few<kKeys, kSeveral>)) + ceil_div(params.groups, 4) * 16,
        blocks, params, static_cast<int32_t>(blocks));
  };
  if (params.groups == 4) run(select_few_kernel<kKeys, 4, kSeveral>);
  else if (params.groups == 8) run(select_few_kernel<kKeys, 8, kSeveral>);
  else run(select_few_kernel<kKeys, 0, kSeveral>);
}

Plan plan_select(const Launcher& launch, const SelectParams& params) {
  Plan plan = {};
  const auto set_blocks = [&](int64_t blocks) {
    plan.blocks = blocks;
    plan.block_keys = ceil_div(std::max<int64_t>(params.clusters, 1), blocks * 32) * 32;
    plan.shared_bytes = static_cast<int64_t>(sizeof(State)) + ceil_div(params.groups, 4) * 16 +
        (plan.block_keys / 32) * static_cast<int64_t>(sizeof(Words));
    const int64_t key_bytes = plan.block_keys * 4;
    plan.in_shared = plan.shared_bytes + key_bytes <= launch.shared_bytes();
    if (plan.in_shared) plan.shared_bytes += key_bytes;
  };
  set_blocks(1);
  while (launch.hopper() && plan.blocks < kMostBlocks) {
    if (plan.in_shared && plan.blocks * kBlockKeys >= params.clusters) break;
    set_blocks(2 * plan.blocks);
  }
  return plan;
}

int64_t power_of_two(int64_t count) {
  int64_t size = 1;
  while (size < count) size *= 2;
  return size;
}

}  // namespace

SelectSpace reserve_select(
    const Launcher& launch, Workspace& workspace, const SelectParams& params) {
  SelectSpace space = {};
  if (plan_few(launch, params).blocks > 0) return space;
  const int64_t tasks = params.batch * params.heads;
  const Plan plan = plan_select(launch, params);
  space.keys =
      workspace.reserve<uint32_t>(plan.in_shared ? 0 : tasks * plan.blocks * plan.block_keys);
  space.order = workspace.reserve<uint64_t>(
      params.max_retrieved > int64_t{kCountedRanks} ? tasks * power_of_two(params.max_retrieved)
                                                    : 0);
  return space;
}

void select_clusters(
    const Launcher& launch,
    const Workspace& workspace,
    const SelectSpace& space,
    SelectParams& params) {
  const FewPlan few = plan_few(launch, params);
  if (few.blocks == 1) {
    if (few.keys == 8) return launch_few<8, false>(launch, params, 1);
    if (few.keys == 16) return launch_few<16, false>(launch, params, 1);
    return launch_few<32, false>(launch, params, 1);
  }
  if (few.blocks > 1) {
    if (few.keys == 16) return launch_few<16, true>(launch, params, few.blocks);
    return launch_few<32, true>(launch, params, few.blocks);
  }
  const Plan plan = plan_select(launch, params);
  params.keys = workspace.at<uint32_t>(space.keys);
  params.order = workspace.at<uint64_t>(space.order);
  params.order_capacity = power_of_two(params.max_retrieved);
  const auto run = [&](auto kernel) {
    launch(
        kernel, grid_of(params.batch * params.heads * plan.blocks), kThreads, plan.shared_bytes,
        plan.blocks, params, static_cast<int32_t>(plan.blocks),
        static_cast<int32_t>(plan.block_keys));
  };
  if (plan.in_shared) run(select_kernel<true>);
  else run(select_kernel<false>);
}

}  // namespace retro
