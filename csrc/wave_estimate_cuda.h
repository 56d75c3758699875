// The CUDA kernels that score clusters and choose among them, for wave_estimate and decode_attention.
#pragma once

#include "attend.h"
#include "wave_estimate.h"

namespace retro {

// What the choice leaves for the kernels behind it.
struct Choice {
  int32_t* retrieved;  // [B, Hkv, R], best first; -1 behind the last; may be nullptr
  int32_t* before;  // [B * Hkv, R + 1], see RetrievedTokens; may be nullptr, then shift is not used
  int32_t* shift;   // [B * Hkv, R]
  int64_t store_capacity;  // N
  int64_t* counters;  // [B, kCounters]: retrieved tokens and steps are counted, where before is set
  int32_t* estimated;         // [B * Hkv, C]
  int32_t* estimated_counts;  // [B * Hkv]
  float* log2_mass;           // [B * Hkv, C, G]
  int32_t* tickets;           // set to 0
  int64_t ticket_count;
};

struct ChoiceSpace {
  int64_t before, shift, estimated, estimated_counts, log2_mass, ranked, sums, keys, order;
};

ChoiceSpace reserve_choice(Workspace& workspace, const WaveEstimateParams& params);

// `choice` has what the caller wants set; the rest becomes memory of the workspace.
void choose(
    const Launcher& launch,
    const WaveEstimateParams& params,
    const Workspace& workspace,
    const ChoiceSpace& space,
    Choice& choice);

// Head sizes and what of attention does not depend on tokens.
AttendParams estimate_params(const WaveEstimateParams& params, const Choice& choice);

}  // namespace retro
