// Argument checks. Every message names the op, the argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "counters.h"

namespace retro {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <typename... Parts>
void check(bool ok, const char* op, const Parts&... parts) {
  if (!ok) fail(op, parts...);
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Short: return "torch.int16";
    case ScalarType::Char: return "torch.int8";
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Bool: return "torch.bool";
    case ScalarType::ComplexFloat: return "torch.complex64";
    case ScalarType::ComplexDouble: return "torch.complex128";
    default: return "another dtype";
  }
}

inline constexpr int64_t kAny = -1;

// `letters` names the axes, e.g. "B, Hkv, T, D"; kAny in `expected` accepts any size.
inline void check_shape(
    const char* op,
    const char* name,
    const Tensor& tensor,
    const char* letters,
    std::initializer_list<int64_t> expected) {
  bool ok = tensor.dim() == static_cast<int64_t>(expected.size());
  int64_t axis = 0;
  for (int64_t size : expected) {
    if (!ok) break;
    ok = size == kAny || tensor.size(axis) == size;
    ++axis;
  }
  if (ok) return;
  std::ostringstream want, got;
  for (auto size = expected.begin(); size != expected.end(); ++size) {
    if (size != expected.begin()) want << ", ";
    if (*size == kAny) want << "any";
    else want << *size;
  }
  for (int64_t i = 0; i < tensor.dim(); ++i) got << (i ? ", " : "") << tensor.size(i);
  fail(op, name, " must be [", letters, "] = [", want.str(), "], got [", got.str(), "]");
}

inline void check_dtype(
    const char* op, const char* name, const Tensor& tensor, ScalarType expected) {
  check(
      tensor.scalar_type() == expected, op, name, " must be ", dtype_name(expected), ", got ",
      dtype_name(tensor.scalar_type()));
}

// The element type of queries, keys and values.
inline void check_element_dtype(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  check(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
      name, " must be torch.float32, torch.bfloat16 or torch.float16, got ", dtype_name(type));
}

inline constexpr int64_t kMaxHeadDim = 256;

inline void check_head_dim(const char* op, int64_t head_dim) {
  check(
      head_dim >= 16 && head_dim <= kMaxHeadDim && head_dim % 16 == 0, op,
      "head_dim must be a multiple of 16 from 16 to 256, got ", head_dim);
}

// CUDA kernels move 16 bytes at once, so every row must start at a multiple of that.
inline bool has_vector_rows(const Tensor& tensor) {
  constexpr int64_t kVectorBytes = 16;
  if (reinterpret_cast<uintptr_t>(tensor.data_ptr()) % kVectorBytes != 0) return false;
  const int64_t element_bytes = static_cast<int64_t>(tensor.element_size());
  for (int64_t axis = 0; axis + 1 < tensor.dim(); ++axis) {
    if (tensor.size(axis) > 1 && tensor.stride(axis) * element_bytes % kVectorBytes != 0)
      return false;
  }
  return true;
}

// Kernels read whole rows; every other axis may have any stride.
inline void check_rows(const char* op, const char* name, const Tensor& tensor) {
  check(
      tensor.numel() == 0 || tensor.stride(tensor.dim() - 1) == 1, op, name,
      " must have stride 1 on its last axis, since it is changed in place, got ",
      tensor.stride(tensor.dim() - 1));
  check(
      tensor.numel() == 0 || tensor.is_cpu() || has_vector_rows(tensor), op, name,
      " must have rows that start at multiples of 16 bytes, since it is changed in place");
}

inline std::string device_name(const Tensor& tensor) {
  const auto device = tensor.device();
  if (!device.is_cuda()) return "cpu";
  return "cuda:" + std::to_string(device.index());
}

inline void check_device(
    const char* op,
    const char* name,
    const Tensor& tensor,
    const Tensor& like,
    const char* like_name) {
  check(
      tensor.device() == like.device(), op, name, " must be on ", device_name(like), " like ",
      like_name, ", got ", device_name(tensor));
}

inline void check_contiguous(const char* op, const char* name, const Tensor& tensor) {
  if (tensor.is_contiguous()) return;
  std::ostringstream strides;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    strides << (axis ? ", " : "") << tensor.stride(axis);
  }
  fail(op, name, " must be contiguous, got strides [", strides.str(), "]");
}

inline void check_counters(const char* op, const Tensor& counters, int64_t rows) {
  check_shape(op, "counters", counters, "B, columns", {rows, kCounters});
  check_dtype(op, "counters", counters, ScalarType::Long);
  check_contiguous(op, "counters", counters);
}

// Kernels trust the counters: they read and write as far as these say.
inline void check_count(
    const char* op,
    int64_t row,
    int64_t count,
    const char* things,
    const char* holder,
    int64_t capacity) {
  check(
      count >= 0 && count <= capacity, op, "counters say that row ", row, " has ", count, " ",
      things, ", ", holder, " holds ", capacity);
}

// An input whose rows can be read in place, or a copy of it.
inline Tensor readable(const Tensor& tensor) {
  if (tensor.numel() == 0) return tensor;
  const bool rows = tensor.stride(tensor.dim() - 1) == 1;
  if (rows && (tensor.is_cpu() || has_vector_rows(tensor))) return tensor;
  const Tensor copy = torch::stable::contiguous(tensor);
  if (copy.is_cpu() || has_vector_rows(copy)) return copy;
  return torch::stable::clone(copy);
}

// What an op hands to its kernels, and the tensors that must live until they have been launched.
template <typename Params>
struct Call {
  Params params;
  std::vector<Tensor> held;

  const Tensor& hold(Tensor tensor) {
    held.push_back(std::move(tensor));
    return held.back();
  }
};

}  // namespace retro
