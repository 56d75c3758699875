// What the CPU kernels need, included before a file selects its instruction set: templates and inline
// functions of these headers must not be compiled for instructions that the machine may not have.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <torch/headeronly/util/Half.h>

#include "cpu_kernels.h"
#include "scratch.h"

#define RETRO_DISPATCH(dtype, function, ...)                      \
  switch (dtype) {                                                \
    case DType::float32: return function<float>(__VA_ARGS__);     \
    case DType::bfloat16: return function<bfloat16>(__VA_ARGS__); \
    case DType::float16: return function<float16>(__VA_ARGS__);   \
  }
