// Spherical k-means of the keys of each segment (RetroInfer, section 4.2).
#pragma once

#include "views.h"

namespace retro {

struct ClusterKeysParams {
  DType dtype;
  int64_t batch, heads, tokens, head_dim;
  Rows keys;             // [B, Hkv, T, D]
  const int64_t* spans;  // [B, 2]: first token to cluster, and the one after the last
  int64_t cluster_size, segment_size, iterations;
  int32_t* assignment;  // [B, Hkv, T]: cluster of each token; -1 outside the span
};

// tokens / size, halves up, at least one; any size, since nothing overflows.
inline int64_t parts(int64_t tokens, int64_t size) {
  const int64_t rest = tokens % size;
  const int64_t count = tokens / size + (rest >= size - rest);
  return count > 0 ? count : 1;
}

// Clusters that `tokens` tokens become: tokens / cluster_size, halves up, at least one.
inline int64_t cluster_count(int64_t tokens, int64_t cluster_size) {
  return tokens > 0 ? parts(tokens, cluster_size) : 0;
}

// Segments that a span of `tokens` tokens is cut into: tokens / segment_size, halves up, at least one.
inline int64_t segment_count(int64_t tokens, int64_t segment_size) {
  return parts(tokens, segment_size);
}

}  // namespace retro
