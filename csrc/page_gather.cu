#include "page_gather.h"

#include "attend.h"
#include "page_gather_cuda.h"

namespace retro {
namespace {

constexpr const char* kOp = "page_gather";
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kCopyThreads = 256;
constexpr int kCopyWarps = kCopyThreads / 32;
// Blocks that copy, for each processor: so many bytes are asked for that the way to the host is full.
constexpr int64_t kCopyBlocks = 8;

// Numbers in memory that the host reads or writes meanwhile; see page_cache.h.
__device__ __forceinline__ int32_t load_published(const int32_t* number) {
  int32_t value;
  asm volatile("ld.acquire.sys.global.s32 %0, [%1];" : "=r"(value) : "l"(number) : "memory");
  return value;
}
__device__ __forceinline__ int32_t load_shared(const int32_t* number) {
  int32_t value;
  asm volatile("ld.relaxed.sys.global.s32 %0, [%1];" : "=r"(value) : "l"(number) : "memory");
  return value;
}
__device__ __forceinline__ void publish_number(int32_t* number, int32_t value) {
  asm volatile("st.release.sys.global.s32 [%0], %1;" ::"l"(number), "r"(value) : "memory");
}

// A retrieved cluster, or one that may go.
struct Cluster {
  int32_t id;                      // -1: none
  int32_t slot, tokens, count;     // its first token in the store; how many; how many pages
  int32_t missing, missed_tokens;  // of those, pages that are not in the cache
  int64_t entry;                   // of the page table
};

// The tables of one (row, head).
struct Head {
  const int32_t* retrieved;
  const int32_t* offsets;
  int32_t* table;
  int32_t* free;
  const int32_t* decisions;
  int32_t* requests;
  uint8_t* cached;
  int32_t clusters, pages, page_size;
  int64_t store_tokens;

  __device__ __forceinline__ Head(const PageGatherParams& op, int64_t task)
      : retrieved(op.retrieved + task * op.retrieved_clusters),
        offsets(op.offsets + task * (op.clusters + 1)),
        table(op.page_table + task * op.entries),
        free(op.free_pages + task * (kFreeHeader + op.pages)),
        decisions(op.decisions + task * (kDecisionHeader + op.pages)),
        requests(op.requests + task * (kRequestHeader + op.retrieved_clusters)),
        cached(op.cached + task * op.clusters),
        clusters(static_cast<int32_t>(op.clusters)),
        pages(static_cast<int32_t>(op.pages)),
        page_size(static_cast<int32_t>(op.page_size)),
        store_tokens(op.store_tokens) {}

  // Ids that are none, and offsets that lead outside the store, are a cluster without tokens.
  __device__ __forceinline__ Cluster cluster(int32_t id) const {
    Cluster found = {-1, 0, 0, 0, 0, 0, 0};
    if (id < 0 || id >= clusters) return found;
    const int32_t slot = offsets[id];
    const int64_t tokens = int64_t{offsets[id + 1]} - slot;
    if (slot < 0 || tokens < 0 || slot + tokens > store_tokens) return found;
    found.id = id;
    found.slot = slot;
    found.tokens = static_cast<int32_t>(tokens);
    found.count = static_cast<int32_t>(page_count(tokens, page_size));
    found.entry = first_entry(slot, id, page_size);
    return found;
  }

  __device__ __forceinline__ void count_missing(Cluster& found) const {
#pragma unroll 4
    for (int32_t i = 0; i < found.count; ++i) {
      if (table[found.entry + i] >= 0) continue;
      ++found.missing;
      found.missed_tokens += min(page_size, found.tokens - i * page_size);
    }
  }

  // Pages that would be free without it.
  __device__ __forceinline__ int32_t held(const Cluster& found) const {
    int32_t count = 0;
#pragma unroll 4
    for (int32_t i = 0; i < found.count; ++i) {
      const int32_t page = table[found.entry + i];
      count += page >= 0 && page < pages;
    }
    return count;
  }

