// The CUDA kernel behind merged_attention, decode_attention and the estimate of wave_estimate: softmax
// states of pieces of the working set, merged in fixed order.
#pragma once

#include "cuda_common.h"

namespace retro {

// Where the retrieved tokens lie: token u of a (row, head), counted over its clusters in rank order, is
// in rank k with before[k] <= u < before[k + 1], at slot shift[k] + u.
struct RetrievedTokens {
  const int32_t* before;  // [B * Hkv, R + 1]
  const int32_t* shift;   // [B * Hkv, R]
  int64_t clusters;       // R
};

// Offloaded, a page of retrieved tokens may lie in the page cache: token j of the cluster of rank k is on
// page sources[first[k] + j / page_size]. -1: it is read from the store; so is it for -2 - p, and is
// then written to page p, if `fills` is set, for the steps to come: it is the only one that does.
struct RetrievedPages {
  const int32_t* sources;  // [B * Hkv, stride]; nullptr: all tokens are in the store
  const int32_t* first;    // [B * Hkv, R]
  int64_t stride;
  Rows keys, values;  // [B, Hkv, pages * page_size, D]
  int64_t pages, page_size;
  bool fills;
};

// Slots of store and page cache share one number in the kernel.
inline constexpr int64_t kMostSlots = int64_t{1} << 30;

// Clusters that are estimated, in ascending order, and the masses of all.
struct EstimatedClusters {
  const int32_t* ids;      // [B * Hkv, C]
  const int32_t* counts;   // [B * Hkv]
  const float* log2_mass;  // [B * Hkv, C, G]
  const uint32_t*
      tail;  // [B * Hkv, C / 32 rounded up], see Choice; nullptr: the estimate has no tail
  const float* value_sums;  // [B, Hkv, D], over all indexed tokens
  Rows centroid_values;     // [B, Hkv, C, D]
  int64_t clusters;         // C
};

struct AttendParams {
  DType dtype;
  int64_t batch, heads, groups, head_dim;  // B, Hkv, G, D
  int64_t steady_capacity;                 // S
  Rows query;                              // [B, Hkv, G, D]
  Rows steady_keys, steady_values;         // [B, Hkv, S, D]
  Rows store_keys, store_values;           // [B, Hkv, N, D]
  const int64_t* counters;                 // [B, kCounters]
  RetrievedTokens retrieved;
  RetrievedPages pages;
  EstimatedClusters estimated;
  // A (row, head) is shared out among `pieces` blocks, and its tokens and its clusters among so many warps
  // of each; see plan_attend.
  int32_t pieces, exact_warps, estimate_warps;
  const float* given_estimate;      // [B, Hkv, G, D], where estimate_warps is 0; or nullptr
  const float* given_estimate_lse;  // [B, Hkv, G]
  float scale;
  // Between blocks; a part is what the tokens, or the clusters, of a piece come to.
  float* values;     // [B * Hkv * query tiles, pieces, parts, queries of a tile, D]
  float2* sums;      // [.., pieces, parts, queries of a tile]: largest logit (base 2), mass
  int32_t* tickets;  // [B * Hkv * query tiles], 0
  // Results: of everything, or, where out is nullptr, of the estimated clusters.
  void* out;            // [B, Hkv, G, D]
  float* lse;           // [B, Hkv, G], natural log; may be nullptr
  float* estimate;      // [B, Hkv, G, D]
  float* estimate_lse;  // [B, Hkv, G]
};

// Sets how the work is shared out, by what keeps the device busy. Who has only tokens or only clusters then
// sets the warps of the other to 0: shares depend on sizes alone, so that all ops give the same bits.
void plan_attend(const Launcher& launch, AttendParams& params);

// Queries that one block reads the working set for; more would not fit the registers.
inline int64_t query_tile(int64_t groups, int64_t head_dim) {
  return groups <= 8 || head_dim > 128 ? 8 : 16;
}

struct AttendSpace {
  int64_t values, sums, tickets;
};

AttendSpace reserve_attend(Workspace& workspace, const AttendParams& params);
void use_attend(const AttendSpace& space, const Workspace& workspace, AttendParams& params);

// Tickets must be 0 by then.
void attend(const Launcher& launch, const AttendParams& params);

inline int64_t ticket_count(const AttendParams& params) {
  return params.batch * params.heads *
      ceil_div(params.groups, query_tile(params.groups, params.head_dim));
}

}  // namespace retro
