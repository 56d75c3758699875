#include "cpu_prelude.h"

#define RETRO_ISA portable
#define RETRO_ISA_LEVEL 0
#include "cpu_isa.h"

namespace retro {

const CpuKernels& portable_kernels() {
  static constexpr CpuKernels kernels = portable::table("portable");
  return kernels;
}

}  // namespace retro
