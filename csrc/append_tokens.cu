#include "append_tokens.h"

#include "counters.h"
#include "cuda_common.h"

namespace retro {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// These ask where they stand, whatever decides later whether the answer is used.
__device__ __forceinline__ int64_t load_here(const int64_t* from) {
  int64_t loaded;
  asm volatile("ld.volatile.global.s64 %0, [%1];" : "=l"(loaded) : "l"(from));
  return loaded;
}

__device__ __forceinline__ uint4 load_here(const uint4* from) {
  uint4 loaded;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(loaded.x), "=r"(loaded.y), "=r"(loaded.z), "=r"(loaded.w)
               : "l"(from));
  return loaded;
}

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
  const int64_t steady = load_here(counters + kSteadyTokens);
  const int64_t indexed = load_here(counters + kIndexedTokens);
  const bool* mask = params.mask == nullptr ? nullptr : params.mask + b * params.tokens;
  int32_t* chosen = chosen_tokens == nullptr ? nullptr : chosen_tokens + b * params.steady_capacity;
  int64_t count = params.tokens, copied = count;
  const auto fits = [&](int64_t in_steady, int64_t in_index) {
    return in_steady >= 0 && in_steady + count <= params.steady_capacity &&
        in_steady + in_index + count <= params.max_length;
  };
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
    copied = fits(steady, indexed) ? count : 0;  // without room not all tokens have been chosen
  }
  __syncthreads();
  const int64_t chunks = params.row_bytes / 16;
  const auto chunk_of = [&](const Rows& rows, int64_t h, int64_t t, int64_t chunk) {
    return reinterpret_cast<uint4*>(
               static_cast<char*>(rows.data) +
               (b * rows.stride_b + h * rows.stride_h + t * rows.stride_t) * params.element_bytes) +
        chunk;
  };
  for (int64_t i = thread; i < copied * params.heads * chunks; i += kThreads) {
    const int64_t chunk = i % chunks, t = i / chunks % count, h = i / chunks / count;
    const int64_t from = mask == nullptr ? t : chosen[t];
    // With one token there is one round trip to memory: what says whether there is room comes with the
    // token, asked for once more so that nothing waits for it before.
    const uint4 key = load_here(chunk_of(params.keys, h, from, chunk));
    const uint4 value = load_here(chunk_of(params.values, h, from, chunk));
    const int64_t before = load_here(counters + kSteadyTokens);
    if (!fits(before, load_here(counters + kIndexedTokens))) break;
    *chunk_of(params.steady_keys, h, before + t, chunk) = key;
    *chunk_of(params.steady_values, h, before + t, chunk) = value;
  }
  __syncthreads();
  if (thread != 0) return;
  if (fits(steady, indexed)) counters[kSteadyTokens] = steady + count;
  else counters[kDroppedTokens] += count;
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
