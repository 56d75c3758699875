// The CUDA kernel that chooses clusters by their scores, for wave_estimate and decode_attention.
#pragma once

#include "cuda_common.h"

namespace retro {

// What the choice leaves for the kernels behind it.
struct Choice {
  int32_t* retrieved;  // [B, Hkv, R], best first; -1 behind the last; may be nullptr
  int32_t* before;  // [B * Hkv, R + 1], see RetrievedTokens; may be nullptr, then shift is not used
  int32_t* shift;   // [B * Hkv, R]
  int64_t store_capacity;  // N
  int64_t* counters;  // [B, kCounters]: retrieved tokens and steps are counted, where before is set
  int32_t* estimated;         // [B * Hkv, C], ascending
  int32_t* estimated_counts;  // [B * Hkv]
  float* log2_mass;           // [B * Hkv, C, G]
  uint32_t*
      tail;  // [B * Hkv, C / 32 rounded up]: bits of the live clusters that are neither; or nullptr
  int32_t* tickets;  // set to 0
  int64_t ticket_count;
};

struct SelectParams {
  int64_t batch, heads, groups, clusters, score_blocks;
  const int32_t* offsets;  // [B, Hkv, C + 1]
  const float* ranked;     // [B * Hkv, C, G]: logits (base 2); -inf: no tokens, or not live
  const float2* sums;      // [B * Hkv, blocks, G]: their largest, and their sum relative to it
  int64_t max_retrieved, min_retrieved_clusters;
  double retrieval_budget, estimation_budget;
  Choice choice;
  uint32_t* keys;   // where sort keys do not fit into shared memory
  uint64_t* order;  // [B * Hkv, order_capacity]: retrieved clusters, where they do not
  int64_t order_capacity;
};

struct SelectSpace {
  int64_t keys, order;
};

// Reads sizes and budgets only.
SelectSpace reserve_select(
    const Launcher& launch, Workspace& workspace, const SelectParams& params);

void select_clusters(
    const Launcher& launch,
    const Workspace& workspace,
    const SelectSpace& space,
    SelectParams& params);

}  // namespace retro
