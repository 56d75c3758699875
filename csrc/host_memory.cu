#include "host_memory.h"

#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "worker_api.h"

namespace retro {
namespace {

constexpr const char* kOp = "host_tensor";
// An update takes microseconds for each row and head. A worker that does not come to its end keeps the memory.
constexpr double kDropPatience = 10.0;

void require_cuda(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call of anything would report it again
  fail(op, "CUDA says: ", cudaGetErrorString(error));
}

// Calls that a capture on this thread would forbid, though they have nothing to do with it.
class OutsideCapture {
 public:
  OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideCapture(const OutsideCapture&) = delete;
  OutsideCapture& operator=(const OutsideCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return status != cudaStreamCaptureStatusNone;
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != 0) return nullptr;
  return static_cast<cudaStream_t>(stream);
}

const WorkerApi& worker_api() {
  static const WorkerApi* const api = [] {
    StableIValue stack[1] = {};
    const auto error = torch_call_dispatcher("retro::worker_api", "", stack, TORCH_ABI_VERSION);
    if (error != 0) fail(kOp, "the library of CPU kernels is not loaded");
    return reinterpret_cast<const WorkerApi*>(torch::stable::detail::to<int64_t>(stack[0]));
  }();
  return *api;
}

struct Block {
  int64_t bytes;
  int32_t device;
  std::vector<const void*> histories;  // of the jobs that use it
};

struct LayerJob {
  UpdatePagesParams params;
  void* job;
};

struct Freed {
  void* memory;
  Block block;
};

// All host tensors of the process. Never destroyed: tensors may outlive every destructor.
struct Registry {
  std::mutex mutex;
  std::map<uintptr_t, Block> blocks;               // by address
  std::unordered_map<const void*, LayerJob> jobs;  // by history
  std::vector<Freed> waiting;                      // to be given back when no capture is going on

