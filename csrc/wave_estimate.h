// Scores all clusters of the wave index, chooses those to retrieve, and estimates the next ones from
// their centroids (RetroInfer, sections 4.1 and 4.2).
#pragma once

#include "views.h"

namespace retro {

struct WaveEstimateParams {
  DType dtype;
  int64_t batch, heads, groups, head_dim, clusters;  // B, Hkv, G, D, C
  Rows query;                                        // [B, Hkv, G, D]
  Rows centroid_keys, centroid_values;               // [B, Hkv, C, D]
  const int32_t* offsets;                            // [B, Hkv, C + 1]
  const float* variances;                            // [B, Hkv, C]
  const float* residuals;                            // [B, Hkv, D]
  const int64_t* counters;                           // [B, kCounters]
  int64_t max_retrieved, min_retrieved_clusters;
  double retrieval_budget, estimation_budget;
  bool use_variance;
  float scale;
  int32_t* retrieved;   // [B, Hkv, R], best first; -1 behind the last
  float* estimate;      // [B, Hkv, G, D]
  float* estimate_lse;  // [B, Hkv, G], natural log
};

// A fraction of `clusters`, rounded half to even as Python's round().
inline int64_t budget_count(double budget, int64_t clusters) {
  return static_cast<int64_t>(__builtin_nearbyint(budget * static_cast<double>(clusters)));
}

inline int64_t retrieved_count(double budget, int64_t floor, int64_t clusters) {
  const int64_t count = budget_count(budget, clusters);
  const int64_t floored = count > floor ? count : floor;
  return floored < clusters ? floored : clusters;
}

}  // namespace retro
