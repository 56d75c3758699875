// New tokens go to the end of the steady zone.
#pragma once

#include <optional>

#include "views.h"

namespace retro {

struct AppendTokensParams {
  int64_t batch, heads, tokens, row_bytes;
  Rows keys, values;                // [B, Hkv, T, D]; strides in elements
  const bool* mask;                 // [B, T]: tokens to append; may be nullptr (all)
  Rows steady_keys, steady_values;  // [B, Hkv, S, D]
  int64_t steady_capacity, max_length;
  int64_t element_bytes;
  int64_t* counters;  // [B, kCounters]
};

inline Call<AppendTokensParams> append_tokens_call(
    const Tensor& keys,
    const Tensor& values,
    const std::optional<Tensor>& mask,
    const Tensor& steady,
    const Tensor& counters,
    int64_t max_length) {
  constexpr const char* kOp = "append_tokens";
  check_shape(kOp, "keys", keys, "B, Hkv, T, D", {kAny, kAny, kAny, kAny});
  check_element_dtype(kOp, "keys", keys);
  const int64_t batch = keys.size(0), heads = keys.size(1), tokens = keys.size(2);
  const int64_t head_dim = keys.size(3);
  check_head_dim(kOp, head_dim);
  check_shape(kOp, "values", values, "B, Hkv, T, D", {batch, heads, tokens, head_dim});
  check_dtype(kOp, "values", values, keys.scalar_type());
  check_device(kOp, "values", values, keys, "keys");
  check_shape(kOp, "steady", steady, "2, B, Hkv, S, D", {2, batch, heads, kAny, head_dim});
  check_dtype(kOp, "steady", steady, keys.scalar_type());
  check_device(kOp, "steady", steady, keys, "keys");
  check_rows(kOp, "steady", steady);
  check_counters(kOp, counters, batch);
  check_device(kOp, "counters", counters, keys, "keys");
  check(max_length >= 0, kOp, "max_length must not be negative, got ", max_length);
  if (mask) {
    check_shape(kOp, "mask", *mask, "B, T", {batch, tokens});
    check_dtype(kOp, "mask", *mask, ScalarType::Bool);
    check_device(kOp, "mask", *mask, keys, "keys");
  }

  Call<AppendTokensParams> call;
  AppendTokensParams& params = call.params;
  params.batch = batch;
  params.heads = heads;
  params.tokens = tokens;
  params.element_bytes = static_cast<int64_t>(keys.element_size());
  params.row_bytes = head_dim * params.element_bytes;
  params.keys = rows_of(call.hold(readable(keys)));
  params.values = rows_of(call.hold(readable(values)));
  params.mask = nullptr;
  if (mask) {
    params.mask = static_cast<const bool*>(call.hold(torch::stable::contiguous(*mask)).data_ptr());
  }
  params.steady_keys = half_of(steady, 0);
  params.steady_values = half_of(steady, 1);
  params.steady_capacity = steady.size(3);
  params.max_length = max_length;
  params.counters = static_cast<int64_t*>(counters.data_ptr());
  return call;
}

}  // namespace retro
