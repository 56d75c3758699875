// What all CUDA sources share: launching, element types, asynchronous copies, matrix instructions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "views.h"

namespace retro {

// RETRO_CUDA_DISPATCH(dtype, function, ...) calls function<T>(...) with T the element type.
#define RETRO_CUDA_DISPATCH(dtype, function, ...)                                 \
  do {                                                                            \
    switch (dtype) {                                                              \
      case ::retro::DType::float32: function<float>(__VA_ARGS__); break;          \
      case ::retro::DType::bfloat16: function<__nv_bfloat16>(__VA_ARGS__); break; \
      case ::retro::DType::float16: function<__half>(__VA_ARGS__); break;         \
    }                                                                             \
  } while (false)

// The device of `tensor` made current, its current stream, and what is known of it.
class Launcher {
 public:
  Launcher(const char* op, const Tensor& tensor)
      : op_(op), guard_(tensor.get_device_index()), device_(tensor.get_device_index()) {
    void* stream = nullptr;
    const auto error = aoti_torch_get_current_cuda_stream(device_, &stream);
    if (error != 0) fail(op_, "no current stream on device ", device_);
    stream_ = static_cast<cudaStream_t>(stream);
    int major = 0;
    require(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_));
    require(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, device_));
    require(
        cudaDeviceGetAttribute(&shared_bytes_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_));
    hopper_ = major >= 9;
  }

  int32_t device() const { return device_; }
  cudaStream_t stream() const { return stream_; }
  int64_t processors() const { return processors_; }
  // Shared memory that a block may have, less what kernels declare themselves.
  int64_t shared_bytes() const { return shared_bytes_ - 1024; }
  // Thread block clusters and programmatic dependent launch.
  bool hopper() const { return hopper_; }

  // The kernel may start before its predecessor in the stream has ended, and must call
  // wait_for_predecessor() before it reads or writes what others use. `cluster`: blocks along x that
  // share memory.
  template <typename... Parameters, typename... Arguments>
  void operator()(
      void (*kernel)(Parameters...),
      dim3 grid,
      int64_t threads,
      int64_t shared_bytes,
      int64_t cluster,
      const Arguments&... arguments) const {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    // 48 KB come without asking, static shared memory included.
    constexpr int64_t kWithoutAsking = 32 * 1024;
    if (shared_bytes > kWithoutAsking) {
      require(cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
    }
    cudaLaunchAttribute attributes[2];
    unsigned count = 0;
    if (hopper_) {
      attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[count++].val.programmaticStreamSerializationAllowed = 1;
      if (cluster > 1) {
        attributes[count].id = cudaLaunchAttributeClusterDimension;
        attributes[count].val.clusterDim.x = static_cast<unsigned>(cluster);
        attributes[count].val.clusterDim.y = 1;
        attributes[count++].val.clusterDim.z = 1;
      }
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream_;
    config.attrs = attributes;
    config.numAttrs = count;
    require(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
    require(cudaGetLastError());
  }

 private:
  void require(cudaError_t error) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // or the next call of anything would report it again
    fail(op_, "CUDA says: ", cudaGetErrorString(error));
  }

  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  int32_t device_;
  cudaStream_t stream_ = nullptr;
  int processors_ = 0;
  int shared_bytes_ = 0;
  bool hopper_ = false;
};

inline dim3 grid_of(int64_t x, int64_t y = 1, int64_t z = 1) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

RETRO_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pieces of one allocation for all that an op needs between its kernels.
class Workspace {
 public:
  static constexpr int64_t kAlignment = 256;

  template <typename T>
  int64_t reserve(int64_t count) {
    const int64_t at = bytes_;
    bytes_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), kAlignment) * kAlignment;
    return at;
  }

  void allocate(const Tensor& like) {
    memory_ = torch::stable::new_empty(like, {std::max<int64_t>(bytes_, 1)}, ScalarType::Byte);
  }

  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(memory_.data_ptr()) + offset);
  }

 private:
  int64_t bytes_ = 0;
  Tensor memory_;
};

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Kernels of one step follow each other closely: each lets its successor start early, and waits here
// until its predecessor's results are there.
__device__ __forceinline__ void wait_for_predecessor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void release_successor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Tensor cores take 16-bit elements; float32 goes other ways.
template <typename T>
inline constexpr bool kMatrix = !std::is_same_v<T, float>;

