#include "append_tokens.h"

#include <cstring>
#include <optional>

namespace retro {
namespace {

constexpr const char* kOp = "append_tokens";

char* byte_row(const Rows& rows, int64_t element_bytes, int64_t b, int64_t h, int64_t t) {
  return static_cast<char*>(rows.data) +
      (b * rows.stride_b + h * rows.stride_h + t * rows.stride_t) * element_bytes;
}

void copy_tokens(const AppendTokensParams& params) {
  torch::stable::parallel_for(0, params.batch * params.heads, 16, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / params.heads, h = task % params.heads;
      int64_t slot = params.counters[b * kCounters + kSteadyTokens];
      const size_t bytes = static_cast<size_t>(params.row_bytes);
      for (int64_t t = 0; t < params.tokens; ++t) {
        if (params.mask != nullptr && !params.mask[b * params.tokens + t]) continue;
        std::memcpy(
            byte_row(params.steady_keys, params.element_bytes, b, h, slot),
            byte_row(params.keys, params.element_bytes, b, h, t), bytes);
        std::memcpy(
            byte_row(params.steady_values, params.element_bytes, b, h, slot),
            byte_row(params.values, params.element_bytes, b, h, t), bytes);
        ++slot;
      }
    }
  });
}

int64_t appended(const AppendTokensParams& params, int64_t b) {
  if (params.mask == nullptr) return params.tokens;
  int64_t count = 0;
  for (int64_t t = 0; t < params.tokens; ++t) count += params.mask[b * params.tokens + t];
  return count;
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

  // Everything is checked before anything is written, so that a refused call loses nothing.
  for (int64_t b = 0; b < params.batch; ++b) {
    const int64_t* row = params.counters + b * kCounters;
    check_count(kOp, b, row[kSteadyTokens], "steady tokens", "the steady zone", steady.size(3));
    const int64_t count = appended(params, b), length = row[kSteadyTokens] + row[kIndexedTokens];
    check(
        length + count <= max_length, kOp, "row ", b, " holds ", length, " of max_length ",
        max_length, " tokens, ", count,
        " more do not fit; make the layer or cache with a larger max_length");
    check(
        row[kSteadyTokens] + count <= params.steady_capacity, kOp, "the steady zone of ",
        params.steady_capacity, " tokens holds ", row[kSteadyTokens], " of row ", b, ", ", count,
        " more do not fit; append fewer tokens at once");
  }
  copy_tokens(params);
  for (int64_t b = 0; b < params.batch; ++b) {
    params.counters[b * kCounters + kSteadyTokens] += appended(params, b);
  }
}

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CPU, m) {
  m.impl("append_tokens", TORCH_BOX(&retro::append_tokens));
}
