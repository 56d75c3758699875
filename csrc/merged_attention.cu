#include "merged_attention.h"

#include <tuple>

#include "attend.h"

namespace retro {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;

struct PlaceParams {
  int64_t retrieved_clusters, store_capacity;  // R, N
  const int64_t* addresses;                    // [B, Hkv, R, columns]
  int64_t columns;                             // 2; offloaded 3
  int64_t page_size, entries;                  // of a page, and of the page table
  int32_t* before;                             // see RetrievedTokens
  int32_t* shift;
  int32_t* first;  // see RetrievedPages; nullptr: not offloaded
  int32_t* tickets;
  int64_t ticket_count;
};

// Addresses become running sums, in which attention finds its tokens.
__global__ void __launch_bounds__(kThreads)
    place_tokens_kernel(const __grid_constant__ PlaceParams params) {
  __shared__ int32_t warp_sums[kWarps];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  release_successor();
  wait_for_predecessor();
  const int64_t task = blockIdx.x, ranks = params.retrieved_clusters;
  const int64_t* addresses = params.addresses + task * ranks * params.columns;
  int32_t* before = params.before + task * (ranks + 1);
  int32_t* shift = params.shift + task * ranks;
  int32_t sum = 0;
  for (int64_t start = 0; start < ranks; start += kThreads) {
    const int64_t r = start + thread;
    const int64_t* own_address = addresses + r * params.columns;
    longlong2 address = make_longlong2(0, 0);
    if (r < ranks) address = make_longlong2(own_address[0], own_address[1]);
    // Wrong addresses must not lead outside the store, nor the page table.
    bool inside = address.x >= 0 && address.y >= 0 && address.x <= params.store_capacity &&
        address.y <= params.store_capacity - address.x;
    if (r < ranks && params.first != nullptr) {
      const int64_t entry = own_address[2];
      inside = inside && entry >= 0 && entry <= params.entries &&
          page_count(address.y, params.page_size) <= params.entries - entry;
      params.first[task * ranks + r] = inside ? static_cast<int32_t>(entry) : 0;
    }
    if (!inside) address = make_longlong2(0, 0);
    const int32_t own = static_cast<int32_t>(address.y);
    int32_t running = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int32_t other = __shfl_up_sync(kAllLanes, running, step);
      if (lane >= step) running += other;
    }
    if (lane == 31) warp_sums[warp] = running;
    __syncthreads();
    int32_t behind = sum + running - own;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) behind += warp_sums[w];
      sum += warp_sums[w];
    }
    __syncthreads();
    if (r < ranks) {
      before[r + 1] = behind + own;
      shift[r] = static_cast<int32_t>(address.x) - behind;
    }
  }
  if (thread == 0) before[0] = 0;
  if (task == 0) {
    for (int64_t i = thread; i < params.ticket_count; i += kThreads) params.tickets[i] = 0;
  }
}

std::tuple<Tensor, Tensor> merged_attention(
    const Tensor& query,
    const Tensor& steady,
    const Tensor& store,
    const Tensor& addresses,
    const Tensor& counters,
    const Tensor& estimate,
    const Tensor& estimate_lse,
    double scale,
    std::optional<Tensor> pages,
    std::optional<Tensor> page_table,
    int64_t page_size) {
  Call<MergedAttentionParams> call = merged_attention_call(
      query, steady, store, addresses, counters, estimate, estimate_lse, scale, pages, page_table,
      page_size);
  MergedAttentionParams& params = call.params;
  check(
      !pages ||
          (params.store_capacity < kMostSlots && params.pages * params.page_size < kMostSlots &&
           params.page_size < kMostSlots),
      "merged_attention",
      "store and page cache must hold fewer than 2^30 tokens for each head, got ",
      params.store_capacity, " and ", params.pages * params.page_size);
  const Launcher launch("merged_attention", query);
  const MergedAttentionResults results = merged_attention_results(params, query);
  const int64_t tasks = params.batch * params.heads;
  if (tasks * params.groups == 0) return {results.out, results.lse};

  AttendParams attention = {};
  attention.dtype = params.dtype;
  attention.batch = params.batch;
  attention.heads = params.heads;
  attention.groups = params.groups;
  attention.head_dim = params.head_dim;
  attention.steady_capacity = params.steady_capacity;
  attention.query = params.query;
  attention.steady_keys = params.steady_keys;
  attention.steady_values = params.steady_values;
  attention.store_keys = params.store_keys;
  attention.store_values = params.store_values;
  attention.counters = params.counters;
  attention.given_estimate = params.estimate;
  attention.given_estimate_lse = params.estimate_lse;
  attention.scale = params.scale;
  attention.out = params.out;
  attention.lse = params.lse;
  plan_attend(launch, attention);
  attention.estimate_warps = 0;

  Workspace workspace;
  const AttendSpace space = reserve_attend(workspace, attention);
  const int64_t ranks = params.retrieved_clusters;
  const int64_t before = workspace.reserve<int32_t>(tasks * (ranks + 1));
  const int64_t shift = workspace.reserve<int32_t>(tasks * ranks);
  const int64_t first = workspace.reserve<int32_t>(pages ? tasks * ranks : 0);
  workspace.allocate(query);
  use_attend(space, workspace, attention);
  attention.retrieved = {workspace.at<int32_t>(before), workspace.at<int32_t>(shift), ranks};
  if (pages && params.page_table != nullptr) {
    attention.pages.sources = params.page_table;
    attention.pages.first = workspace.at<int32_t>(first);
    attention.pages.stride = params.entries;
    attention.pages.keys = params.page_keys;
    attention.pages.values = params.page_values;
    attention.pages.pages = params.pages;
    attention.pages.page_size = params.page_size;
  }

  PlaceParams place = {};
  place.retrieved_clusters = ranks;
  place.store_capacity = params.store_capacity;
  place.addresses = params.addresses;
  place.columns = params.address_columns;
  place.page_size = params.page_size;
  place.entries = params.entries;
  place.first = attention.pages.sources == nullptr ? nullptr : workspace.at<int32_t>(first);
  place.before = workspace.at<int32_t>(before);
  place.shift = workspace.at<int32_t>(shift);
  place.tickets = attention.tickets;
  place.ticket_count = ticket_count(attention);
  launch(place_tokens_kernel, grid_of(tasks), kThreads, 0, 1, place);
  attend(launch, attention);
  return {results.out, results.lse};
}

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CUDA, m) {
  m.impl("merged_attention", TORCH_BOX(&retro::merged_attention));
}
