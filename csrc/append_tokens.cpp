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
  check_shape(kOp, "keys", keys, "B, Hkv, T, D", {kAny, kAny, kAny, kAny});
  check_element_dtype(kOp, "keys", keys);
  const int64_t batch = keys.size(0), heads = keys.size(1), tokens = keys.size(2);
  const int64_t head_dim = keys.size(3);
  check_head_dim(kOp, head_dim);
  check_shape(kOp, "values", values, "B, Hkv, T, D", {batch, heads, tokens, head_dim});
  check_dtype(kOp, "values", values, keys.scalar_type());
  check_shape(kOp, "steady", steady, "2, B, Hkv, S, D", {2, batch, heads, kAny, head_dim});
  check_dtype(kOp, "steady", steady, keys.scalar_type());
  check_rows(kOp, "steady", steady);
  check_counters(kOp, counters, batch);
  check(max_length >= 0, kOp, "max_length must not be negative, got ", max_length);
  Tensor contiguous_mask;
  if (mask) {
    check_shape(kOp, "mask", *mask, "B, T", {batch, tokens});
    check_dtype(kOp, "mask", *mask, ScalarType::Bool);
    contiguous_mask = torch::stable::contiguous(*mask);
  }

  const Tensor readable_keys = readable(keys), readable_values = readable(values);
  AppendTokensParams params;
  params.batch = batch;
  params.heads = heads;
  params.tokens = tokens;
  params.element_bytes = static_cast<int64_t>(keys.element_size());
  params.row_bytes = head_dim * params.element_bytes;
  params.keys = rows_of(readable_keys);
  params.values = rows_of(readable_values);
  params.mask = mask ? static_cast<const bool*>(contiguous_mask.data_ptr()) : nullptr;
  params.steady_keys = half_of(steady, 0);
  params.steady_values = half_of(steady, 1);
  params.counters = static_cast<int64_t*>(counters.data_ptr());

  // Everything is checked before anything is written, so that a refused call loses nothing.
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t* row = params.counters + b * kCounters;
    check_count(kOp, b, row[kSteadyTokens], "steady tokens", "the steady zone", steady.size(3));
    const int64_t count = appended(params, b), length = row[kSteadyTokens] + row[kIndexedTokens];
    check(
        length + count <= max_length, kOp, "row ", b, " holds ", length, " of max_length ",
        max_length, " tokens, ", count,
        " more do not fit; make the layer or cache with a larger max_length");
    check(
        row[kSteadyTokens] + count <= steady.size(3), kOp, "the steady zone of ", steady.size(3),
        " tokens holds ", row[kSteadyTokens], " of row ", b, ", ", count,
        " more do not fit; append fewer tokens at once");
  }
  copy_tokens(params);
  for (int64_t b = 0; b < batch; ++b) {
    params.counters[b * kCounters + kSteadyTokens] += appended(params, b);
  }
}

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CPU, m) {
  m.impl("append_tokens", TORCH_BOX(&retro::append_tokens));
}
