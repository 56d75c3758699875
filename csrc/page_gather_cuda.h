// The CUDA kernel that looks retrieved clusters up in the page cache, for page_gather and
// offloaded_attention.
#pragma once

#include "cuda_common.h"
#include "page_gather.h"

namespace retro {

// A page that comes in: its tokens in the store, and where they go.
struct alignas(16) FreshPage {
  int32_t slot, tokens, page, unused;
};

struct PageLookupParams {
  // Where addresses is nullptr, the kernel before has counted retrieved tokens and steps.
  PageGatherParams op;
  // The kernel before is one of the same op, and only the host writes the decisions: they need not wait
  // for it.
  bool early_decisions;
  // For attention, which copies what comes in on its way; see RetrievedPages. Or nullptr.
  int32_t* first;    // [B * Hkv, R]
  int32_t* sources;  // [B * Hkv, source_capacity]
  int64_t source_capacity;
  // For a kernel that copies it. Or nullptr.
  FreshPage* fresh;      // [B * Hkv, P]
  int32_t* fresh_count;  // [B * Hkv]
};

// Pages of the retrieved clusters of a (row, head): ceil(n / S) <= n / S + 1 for each.
inline int64_t source_capacity(const PageGatherParams& params) {
  return params.store_tokens / params.page_size + params.retrieved_clusters;
}

void check_lookup(const char* op, const Launcher& launch, const PageGatherParams& params);

// All of page_gather but the copies.
void look_up_pages(const Launcher& launch, const PageLookupParams& params);

}  // namespace retro
