// Writes clustered tokens into the KV store, cluster after cluster, and describes them in the wave index.
#pragma once

#include "views.h"

namespace retro {

// The wave index and the KV store, as the ops that write them see them.
struct IndexView {
  Rows store_keys, store_values;        // [B, Hkv, N, D]
  Rows centroid_keys, centroid_values;  // [B, Hkv, C, D]: mean key, mean value
  int32_t* offsets;                     // [B, Hkv, C + 1]: first slot of each cluster in the store
  float* variances;         // [B, Hkv, C]: mean squared distance of a key to its centroid
  float* residuals;         // [B, Hkv, D]: squared residuals summed over indexed keys
  int64_t* counters;        // [B, kCounters]
  int64_t heads, clusters;  // Hkv, C
};

struct PackClustersParams {
  DType dtype;
  int64_t batch, heads, tokens, head_dim;
  Rows keys, values;          // [B, Hkv, T, D]
  const int32_t* assignment;  // [B, Hkv, T]; -1: not packed
  int64_t cluster_size;
  const int64_t* packed;  // [B]: tokens to pack of each row
  IndexView index;
};

// Shapes, dtypes and layout of the tensors behind an IndexView.
void check_index(
    const char* op,
    const Tensor& store,
    const Tensor& centroids,
    const Tensor& offsets,
    const Tensor& variances,
    const Tensor& residuals,
    const Tensor& counters,
    int64_t batch,
    int64_t heads,
    int64_t head_dim,
    ScalarType dtype);

// What the counters of a row say of an index for `tokens` tokens and `clusters` clusters.
void check_index_counts(
    const char* op, int64_t row, const int64_t* counters, int64_t tokens, int64_t clusters);

IndexView index_view(
    const Tensor& store,
    const Tensor& centroids,
    const Tensor& offsets,
    const Tensor& variances,
    const Tensor& residuals,
    const Tensor& counters);

}  // namespace retro
