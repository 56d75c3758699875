// The CUDA kernels that score clusters and choose among them, for wave_estimate and decode_attention.
#pragma once

#include "attend.h"
#include "select_clusters.h"
#include "wave_estimate.h"

namespace retro {

struct ChoiceSpace {
  int64_t before, shift, estimated, estimated_counts, log2_mass, tail, ranked, sums;
  SelectSpace select;
};

ChoiceSpace reserve_choice(
    const Launcher& launch, Workspace& workspace, const WaveEstimateParams& params);

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
