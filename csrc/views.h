// Tensors as the kernels see them: a pointer, strides in elements, and a dtype to dispatch on.
#pragma once

#include <cstdint>

#include "checks.h"

// Small functions that CPU and CUDA kernels share.
#if defined(__CUDACC__)
#define RETRO_HOST_DEVICE __host__ __device__
#else
#define RETRO_HOST_DEVICE
#endif

namespace retro {

enum class DType { float32, bfloat16, float16 };

inline DType element_dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::BFloat16: return DType::bfloat16;
    default: return DType::float16;
  }
}

// 16-bit elements are carried as their bits: arithmetic happens in float32 only.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// Rows of D elements with stride 1, on axes [B, H, T]; element strides of any value.
struct Rows {
  void* data = nullptr;
  int64_t stride_b = 0;
  int64_t stride_h = 0;
  int64_t stride_t = 0;

  template <typename T>
  RETRO_HOST_DEVICE T* row(int64_t b, int64_t h, int64_t t) const {
    return static_cast<T*>(data) + b * stride_b + h * stride_h + t * stride_t;
  }
};

// [B, H, T, D]
inline Rows rows_of(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// [2, B, H, T, D]: keys are half 0, values half 1
inline Rows half_of(const Tensor& tensor, int64_t half) {
  char* data = static_cast<char*>(tensor.data_ptr());
  data += half * tensor.stride(0) * static_cast<int64_t>(tensor.element_size());
  return {data, tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

// [B, Hq, D] as [B, Hkv, G, D]: query heads of one KV head stand together
inline Rows query_rows(const Tensor& query, int64_t groups) {
  return {query.data_ptr(), query.stride(0), query.stride(1) * groups, query.stride(1)};
}

}  // namespace retro
