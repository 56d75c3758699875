// Tokens that have gathered in the steady zone become clusters of the index (RetroInfer, section 4.2).
#pragma once

#include "pack_clusters.h"

namespace retro {

struct GrowIndexParams {
  DType dtype;
  int64_t batch, heads, head_dim;
  Rows steady_keys, steady_values;  // [B, Hkv, S, D]
  int64_t sink_tokens, local_tokens, update_segment, cluster_size, iterations;
  IndexView index;
};

}  // namespace retro
