// Exact attention to the steady zone and the retrieved clusters, read in place, merged with the estimate
// of the others by log-sum-exp (RetroInfer, section 4.1). Offloaded, a page of a cluster may be read from
// the page cache instead of the store; the order of tokens is the same, and so is every bit.
#pragma once

#include <optional>

#include "page_cache.h"

namespace retro {

struct MergedAttentionParams {
  DType dtype;
  int64_t batch, heads, groups, head_dim;                       // B, Hkv, G, D
  int64_t steady_capacity, store_capacity, retrieved_clusters;  // S, N, R
  Rows query;                                                   // [B, Hkv, G, D]
  Rows steady_keys, steady_values;                              // [B, Hkv, S, D]
  Rows store_keys, store_values;                                // [B, Hkv, N, D]
  // Offloaded; otherwise entries is 0 and table is nullptr.
  Rows page_keys, page_values;  // [B, Hkv, P * page_size, D]
  const int32_t* page_table;    // [B, Hkv, entries]; -1: in the store
  int64_t pages, page_size, entries;
  // [B, Hkv, R, address_columns]: first slot, number of tokens and, offloaded, first entry of the table
  const int64_t* addresses;
  int64_t address_columns;
  const int64_t* counters;    // [B, kCounters]
  const float* estimate;      // [B, Hkv, G, D]
  const float* estimate_lse;  // [B, Hkv, G], natural log; -inf: no estimate
  float scale;
  void* out;   // [B, Hkv, G, D]
  float* lse;  // [B, Hkv, G], natural log
};

inline Call<MergedAttentionParams> merged_attention_call(
    const Tensor& query,
    const Tensor& steady,
    const Tensor& store,
    const Tensor& addresses,
    const Tensor& counters,
    const Tensor& estimate,
    const Tensor& estimate_lse,
    double scale,
    const std::optional<Tensor>& pages = std::nullopt,
    const std::optional<Tensor>& page_table = std::nullopt,
    int64_t page_size = 0) {
  constexpr const char* kOp = "merged_attention";
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
  check(
      pages.has_value() == page_table.has_value(), kOp,
      "pages and page_table must be given together, got ", pages ? "pages" : "page_table", " only");
  const int64_t columns = pages ? 3 : 2;
  check_shape(
      kOp, "addresses", addresses, pages ? "B, Hkv, R, 3" : "B, Hkv, R, 2",
      {batch, heads, kAny, columns});
  check_dtype(kOp, "addresses", addresses, ScalarType::Long);
  check_counters(kOp, counters, batch);
  check_shape(kOp, "estimate", estimate, "B, Hq, D", {batch, query_heads, head_dim});
  check_dtype(kOp, "estimate", estimate, ScalarType::Float);
  check_shape(kOp, "estimate_lse", estimate_lse, "B, Hq", {batch, query_heads});
  check_dtype(kOp, "estimate_lse", estimate_lse, ScalarType::Float);
  if (pages) {
    check(page_size >= 1, kOp, "page_size must be at least 1 token, got ", page_size);
    check_shape(
        kOp, "pages", *pages, "2, B, Hkv, P * page_size, D", {2, batch, heads, kAny, head_dim});
    check_dtype(kOp, "pages", *pages, query.scalar_type());
    check(
        pages->size(3) % page_size == 0, kOp, "pages must hold a multiple of page_size (",
        page_size, ") tokens, got ", pages->size(3));
    check_shape(kOp, "page_table", *page_table, "B, Hkv, N / page_size + C", {batch, heads, kAny});
    check_dtype(kOp, "page_table", *page_table, ScalarType::Int);
    check_device(kOp, "pages", *pages, query, "query");
    check_device(kOp, "page_table", *page_table, query, "query");
  }
  check_device(kOp, "steady", steady, query, "query");
  check_device(kOp, "store", store, query, "query");
  check_device(kOp, "addresses", addresses, query, "query");
  check_device(kOp, "counters", counters, query, "query");
  check_device(kOp, "estimate", estimate, query, "query");
  check_device(kOp, "estimate_lse", estimate_lse, query, "query");

  Call<MergedAttentionParams> call;
  MergedAttentionParams& params = call.params;
  params.dtype = element_dtype(query);
  params.batch = batch;
  params.heads = heads;
  params.groups = query_heads / heads;
  params.head_dim = head_dim;
  params.steady_capacity = steady.size(3);
  params.store_capacity = store.size(3);
  params.retrieved_clusters = addresses.size(2);
  params.query = query_rows(call.hold(readable(query)), params.groups);
  const Tensor readable_steady = call.hold(readable(steady));
  const Tensor readable_store = call.hold(readable(store));
  params.steady_keys = half_of(readable_steady, 0);
  params.steady_values = half_of(readable_steady, 1);
  params.store_keys = half_of(readable_store, 0);
  params.store_values = half_of(readable_store, 1);
  params.page_table = nullptr;
  params.pages = params.page_size = params.entries = 0;
  if (pages) {
    const Tensor readable_pages = call.hold(readable(*pages));
    params.page_keys = half_of(readable_pages, 0);
    params.page_values = half_of(readable_pages, 1);
    params.page_table =
        static_cast<const int32_t*>(call.hold(torch::stable::contiguous(*page_table)).data_ptr());
    params.pages = pages->size(3) / page_size;
    params.page_size = page_size;
    params.entries = page_table->size(2);
  }
  params.address_columns = columns;
  params.addresses =
      static_cast<const int64_t*>(call.hold(torch::stable::contiguous(addresses)).data_ptr());
  params.counters = static_cast<const int64_t*>(counters.data_ptr());
  params.estimate =
      static_cast<const float*>(call.hold(torch::stable::contiguous(estimate)).data_ptr());
  params.estimate_lse =
      static_cast<const float*>(call.hold(torch::stable::contiguous(estimate_lse)).data_ptr());
  params.scale = static_cast<float>(scale);
  params.out = nullptr;
  params.lse = nullptr;
  return call;
}

struct MergedAttentionResults {
  Tensor out;  // [B, Hq, D]
  Tensor lse;  // [B, Hq] float32
};

inline MergedAttentionResults merged_attention_results(
    MergedAttentionParams& params, const Tensor& query) {
  MergedAttentionResults results;
  results.out = torch::stable::new_empty(
      query, {query.size(0), query.size(1), query.size(2)}, query.scalar_type());
  results.lse = torch::stable::new_empty(query, {query.size(0), query.size(1)}, ScalarType::Float);
  params.out = results.out.data_ptr();
  params.lse = static_cast<float*>(results.lse.data_ptr());
  return results;
}

}  // namespace retro
