// Where the tokens of the retrieved clusters lie.
#pragma once

#include "views.h"

namespace retro {

struct ClusterGatherParams {
  int64_t batch, heads, retrieved_clusters, clusters;  // B, Hkv, R, C
  const int32_t* retrieved;                            // [B, Hkv, R]; -1: none
  const int32_t* offsets;                              // [B, Hkv, C + 1]
  int64_t* addresses;  // [B, Hkv, R, 2]: first slot, number of tokens
  int64_t* counters;   // [B, kCounters]
};

}  // namespace retro
