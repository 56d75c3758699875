#include "cpu_prelude.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define RETRO_ISA avx512
#define RETRO_ISA_LEVEL 2
#include "cpu_isa.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace retro {

const CpuKernels& avx512_kernels() {
  static constexpr CpuKernels kernels = avx512::table("avx512");
  return kernels;
}

}  // namespace retro

#endif