  // Under the mutex. The block in which `bytes` bytes from `memory` on lie, or nullptr.
  Block* find(const void* memory, int64_t bytes, int32_t device) {
    const auto address = reinterpret_cast<uintptr_t>(memory);
    auto after = blocks.upper_bound(address);
    if (after == blocks.begin()) return nullptr;
    --after;
    const bool inside = address + static_cast<uintptr_t>(bytes) <=
        after->first + static_cast<uintptr_t>(after->second.bytes);
    return inside && after->second.device == device ? &after->second : nullptr;
  }
};

Registry& registry() {
  static auto& all = *new Registry;
  return all;
}

void give_back(const Freed& freed) {
  const OutsideCapture outside;
  int device = 0;
  cudaGetDevice(&device);
  cudaSetDevice(freed.block.device);
  cudaDeviceSynchronize();  // kernels that were launched before may still read it
  // Where the process ends, CUDA may have ended before.
  cudaFreeHost(freed.memory);
  cudaSetDevice(device);
  cudaGetLastError();
}

void give_back_waiting() {
  std::vector<Freed> waiting;
  {
    Registry& all = registry();
    const std::lock_guard<std::mutex> lock(all.mutex);
    waiting.swap(all.waiting);
  }
  for (const Freed& freed : waiting) give_back(freed);
}

// The deleter of a host tensor.
void release(void* memory) {
  Registry& all = registry();
  Freed freed = {memory, {}};
  std::vector<void*> jobs;
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto block = all.blocks.find(reinterpret_cast<uintptr_t>(memory));
    if (block == all.blocks.end()) return;
    freed.block = std::move(block->second);
    all.blocks.erase(block);
    for (const void* history : freed.block.histories) {
      const auto job = all.jobs.find(history);
      if (job == all.jobs.end()) continue;  // another of its tensors went before
      jobs.push_back(job->second.job);
      all.jobs.erase(job);
    }
  }
  for (void* job : jobs) {
    if (worker_api().drop(job, kDropPatience)) continue;
    std::fprintf(
        stderr,
        "retro_ops: an update of the page cache has not ended for %g s; %lld bytes of host memory "
        "are not given back\n",
        kDropPatience, static_cast<long long>(freed.block.bytes));
    return;
  }
  if (is_capturing(current_stream(freed.block.device))) {
    const std::lock_guard<std::mutex> lock(all.mutex);
    all.waiting.push_back(std::move(freed));
    return;
  }
  give_back(freed);
}

Tensor host_tensor(const Tensor& like, std::vector<int64_t> size) {
  give_back_waiting();
  int64_t count = 1;
  std::vector<int64_t> strides(size.size());
  for (size_t axis = size.size(); axis-- > 0;) {
    check(size[axis] >= 0, kOp, "sizes must not be negative, got ", size[axis]);
    strides[axis] = count;
    count *= std::max<int64_t>(size[axis], 1);
  }
  const int64_t bytes = std::max<int64_t>(count * static_cast<int64_t>(like.element_size()), 1);
  const int32_t device = like.get_device_index();
  const Launcher launch(kOp, like);  // makes the device current
  void* memory = nullptr;
  void* seen = nullptr;
  {
    const OutsideCapture outside;
    const cudaError_t error = cudaHostAlloc(
        &memory, static_cast<size_t>(bytes), cudaHostAllocPortable | cudaHostAllocMapped);
    if (error != cudaSuccess) {
      cudaGetLastError();
      fail(
          kOp, "no room for ", bytes,
          " bytes of pinned host memory, CUDA says: ", cudaGetErrorString(error));
    }
    const cudaError_t mapped = cudaHostGetDevicePointer(&seen, memory, 0);
    if (mapped != cudaSuccess || seen != memory) {
      cudaGetLastError();
      cudaFreeHost(memory);
      fail(kOp, "this GPU does not see host memory at the host's addresses");
    }
  }
  {
    Registry& all = registry();
    const std::lock_guard<std::mutex> lock(all.mutex);
    all.blocks[reinterpret_cast<uintptr_t>(memory)] = {bytes, device, {}};
  }
  try {
    return torch::stable::from_blob(
        memory, size, strides, like.device(), like.scalar_type(), &release);
  } catch (...) {
    release(memory);
    throw;
  }
}

int64_t host_bytes(const Tensor& like) {
  give_back_waiting();
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  int64_t bytes = 0;
  for (const auto& [address, block] : all.blocks) {
    if (block.device == like.get_device_index()) bytes += block.bytes;
  }
  return bytes;
}

// A stream beside another one, on which host functions run in their order.
struct SideStream {
  std::mutex mutex;
  cudaStream_t stream = nullptr;
  cudaEvent_t fork = nullptr, join = nullptr;
};

// One for each stream that steps run on: a stream takes part in one capture at a time.
SideStream& side_of(const char* op, int32_t device, cudaStream_t stream) {
  static auto& mutex = *new std::mutex;
  static auto& streams =
      *new std::map<std::pair<int32_t, cudaStream_t>, std::unique_ptr<SideStream>>;
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<SideStream>& side = streams[{device, stream}];
  if (side) return *side;
  const OutsideCapture outside;
  auto made = std::make_unique<SideStream>();
  require_cuda(op, cudaStreamCreateWithFlags(&made->stream, cudaStreamNonBlocking));
  require_cuda(op, cudaEventCreateWithFlags(&made->fork, cudaEventDisableTiming));
  require_cuda(op, cudaEventCreateWithFlags(&made->join, cudaEventDisableTiming));
  side = std::move(made);
  return *side;
}

// What waits for two kinds of work before a kernel that may start before its predecessor has ended.
__global__ void join_kernel() {}

void* job_of(const char* op, int32_t device, const UpdatePagesParams& params) {
  Registry& all = registry();
  const int64_t tasks = params.tasks;
  const struct {
    const char* name;
    const void* memory;
    int64_t bytes;
  } tensors[] = {
      {"requests", params.requests, tasks * (kRequestHeader + params.retrieved_clusters) * 4},
      {"cached", params.cached, tasks * params.clusters},
      {"history", params.history, tasks * (params.clusters + 1) * 16},
      {"decisions", params.decisions, tasks * (kDecisionHeader + params.pages) * 4},
  };
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto known = all.jobs.find(params.history);
  if (known != all.jobs.end()) {
    const UpdatePagesParams& own = known->second.params;
    if (own.policy == params.policy && own.tasks == params.tasks &&
        own.retrieved_clusters == params.retrieved_clusters && own.clusters == params.clusters &&
        own.pages == params.pages && own.requests == params.requests &&
        own.cached == params.cached && own.decisions == params.decisions) {
      return known->second.job;
    }
    // Two jobs at once would both write this history.
    check(
        worker_api().drop(known->second.job, kDropPatience), op,
        "history is being written for another policy or layer");
    all.jobs.erase(known);
  }
  std::vector<Block*> blocks;
  for (const auto& tensor : tensors) {
    if (tensor.bytes == 0) continue;
    Block* block = all.find(tensor.memory, tensor.bytes, device);
    check(
        block != nullptr, op, tensor.name,
        " must be a host tensor, which threads of the host can read; make it with "
        "torch.ops.retro.host_tensor");
    blocks.push_back(block);
  }
  void* job = worker_api().make(params);
  all.jobs[params.history] = {params, job};
  for (Block* block : blocks) block->histories.push_back(params.history);
  return job;
}

std::vector<int64_t> update_counts(const Tensor& history) {
  Registry& all = registry();
  const std::lock_guard<std::mutex> lock(all.mutex);
  int64_t counts[kJobCounts] = {};
  const auto job = all.jobs.find(history.data_ptr());
  if (job != all.jobs.end()) worker_api().count(job->second.job, counts);
  return std::vector<int64_t>(counts, counts + kJobCounts);
}

void update_pages(
    const Tensor& requests,
    const Tensor& cached,
    const Tensor& history,
    const Tensor& decisions,
    std::string policy,
    bool join) {
  constexpr const char* kUpdate = "update_pages";
  const Call<UpdatePagesParams> call = update_pages_call(
      kUpdate, requests, "requests", requests, cached, history, decisions, policy);
  const Launcher launch(kUpdate, requests);
  post_update(kUpdate, launch, call);
  if (join) join_updates(launch);
}

}  // namespace

