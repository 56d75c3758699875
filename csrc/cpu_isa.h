// All CPU kernels for one instruction set; no include guard, since each cpu_<isa>.cpp includes it once.
// RETRO_ISA names the namespace; RETRO_ISA_LEVEL is 0 (portable), 1 (AVX2), 2 (AVX-512)
// or 3 (AVX-512 with BF16 dot products).

namespace retro {
namespace RETRO_ISA {
namespace {

#include "simd.h"
#include "softmax_state.h"

#include "cluster_keys_cpu.h"
#include "pack_clusters_cpu.h"
#include "grow_index_cpu.h"
#include "merged_attention_cpu.h"
#include "wave_estimate_cpu.h"

}  // namespace

constexpr CpuKernels table(const char* instruction_set) {
  return {instruction_set, cluster_keys,  pack_clusters,
          grow_index,      wave_estimate, merged_attention};
}

}  // namespace RETRO_ISA
}  // namespace retro
