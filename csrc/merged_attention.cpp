#include "merged_attention.h"

#include <tuple>

#include "cpu_kernels.h"

namespace retro {
namespace {

constexpr const char* kOp = "merged_attention";

std::tuple<Tensor, Tensor> merged_attention(
    const Tensor& query,
    const Tensor& steady,
    const Tensor& store,
    const Tensor& addresses,
    const Tensor& counters,
    const Tensor& estimate,
    const Tensor& estimate_lse,
    double scale) {
  check_shape(kOp, "query", query, "B, Hq, D", {kAny, kAny, kAny});
  check_element_dtype(kOp, "query", query);
  const int64_t batch = query.size(0), query_heads = query.size(1), head_dim = query.size(2);
  check_head_dim(kOp, head_dim);
  check_shape(kOp, "steady", steady, "2, B, Hkv, S, D", {2, batch, kAny, kAny, head_dim});
  check_dtype(kOp, "steady", steady, query.scalar_type());
  const int64_t heads = steady.size(2);
  check(
      heads > 0 && query_heads % heads == 0, kOp,
      "query heads must be a multiple of KV heads, got ", query_heads, " and ", heads);
  check_shape(kOp, "store", store, "2, B, Hkv, N, D", {2, batch, heads, kAny, head_dim});
  check_dtype(kOp, "store", store, query.scalar_type());
  check_shape(kOp, "addresses", addresses, "B, Hkv, R, 2", {batch, heads, kAny, 2});
  check_dtype(kOp, "addresses", addresses, ScalarType::Long);
  check_counters(kOp, counters, batch);
  check_shape(kOp, "estimate", estimate, "B, Hq, D", {batch, query_heads, head_dim});
  check_dtype(kOp, "estimate", estimate, ScalarType::Float);
  check_shape(kOp, "estimate_lse", estimate_lse, "B, Hq", {batch, query_heads});
  check_dtype(kOp, "estimate_lse", estimate_lse, ScalarType::Float);

  const Tensor readable_query = readable(query), readable_steady = readable(steady);
  const Tensor readable_store = readable(store);
  const Tensor contiguous_addresses = torch::stable::contiguous(addresses);
  const Tensor contiguous_estimate = torch::stable::contiguous(estimate);
  const Tensor contiguous_lse = torch::stable::contiguous(estimate_lse);
  Tensor out = torch::stable::new_empty(query, {batch, query_heads, head_dim}, query.scalar_type());
  Tensor lse = torch::stable::new_empty(query, {batch, query_heads}, ScalarType::Float);

  MergedAttentionParams params;
  params.dtype = element_dtype(query);
  params.batch = batch;
  params.heads = heads;
  params.groups = query_heads / heads;
  params.head_dim = head_dim;
  params.steady_capacity = steady.size(3);
  params.store_capacity = store.size(3);
  params.retrieved_clusters = addresses.size(2);
  params.query = query_rows(readable_query, params.groups);
  params.steady_keys = half_of(readable_steady, 0);
  params.steady_values = half_of(readable_steady, 1);
  params.store_keys = half_of(readable_store, 0);
  params.store_values = half_of(readable_store, 1);
  params.addresses = static_cast<const int64_t*>(contiguous_addresses.data_ptr());
  params.counters = static_cast<const int64_t*>(counters.data_ptr());
  params.estimate = static_cast<const float*>(contiguous_estimate.data_ptr());
  params.estimate_lse = static_cast<const float*>(contiguous_lse.data_ptr());
  params.scale = static_cast<float>(scale);
  params.out = out.data_ptr();
  params.lse = static_cast<float*>(lse.data_ptr());

  for (int64_t b = 0; b < batch; ++b) {
    const int64_t tokens = params.counters[b * kCounters + kSteadyTokens];
    check_count(kOp, b, tokens, "steady tokens", "the steady zone", params.steady_capacity);
  }
  for (int64_t i = 0; i < batch * heads * params.retrieved_clusters; ++i) {
    const int64_t first = params.addresses[2 * i], tokens = params.addresses[2 * i + 1];
    check(
        first >= 0 && tokens >= 0 && first <= params.store_capacity &&
            tokens <= params.store_capacity - first,  // their sum could overflow
        kOp, "addresses must lie in a store of ", params.store_capacity, " tokens, got ", tokens,
        " tokens from slot ", first);
  }
  cpu_kernels().merged_attention(params);
  return {out, lse};
}

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CPU, m) {
  m.impl("merged_attention", TORCH_BOX(&retro::merged_attention));
}
