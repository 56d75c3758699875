#include "merged_attention.h"

#include <tuple>

#include "cpu_kernels.h"
#include "cpu_ops.h"

namespace retro {
namespace {

constexpr const char* kOp = "merged_attention";

}  // namespace

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
  const MergedAttentionResults results = merged_attention_results(params, query);
  const int64_t batch = params.batch, heads = params.heads;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t tokens = params.counters[b * kCounters + kSteadyTokens];
    check_count(kOp, b, tokens, "steady tokens", "the steady zone", params.steady_capacity);
  }
  for (int64_t i = 0; i < batch * heads * params.retrieved_clusters; ++i) {
    const int64_t* address = params.addresses + i * params.address_columns;
    const int64_t first = address[0], tokens = address[1];
    check(
        first >= 0 && tokens >= 0 && first <= params.store_capacity &&
            tokens <= params.store_capacity - first,  // their sum could overflow
        kOp, "addresses must lie in a store of ", params.store_capacity, " tokens, got ", tokens,
        " tokens from slot ", first);
    if (params.page_size == 0) continue;
    const int64_t entry = address[2], count = page_count(tokens, params.page_size);
    check(
        entry >= 0 && entry <= params.entries && count <= params.entries - entry, kOp,
        "addresses must lie in a page_table of ", params.entries, " entries, got ", count,
        " entries from ", entry);
    const int32_t* table = params.page_table + i / params.retrieved_clusters * params.entries;
    for (int64_t e = entry; e < entry + count; ++e) {
      check(
          table[e] >= -1 && table[e] < params.pages, kOp, "page_table must lie in -1 .. ",
          params.pages - 1, ", got ", table[e]);
    }
  }
  cpu_kernels().merged_attention(params);
  return {results.out, results.lse};
}

}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CPU, m) {
  m.impl("merged_attention", TORCH_BOX(&retro::merged_attention));
}
