// Exact attention to the steady zone and the retrieved clusters, read in place, merged with the estimate
// of the others by log-sum-exp (RetroInfer, section 4.1).
#pragma once

#include "views.h"

namespace retro {

struct MergedAttentionParams {
  DType dtype;
  int64_t batch, heads, groups, head_dim;                       // B, Hkv, G, D
  int64_t steady_capacity, store_capacity, retrieved_clusters;  // S, N, R
  Rows query;                                                   // [B, Hkv, G, D]
  Rows steady_keys, steady_values;                              // [B, Hkv, S, D]
  Rows store_keys, store_values;                                // [B, Hkv, N, D]
  const int64_t* addresses;   // [B, Hkv, R, 2]: first slot, number of tokens
  const int64_t* counters;    // [B, kCounters]
  const float* estimate;      // [B, Hkv, G, D]
  const float* estimate_lse;  // [B, Hkv, G], natural log; -inf: no estimate
  float scale;
  void* out;   // [B, Hkv, G, D]
  float* lse;  // [B, Hkv, G], natural log
};

}  // namespace retro