  // Takes a cluster out; its pages become the free ones from place `at` on.
  __device__ __forceinline__ void evict(const Cluster& victim, int32_t at) const {
    for (int32_t i = 0; i < victim.count; ++i) {
      int32_t& entry = table[victim.entry + i];
      const int32_t page = entry;
      if (page >= 0 && page < pages && at < pages) free[kFreeHeader + at++] = page;
      entry = -1;
    }
    cached[victim.id] = 0;
  }
};

// Sums of two numbers over the threads of a block, in their order; each thread gets those of the threads
// before it.
struct Sums {
  int32_t pages, missing;
};

__device__ __forceinline__ Sums
sum_before(Sums own, Sums& total, unsigned long long (&warp_sums)[kWarps]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const unsigned long long packed =
      static_cast<unsigned long long>(static_cast<uint32_t>(own.pages)) << 32 |
      static_cast<uint32_t>(own.missing);
  unsigned long long sum = packed;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const unsigned long long other = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  unsigned long long before = sum - packed, all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += warp_sums[w];
    all += warp_sums[w];
  }
  __syncthreads();  // warp_sums may be used again
  total = {static_cast<int32_t>(all >> 32), static_cast<int32_t>(all & 0xffffffffu)};
  return {static_cast<int32_t>(before >> 32), static_cast<int32_t>(before & 0xffffffffu)};
}

struct Tally {
  uint32_t retrieved_tokens, pages, misses, missed_tokens, admissions, admitted_pages, evictions;
};

__device__ __forceinline__ void add_up(uint32_t& tally, uint32_t own) {
  const uint32_t sum = __reduce_add_sync(kAllLanes, own);
  if (threadIdx.x % 32 == 0 && sum > 0) atomicAdd(&tally, sum);
}

// One block for each (row, head). As the CPU kernel, phase by phase.
__global__ void __launch_bounds__(kThreads)
    look_up_kernel(const __grid_constant__ PageLookupParams params) {
  extern __shared__ uint32_t
      marks[];  // a bit for each cluster: it is retrieved, or has gone already
  __shared__ unsigned long long warp_sums[kWarps];
  __shared__ Tally tally;
  __shared__ int32_t listed[kThreads], held[kThreads], place[kThreads];  // clusters that may go
  __shared__ int32_t decided_step, decided_count, free_count;
  const PageGatherParams& op = params.op;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int64_t task = blockIdx.x;
  const Head head(op, task);
  const int32_t ranks = static_cast<int32_t>(op.retrieved_clusters);
  release_successor();
  for (int32_t w = thread; w < (head.clusters + 31) / 32; w += kThreads) marks[w] = 0;
  if (thread == 0) tally = {};
  if (!params.early_decisions) wait_for_predecessor();
  // Decisions come from elsewhere and may be late, old or nonsense: they only say what may go. Each is
  // read once.
  if (thread == 0) {
    decided_step = load_published(head.decisions + kDecisionStep);
    decided_count = min(max(load_shared(head.decisions + kDecisionCount), 0), head.pages);
  }
  __syncthreads();
  const int32_t decided = decided_count;
  if (thread < decided) listed[thread] = load_shared(head.decisions + kDecisionHeader + thread);
  if (params.early_decisions) wait_for_predecessor();

  // Clusters that overlap, in an index in disorder, have more pages than there are.
  const auto has_sources = [&](int32_t first, int32_t count) {
    return int64_t{first} + count <= params.source_capacity;
  };
  // Look up. `own` stays that of the last round: as a rule there is one.
  Cluster own = {};
  int32_t needed = 0, all_pages = 0;
  const auto look = [&](int32_t start) {
    const int32_t r = start + thread;
    own = head.cluster(r < ranks ? head.retrieved[r] : -1);
    head.count_missing(own);
  };
  // A cluster that does not fit, or is to be made anew, stays out.
  const int64_t lasting = op.lasting_slots(task / op.heads);
  const auto wants = [&] {
    return own.count <= head.pages && own.slot < lasting ? own.missing : 0;
  };
  for (int32_t start = 0; start < ranks; start += kThreads) {
    look(start);
    if (own.id >= 0) atomicOr(&marks[own.id / 32], 1u << own.id % 32);
    Sums total;
    const Sums before = sum_before({own.count, wants()}, total, warp_sums);
    const int32_t r = start + thread;
    if (r < ranks && params.first != nullptr) {
      const int32_t first = all_pages + before.pages;
      params.first[task * ranks + r] = has_sources(first, own.count) ? first : 0;
    }
    if (r < ranks && op.addresses != nullptr) {
      int64_t* address = op.addresses + (task * ranks + r) * 3;
      address[0] = own.slot;
      address[1] = own.tokens;
      address[2] = own.entry;
    }
    all_pages += total.pages;
    needed += total.missing;
    add_up(tally.retrieved_tokens, static_cast<uint32_t>(own.tokens));
    add_up(tally.pages, static_cast<uint32_t>(own.count));
    add_up(tally.misses, static_cast<uint32_t>(own.missing));
    add_up(tally.missed_tokens, static_cast<uint32_t>(own.missed_tokens));
  }
  int32_t available = min(max(head.free[kFreeCount], 0), head.pages);
  const int32_t last_step = head.free[kFreeStep];
  __syncthreads();

  // Evict, in the order of the list, only as many as must.
  for (int32_t start = 0; start < decided && available < needed; start += kThreads) {
    const int32_t i = start + thread;
    int32_t id = -1;
    if (i < decided) {
      id = start == 0 ? listed[thread] : load_shared(head.decisions + kDecisionHeader + i);
    }
    Cluster victim = head.cluster(id);
    if (victim.id >= 0 && (marks[victim.id / 32] >> victim.id % 32 & 1)) victim.id = -1;
    listed[thread] = victim.id;
    held[thread] = victim.id >= 0 ? head.held(victim) : 0;
    place[thread] = -1;
    __syncthreads();
    if (warp == 0) {
      int32_t free = available;
      uint32_t gone = 0;
      for (int32_t group = 0; group < kThreads && start + group < decided && free < needed;
           group += 32) {
        const int32_t candidate = listed[group + lane];
        // Named twice, a cluster goes once.
        const unsigned same = __match_any_sync(kAllLanes, candidate);
        bool goes = candidate >= 0 && __ffs(static_cast<int>(same)) - 1 == lane &&
            !(marks[candidate / 32] >> candidate % 32 & 1);
        int32_t through = goes ? held[group + lane] : 0;
        const int32_t pages = through;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
          const int32_t other = __shfl_up_sync(kAllLanes, through, step);
          if (lane >= step) through += other;
        }
        const int32_t before = free + through - pages;
        goes = pages > 0 && before < needed;
        if (goes) {
          place[group + lane] = before;
          atomicOr(&marks[candidate / 32], 1u << candidate % 32);
        }
        const uint32_t freed =
            __reduce_add_sync(kAllLanes, goes ? static_cast<uint32_t>(pages) : 0);
        free = min(free + static_cast<int32_t>(freed), head.pages);
        gone += static_cast<uint32_t>(__popc(__ballot_sync(kAllLanes, goes)));
        __syncwarp();
      }
      if (lane == 0) {
        free_count = free;
        tally.evictions += gone;
      }
    }
    __syncthreads();
    if (place[thread] >= 0) head.evict(victim, place[thread]);
    available = free_count;
    __syncthreads();  // and what it holds is used by the next round, or all of them
  }