// Rows move in chunks of 16 bytes.
template <typename T>
inline constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// Two neighbours in one register, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float first, float second) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

template <typename T>
__device__ __forceinline__ float2 unpack_pair(uint32_t bits) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(reinterpret_cast<const __half2&>(bits));
  } else {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(bits));
  }
}

// The elements of a 16-byte chunk as float32.
template <typename T>
__device__ __forceinline__ void unpack_chunk(const uint4& chunk, float (&out)[kChunk<T>]) {
  if constexpr (std::is_same_v<T, float>) {
    out[0] = __uint_as_float(chunk.x);
    out[1] = __uint_as_float(chunk.y);
    out[2] = __uint_as_float(chunk.z);
    out[3] = __uint_as_float(chunk.w);
  } else {
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float2 pair = unpack_pair<T>(words[w]);
      out[2 * w] = pair.x;
      out[2 * w + 1] = pair.y;
    }
  }
}

// sums += a b: a is 16 x 16 by rows, b 16 x 8 by columns, of 16-bit elements; sums float32.
template <typename T>
__device__ __forceinline__ void multiply_tiles(
    float& s0,
    float& s1,
    float& s2,
    float& s3,
    uint32_t a0,
    uint32_t a1,
    uint32_t a2,
    uint32_t a3,
    uint32_t b0,
    uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(s0), "+f"(s1), "+f"(s2), "+f"(s3)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(s0), "+f"(s1), "+f"(s2), "+f"(s3)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// An 8 x 8 matrix of 16-bit elements, a row to four lanes, transposed across the warp.
__device__ __forceinline__ uint32_t transpose_tile(uint32_t row) {
  uint32_t column;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(column) : "r"(row));
  return column;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A copy asks for memory line by line of shared memory: where lines of the two do not coincide, it asks for
// parts of lines, some of them twice, and what is asked for twice crosses the bus to the host twice.
constexpr int kSharedLine = 128;

// 16 bytes to shared memory, asynchronously; zeros where `valid` is false (`source` is not read then).
__device__ __forceinline__ void copy_async(void* target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)),
               "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}

// For what a step reads once: keys, values, mean keys and values. It leaves L2 before anything else does, so
// that masses and ids, which one kernel of a step leaves for the next, are not written back and read again.
// Volatile: held from tile to tile the policy would take registers that large kernels lack.
__device__ __forceinline__ uint64_t once_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// copy_async with a policy for L2.
__device__ __forceinline__ void copy_async_with(
    uint64_t policy, void* target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(
                   shared_address(target)),
               "l"(source), "r"(valid ? 16 : 0), "l"(policy)
               : "memory");
}

// 4 bytes; the same as copy_async.
__device__ __forceinline__ void copy_async_word(void* target, const void* source, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(target)),
               "l"(source), "r"(valid ? 4 : 0)
               : "memory");
}

// Where a chunk of a row of keys lies in a tile: each row in one line or two, so that a copy writes whole
// lines, and neighbouring rows half a line apart, so that lanes 4 r + j, which read chunks j to j + 3 of
// rows r, meet no others in a bank.
template <int kRowChunks>
__device__ __forceinline__ int place_of(int row, int chunk) {
  return row * kRowChunks + (kRowChunks % 8 == 0 ? chunk ^ (row & 1) << 2 : chunk);
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's groups of copies are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Brings memory into L2 ahead of its use.
__device__ __forceinline__ void prefetch_line(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// 2^x to about 2 in the last place; 0 for -inf and where the result would be denormal
__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Logarithm to base 2, of absolute or relative error 2^-22; -inf for 0
__device__ __forceinline__ float log2_of(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace retro
