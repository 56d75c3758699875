// Looks the retrieved clusters up in the page cache, and brings in those that it has room for.
//
// All that a (row, head) needs is its own, and each part is a sum over what comes before: missing pages of
// better ranks, pages freed by earlier decisions. So the order of threads decides nothing, on any device.
#pragma once

#include "page_cache.h"

namespace retro {

struct PageGatherParams {
  DType dtype;
  int64_t batch, heads, head_dim, page_size;                           // B, Hkv, D, S
  int64_t retrieved_clusters, clusters, store_tokens, pages, entries;  // R, C, N, P, N / S + C
  const int32_t* retrieved;                                            // [B, Hkv, R]; -1: none
  const int32_t* offsets;                                              // [B, Hkv, C + 1]
  Rows store_keys, store_values;                                       // [B, Hkv, N, D]
  Rows page_keys, page_values;                                         // [B, Hkv, P * S, D]
  int32_t* page_table;                                                 // [B, Hkv, N / S + C]
  int32_t* free_pages;                                                 // [B, Hkv, kFreeHeader + P]
  const int32_t* decisions;  // [B, Hkv, kDecisionHeader + P]
  int32_t* requests;         // [B, Hkv, kRequestHeader + R]
  uint8_t* cached;           // [B, Hkv, C]
  int64_t* counters;         // [B, kCounters]
  int64_t* addresses;        // [B, Hkv, R, 3]: first slot, number of tokens, first page table entry

  // Slots of the store before the clusters that grow_index will make anew. Those never come into the
  // cache, so that nothing has to leave it when they change.
  RETRO_HOST_DEVICE int64_t lasting_slots(int64_t b) const {
    const int64_t* row = counters + b * kCounters;
    return row[kOpenTokens] > 0 ? row[kIndexedTokens] - row[kOpenTokens] : store_tokens;
  }
};

// Tensors must be on the device of `like`, an argument of `op`. `addresses` is made, if it is wanted.
inline Call<PageGatherParams> page_gather_call(
    const char* op,
    const Tensor& like,
    const char* like_name,
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
    int64_t page_size,
    Tensor* addresses) {
  check_shape(op, "retrieved", retrieved, "B, Hkv, R", {kAny, kAny, kAny});
  check_dtype(op, "retrieved", retrieved, ScalarType::Int);
  const int64_t batch = retrieved.size(0), heads = retrieved.size(1);
  const int64_t ranks = retrieved.size(2);
  check_shape(op, "offsets", offsets, "B, Hkv, C + 1", {batch, heads, kAny});
  check_dtype(op, "offsets", offsets, ScalarType::Int);
  check(offsets.size(2) >= 1, op, "offsets must hold C + 1 >= 1 entries, got 0");
  const int64_t clusters = offsets.size(2) - 1;
  check_shape(op, "store", store, "2, B, Hkv, N, D", {2, batch, heads, kAny, kAny});
  check_element_dtype(op, "store", store);
  const int64_t head_dim = store.size(4);
  check_head_dim(op, head_dim);
  check(page_size >= 1, op, "page_size must be at least 1 token, got ", page_size);
  check_shape(op, "pages", pages, "2, B, Hkv, P * page_size, D", {2, batch, heads, kAny, head_dim});
  check_dtype(op, "pages", pages, store.scalar_type());
  check_rows(op, "pages", pages);
  check(
      pages.size(3) % page_size == 0, op, "pages must hold a multiple of page_size (", page_size,
      ") tokens, got ", pages.size(3));
  const int64_t count = pages.size(3) / page_size, entries = store.size(3) / page_size + clusters;
  check_shape(op, "page_table", page_table, "B, Hkv, N / page_size + C", {batch, heads, entries});
  check_dtype(op, "page_table", page_table, ScalarType::Int);
  check_contiguous(op, "page_table", page_table);
  check_shape(op, "free_pages", free_pages, "B, Hkv, 2 + P", {batch, heads, kFreeHeader + count});
  check_dtype(op, "free_pages", free_pages, ScalarType::Int);
  check_contiguous(op, "free_pages", free_pages);
  check_shape(op, "decisions", decisions, "B, Hkv, 2 + P", {batch, heads, kDecisionHeader + count});
  check_dtype(op, "decisions", decisions, ScalarType::Int);
  check_contiguous(op, "decisions", decisions);
  check_shape(op, "requests", requests, "B, Hkv, 3 + R", {batch, heads, kRequestHeader + ranks});
  check_dtype(op, "requests", requests, ScalarType::Int);
  check_contiguous(op, "requests", requests);
  check_shape(op, "cached", cached, "B, Hkv, C", {batch, heads, clusters});
  check_dtype(op, "cached", cached, ScalarType::Byte);
  check_contiguous(op, "cached", cached);
  check_counters(op, counters, batch);
  check_device(op, "offsets", offsets, like, like_name);
  check_device(op, "store", store, like, like_name);
  check_device(op, "pages", pages, like, like_name);
  check_device(op, "page_table", page_table, like, like_name);
  check_device(op, "free_pages", free_pages, like, like_name);
  check_device(op, "decisions", decisions, like, like_name);
  check_device(op, "requests", requests, like, like_name);
  check_device(op, "cached", cached, like, like_name);
  check_device(op, "counters", counters, like, like_name);

  Call<PageGatherParams> call;
  PageGatherParams& params = call.params;
  params.dtype = element_dtype(store);
  params.batch = batch;
  params.heads = heads;
  params.head_dim = head_dim;
  params.page_size = page_size;
  params.retrieved_clusters = ranks;
  params.clusters = clusters;
  params.store_tokens = store.size(3);
  params.pages = count;
  params.entries = entries;
  params.retrieved =
      static_cast<const int32_t*>(call.hold(torch::stable::contiguous(retrieved)).data_ptr());
  params.offsets =
      static_cast<const int32_t*>(call.hold(torch::stable::contiguous(offsets)).data_ptr());
  const Tensor readable_store = call.hold(readable(store));
  params.store_keys = half_of(readable_store, 0);
  params.store_values = half_of(readable_store, 1);
  params.page_keys = half_of(pages, 0);
  params.page_values = half_of(pages, 1);
  params.page_table = static_cast<int32_t*>(page_table.data_ptr());
  params.free_pages = static_cast<int32_t*>(free_pages.data_ptr());
  params.decisions = static_cast<const int32_t*>(decisions.data_ptr());
  params.requests = static_cast<int32_t*>(requests.data_ptr());
  params.cached = static_cast<uint8_t*>(cached.data_ptr());
  params.counters = static_cast<int64_t*>(counters.data_ptr());
  params.addresses = nullptr;
  if (addresses != nullptr) {
    *addresses = torch::stable::new_empty(retrieved, {batch, heads, ranks, 3}, ScalarType::Long);
    params.addresses = static_cast<int64_t*>(addresses->data_ptr());
  }
  return call;
}

}  // namespace retro
