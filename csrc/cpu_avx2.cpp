#include "cpu_prelude.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define RETRO_ISA avx2
#define RETRO_ISA_LEVEL 1
#include "cpu_isa.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace retro {

const CpuKernels& avx2_kernels() {
  static constexpr CpuKernels kernels = avx2::table("avx2");
  return kernels;
}

}  // namespace retro

#endif