  // Admit by rank, while free pages last.
  int32_t taken = 0, first = 0;
  for (int32_t start = 0; start < ranks; start += kThreads) {
    if (ranks > kThreads) look(start);
    Sums total;
    const int32_t wanted = wants();
    const Sums before = sum_before({own.count, wanted}, total, warp_sums);
    const int32_t taken_before = taken + before.missing;
    const bool admitted = wanted > 0 && taken_before + wanted <= available;
    int32_t* sources = params.sources == nullptr || !has_sources(first + before.pages, own.count)
        ? nullptr
        : params.sources + task * params.source_capacity + first + before.pages;
    int32_t next = available - 1 - taken_before;  // place of the next free page
    if (sources != nullptr || admitted) {
      for (int32_t i = 0; i < own.count; ++i) {
        int32_t source = head.table[own.entry + i];
        if (source < 0) source = -1;
        if (source < 0 && admitted) {
          const int32_t page = head.free[kFreeHeader + next];
          head.table[own.entry + i] = page;
          source = -2 - page;
          if (params.fresh != nullptr) {
            const int32_t token = i * head.page_size;
            params.fresh[task * op.pages + available - 1 - next] = {
                own.slot + token, min(head.page_size, own.tokens - token), page, 0};
          }
          --next;
        }
        if (sources != nullptr) sources[i] = source;
      }
    }
    if (admitted) {
      head.cached[own.id] =
          static_cast<uint8_t>(min(own.count, static_cast<int32_t>(kMostPagesCounted)));
    }
    add_up(tally.admissions, admitted);
    add_up(tally.admitted_pages, admitted ? static_cast<uint32_t>(wanted) : 0);
    taken += total.missing;
    first += total.pages;
  }