void post_update(const char* op, const Launcher& launch, const Call<UpdatePagesParams>& call) {
  if (call.params.tasks == 0) return;
  void* job = job_of(op, launch.device(), call.params);
  SideStream& side = side_of(op, launch.device(), launch.stream());
  const std::lock_guard<std::mutex> lock(side.mutex);
  require_cuda(op, cudaEventRecord(side.fork, launch.stream()));
  require_cuda(op, cudaStreamWaitEvent(side.stream, side.fork, 0));
  require_cuda(op, cudaLaunchHostFunc(side.stream, worker_api().post, job));
}

void join_updates(const Launcher& launch) {
  if (!is_capturing(launch.stream())) return;
  SideStream& side = side_of(kOp, launch.device(), launch.stream());
  const std::lock_guard<std::mutex> lock(side.mutex);
  if (!is_capturing(side.stream)) return;
  require_cuda(kOp, cudaEventRecord(side.join, side.stream));
  require_cuda(kOp, cudaStreamWaitEvent(launch.stream(), side.join, 0));
  join_kernel<<<1, 1, 0, launch.stream()>>>();
  require_cuda(kOp, cudaGetLastError());
}

}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CUDA, m) {
  m.impl("host_tensor", TORCH_BOX(&retro::host_tensor));
  m.impl("host_bytes", TORCH_BOX(&retro::host_bytes));
  m.impl("update_pages", TORCH_BOX(&retro::update_pages));
  m.impl("update_counts", TORCH_BOX(&retro::update_counts));
}
