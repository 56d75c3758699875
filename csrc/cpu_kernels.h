// The CPU kernels, one table per instruction set; cpu_kernels() picks the best this machine runs.
#pragma once

#include "append_tokens.h"
#include "cluster_gather.h"
#include "cluster_keys.h"
#include "grow_index.h"
#include "merged_attention.h"
#include "pack_clusters.h"
#include "wave_estimate.h"

namespace retro {

struct CpuKernels {
  const char* instruction_set;
  void (*cluster_keys)(const ClusterKeysParams&);
  void (*pack_clusters)(const PackClustersParams&);
  void (*grow_index)(const GrowIndexParams&);
  void (*wave_estimate)(const WaveEstimateParams&);
  void (*merged_attention)(const MergedAttentionParams&);
};

const CpuKernels& portable_kernels();
#if defined(__x86_64__)
const CpuKernels& avx2_kernels();
const CpuKernels& avx512_kernels();
const CpuKernels& avx512bf16_kernels();
#endif

const CpuKernels& cpu_kernels();

}  // namespace retro