  for (int32_t r = thread; r < ranks; r += kThreads) {
    head.requests[kRequestHeader + r] = head.retrieved[r];
  }
  __syncthreads();
  if (thread != 0) return;
  const int32_t left = available - static_cast<int32_t>(tally.admitted_pages);
  const int32_t step = last_step == INT32_MAX ? 1 : last_step + 1;
  head.free[kFreeStep] = step;
  head.free[kFreeCount] = left;
  if (params.fresh_count != nullptr) {
    params.fresh_count[task] = static_cast<int32_t>(tally.admitted_pages);
  }
  head.requests[kRequestFree] = left;
  head.requests[kRequestMissed] = static_cast<int32_t>(tally.misses);
  __threadfence_system();
  publish_number(head.requests + kRequestStep, step);

  // Integers: any order of additions gives the same sum.
  unsigned long long* row =
      reinterpret_cast<unsigned long long*>(op.counters + task / op.heads * kCounters);
  const auto count = [&](int64_t column, uint32_t number) {
    if (number > 0) atomicAdd(row + column, static_cast<unsigned long long>(number));
  };
  if (op.addresses != nullptr) {
    count(kRetrievedTokens, tally.retrieved_tokens);
    count(kSteps, task % op.heads == 0);
  }
  count(kPageHits, tally.pages - tally.misses);
  count(kPageMisses, tally.misses);
  count(kMissedTokens, tally.missed_tokens);
  count(kAdmissions, tally.admissions);
  count(kEvictions, tally.evictions);
  count(kLateDecisions, last_step > 0 && decided_step != last_step);
}

struct CopyParams {
  int64_t heads, pages, page_size, blocks;  // Hkv, P, S, blocks of a (row, head)
  int32_t row_chunks;                       // of 16 bytes
  const FreshPage* fresh;                   // [B * Hkv, P]
  const int32_t* fresh_count;               // [B * Hkv]
  Rows store_keys, store_values;            // strides in bytes
  Rows page_keys, page_values;
};

// Copies the pages that come in, a warp one after another.
__global__ void __launch_bounds__(kCopyThreads)
    copy_pages_kernel(const __grid_constant__ CopyParams params) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  release_successor();
  wait_for_predecessor();
  const int64_t task = blockIdx.x / params.blocks, block = blockIdx.x % params.blocks;
  const int64_t b = task / params.heads, h = task % params.heads;
  const int32_t count = params.fresh_count[task];
  const auto chunk_of = [&](const Rows& rows, int64_t t, int32_t chunk) {
    return reinterpret_cast<uint4*>(rows.row<char>(b, h, t)) + chunk;
  };
  for (int64_t i = block * kCopyWarps + threadIdx.x / 32; i < count;
       i += params.blocks * kCopyWarps) {
    const FreshPage page = params.fresh[task * params.pages + i];
    if (page.page < 0 || page.page >= params.pages) continue;  // a free list in disorder
    const int32_t chunks = page.tokens * params.row_chunks;
#pragma unroll 4
    for (int32_t c = lane; c < chunks; c += 32) {
      const int32_t t = c / params.row_chunks, chunk = c % params.row_chunks;
      const int64_t to = int64_t{page.page} * params.page_size + t;
      const uint4 key = *chunk_of(params.store_keys, page.slot + t, chunk);
      const uint4 value = *chunk_of(params.store_values, page.slot + t, chunk);
      *chunk_of(params.page_keys, to, chunk) = key;
      *chunk_of(params.page_values, to, chunk) = value;
    }
  }
}

