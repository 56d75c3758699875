#include "append_tokens.h"

#include "counters.h"
#include "cuda_common.h"

namespace retro {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// One block appends the tokens of a row: the counter that says where is read and changed by it alone.
// Each thread scans a stretch of the mask, and all of them copy.
__global__ void __launch_bounds__(kThreads) append_tokens_kernel(
    const __grid_constant__ AppendTokensParams params, int32_t* chosen_tokens) {
  __shared__ int64_t warp_counts[kWarps];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int64_t b = blockIdx.x;
  release_successor();
  wait_for_predecessor();

  int64_t* counters = params.counters + b * kCounters;
  const int64_t steady = counters[kSteadyTokens], indexed = counters[kIndexedTokens];
  const bool* mask = params.mask == nullptr ? nullptr : params.mask + b * params.tokens;
  int32_t* chosen = chosen_tokens == nullptr ? nullptr : chosen_tokens + b * params.steady_capacity;
  int64_t count = params.tokens;
  if (mask != nullptr) {
    const int64_t per_thread = ceil_div(params.tokens, kThreads);
    const int64_t first = thread * per_thread;
    const int64_t last = first + per_thread < params.tokens ? first + per_thread : params.tokens;
    int64_t own = 0;
    for (int64_t t = first; t < last; ++t) own += mask[t];
    int64_t sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int64_t other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) warp_counts[warp] = sum;
    __syncthreads();
    int64_t place = sum - own;
    count = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) place += warp_counts[w];
      count += warp_counts[w];
    }
    if (own > 0) {
      for (int64_t t = first; t < last; ++t) {
        if (!mask[t]) continue;
        if (place < params.steady_capacity) chosen[place] = static_cast<int32_t>(t);
        ++place;
      }
    }
  }
  __syncthreads();
  const int64_t chunks = params.row_bytes / 16;
  const auto chunk_of = [&](const Rows& rows, int64_t h, int64_t t, int64_t chunk) {
    return reinterpret_cast<uint4*>(
               static_cast<char*>(rows.data) +
               (b * rows.stride_b + h * rows.stride_h + t * rows.stride_t) * params.element_bytes) +
        chunk;
  };
  const bool fits = steady >= 0 && steady + count <= params.steady_capacity &&
      steady + indexed + count <= params.max_length;
  for (int64_t i = thread; i < count * params.heads * chunks; i += kThreads) {
    const int64_t chunk = i % chunks, t = i / chunks % count, h = i / chunks / count;
    if (mask != nullptr && !fits) break;  // not all tokens have been chosen
    const int64_t from = mask == nullptr ? t : chosen[t];
    // Asked for before it is known whether there is room: with one token there is one round.
    const uint4 key = *chunk_of(params.keys, h, from, chunk);
    const uint4 value = *chunk_of(params.values, h, from, chunk);
    if (!fits) break;
    *chunk_of(params.steady_keys, h, steady + t, chunk) = key;
    *chunk_of(params.steady_values, h, steady + t, chunk) = value;
  }
  __syncthreads();
  if (thread == 0) counters[fits ? kSteadyTokens : kDroppedTokens] += count;
}

void append_tokens(
    const Tensor& keys,
    const Tensor& values,
    std::optional<Tensor> mask,
    const Tensor& steady,
    const Tensor& counters,
    int64_t max_length) {
  const Call<AppendTokensParams> call =
      append_tokens_call(keys, values, mask, steady, counters, max_length);
  const AppendTokensParams& params = call.params;
  const Launcher launch("append_tokens", keys);
  Workspace workspace;
  const int64_t chosen = workspace.reserve<int32_t>(
      params.mask == nullptr ? 0 : params.batch * params.steady_capacity);
  workspace.allocate(keys);
  launch(
      append_tokens_kernel, grid_of(params.batch), kThreads, 0, 1, params,
      params.mask == nullptr ? nullptr : workspace.at<int32_t>(chosen));
}

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CUDA, m) {
  m.impl("append_tokens", TORCH_BOX(&retro::append_tokens));
}
