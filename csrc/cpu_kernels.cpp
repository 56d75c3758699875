#include "cpu_kernels.h"

#include <atomic>
#include <string>

namespace retro {
namespace {

constexpr const char* kOp = "cpu_kernels";

bool runs_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

bool runs_avx512bf16() {
#if defined(__x86_64__)
  return runs_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool runs_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

const CpuKernels& best_kernels() {
#if defined(__x86_64__)
  if (runs_avx512bf16()) return avx512bf16_kernels();
  if (runs_avx512()) return avx512_kernels();
  if (runs_avx2()) return avx2_kernels();
#endif
  return portable_kernels();
}

std::atomic<const CpuKernels*>& selected() {
  static std::atomic<const CpuKernels*> kernels{&best_kernels()};
  return kernels;
}

std::string select_kernels(std::string name) {
  if (name == "portable") {
    selected() = &portable_kernels();
#if defined(__x86_64__)
  } else if (name == "avx2" && runs_avx2()) {
    selected() = &avx2_kernels();
  } else if (name == "avx512bf16" && runs_avx512bf16()) {
    selected() = &avx512bf16_kernels();
  } else if (name == "avx512" && runs_avx512()) {
    selected() = &avx512_kernels();
#endif
  } else if (!name.empty()) {
    fail(kOp, "this machine has no kernels named '", name, "'");
  }
  return cpu_kernels().instruction_set;
}

}  // namespace

const CpuKernels& cpu_kernels() { return *selected().load(std::memory_order_relaxed); }

}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CompositeExplicitAutograd, m) {
  m.impl("cpu_kernels", TORCH_BOX(&retro::select_kernels));
}