int64_t marks_bytes(const PageGatherParams& params) {
  return std::max<int64_t>(ceil_div(params.clusters, 32), 1) * int64_t{sizeof(uint32_t)};
}

Tensor page_gather(
    const Tensor& retrieved,
    const Tensor& offsets,
    const Tensor& store,
    const Tensor& pages,
    const Tensor& page_table,
    const Tensor& free_pages,
    const Tensor& decisions,
    const Tensor& requests,
    const Tensor& cached,
    const Tensor& counters,
    int64_t page_size) {
  Tensor addresses;
  const Call<PageGatherParams> call = page_gather_call(
      kOp, retrieved, "retrieved", retrieved, offsets, store, pages, page_table, free_pages,
      decisions, requests, cached, counters, page_size, &addresses);
  const PageGatherParams& op = call.params;
  const Launcher launch(kOp, retrieved);
  check_lookup(kOp, launch, op);
  const int64_t tasks = op.batch * op.heads;
  if (tasks == 0) return addresses;

  Workspace workspace;
  const int64_t fresh = workspace.reserve<FreshPage>(tasks * op.pages);
  const int64_t fresh_count = workspace.reserve<int32_t>(tasks);
  // No ranks: `addresses` has no memory, and its pointer says who counts steps.
  const int64_t no_addresses = workspace.reserve<int64_t>(1);
  workspace.allocate(retrieved);
  PageLookupParams look_up = {};
  look_up.op = op;
  if (op.retrieved_clusters == 0) look_up.op.addresses = workspace.at<int64_t>(no_addresses);
  look_up.fresh = workspace.at<FreshPage>(fresh);
  look_up.fresh_count = workspace.at<int32_t>(fresh_count);
  look_up_pages(launch, look_up);
  if (op.pages == 0 || op.retrieved_clusters == 0) return addresses;

  const int64_t element_bytes = static_cast<int64_t>(store.element_size());
  const auto in_bytes = [&](const Rows& rows) {
    return Rows{
        rows.data, rows.stride_b * element_bytes, rows.stride_h * element_bytes,
        rows.stride_t * element_bytes};
  };
  CopyParams copy = {};
  copy.heads = op.heads;
  copy.pages = op.pages;
  copy.page_size = op.page_size;
  copy.blocks = std::max<int64_t>(
      std::min(ceil_div(kCopyBlocks * launch.processors(), tasks), ceil_div(op.pages, kCopyWarps)),
      1);
  copy.row_chunks = static_cast<int32_t>(op.head_dim * element_bytes / 16);
  copy.fresh = look_up.fresh;
  copy.fresh_count = look_up.fresh_count;
  copy.store_keys = in_bytes(op.store_keys);
  copy.store_values = in_bytes(op.store_values);
  copy.page_keys = in_bytes(op.page_keys);
  copy.page_values = in_bytes(op.page_values);
  launch(copy_pages_kernel, grid_of(tasks * copy.blocks), kCopyThreads, 0, 1, copy);
  return addresses;
}

}  // namespace

void check_lookup(const char* op, const Launcher& launch, const PageGatherParams& params) {
  check(
      params.store_tokens < kMostSlots && params.pages * params.page_size < kMostSlots &&
          params.page_size < kMostSlots,
      op, "store and page cache must hold fewer than 2^30 tokens for each head, got ",
      params.store_tokens, " and ", params.pages * params.page_size);
  constexpr int64_t kOthers = 8192;  // what the kernel declares itself
  check(
      marks_bytes(params) <= launch.shared_bytes() - kOthers, op, "an index of ", params.clusters,
      " clusters is too large for this GPU");
}

void look_up_pages(const Launcher& launch, const PageLookupParams& params) {
  launch(
      look_up_kernel, grid_of(params.op.batch * params.op.heads), kThreads, marks_bytes(params.op),
      1, params);
}

}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CUDA, m) { m.impl("page_gather", TORCH_BOX(&retro::page_gather)); }
