#include "host_memory.h"

#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

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

// Writes to a byte of every page, on several threads: the system makes pages zero at their first touch, and one thread
// does that at 2 to 5 GB/s.
void touch(char* memory, size_t bytes) {
  constexpr size_t kPiece = size_t{32} << 20;
  constexpr size_t kMostThreads = 16;
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  cpu_set_t mask;
  CPU_ZERO(&mask);
  // Of the process, whatever the thread that happens to call is bound to.
  const bool known = sched_getaffinity(getpid(), sizeof mask, &mask) == 0;
  const size_t processors = known ? static_cast<size_t>(CPU_COUNT(&mask)) : 1;
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t begin; (begin = next.fetch_add(kPiece)) < bytes;) {
      const size_t end = std::min(bytes, begin + kPiece);
      for (size_t at = begin; at < end; at += page) static_cast<volatile char*>(memory)[at] = 0;
    }
  };
  const auto help = [&] {
    if (known) sched_setaffinity(0, sizeof mask, &mask);
    work();
  };
  std::vector<std::thread> others;
  const size_t threads = std::min({kMostThreads, processors, (bytes + kPiece - 1) / kPiece});
  try {
    while (others.size() + 1 < threads) others.emplace_back(help);
  } catch (const std::exception&) {
    // Fewer threads than asked for do the same.
  }
  work();
  for (std::thread& other : others) other.join();
}

// Bytes that the system says it can still give; 0 where it does not say.
size_t available_bytes() {
  size_t kib = 0;
  std::FILE* const file = std::fopen("/proc/meminfo", "r");
  if (file == nullptr) return 0;
  for (char line[256]; kib == 0 && std::fgets(line, sizeof line, file) != nullptr;) {
    std::sscanf(line, "MemAvailable: %zu kB", &kib);
  }
  std::fclose(file);
  return kib << 10;
}

// Memory of the host, zero, that GPUs see at the same address. Unlike that of cudaHostAlloc, which one thread of the
// system clears in pages of 4 KiB (1.6 GB/s; 23 GB/s here), it comes in huge pages, where the system has them, and from
// all processors.
class Pinned {
 public:
  explicit Pinned(size_t bytes) {
    const size_t available = available_bytes();
    if (available != 0 && bytes > available) {
      refuse(bytes, "the system has " + std::to_string(available) + " left");
    }
    const size_t unit = bytes < kHugePage ? static_cast<size_t>(sysconf(_SC_PAGESIZE)) : kHugePage;
    bytes_ = (bytes + unit - 1) / unit * unit;
    mapped_ =
        bytes_ + (unit == kHugePage ? kHugePage : 0);  // so that it can begin with a huge page
    base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) refuse(bytes, "the system gives no more");
    const auto first = reinterpret_cast<uintptr_t>(base_);
    memory_ = reinterpret_cast<void*>((first + unit - 1) / unit * unit);
    // Where the system has no huge pages, small ones do.
    if (unit == kHugePage) madvise(memory_, bytes_, MADV_HUGEPAGE);
    // A fork would have to copy what is pinned, at once.
    madvise(base_, mapped_, MADV_DONTFORK);
    touch(static_cast<char*>(memory_), bytes_);
    const cudaError_t error =
        cudaHostRegister(memory_, bytes_, cudaHostRegisterPortable | cudaHostRegisterMapped);
    if (error != cudaSuccess) {
      cudaGetLastError();
      munmap(base_, mapped_);
      refuse(bytes, std::string("CUDA says: ") + cudaGetErrorString(error));
    }
    void* seen = nullptr;
    if (cudaHostGetDevicePointer(&seen, memory_, 0) != cudaSuccess || seen != memory_) {
      give_back();
      fail(kOp, "this GPU does not see host memory at the host's addresses");
    }
  }

  void* memory() const { return memory_; }

  void give_back() const {
    if (getpid() != process_) return;  // a fork has nothing there, or by now something else
    // Where the process ends, CUDA may have ended before.
    const cudaError_t error = cudaHostUnregister(memory_);
    cudaGetLastError();
    const bool ended = error == cudaErrorCudartUnloading || error == cudaErrorContextIsDestroyed ||
        error == cudaErrorHostMemoryNotRegistered;
    // What CUDA still has pinned must not become other memory.
    if (error == cudaSuccess || ended) munmap(base_, mapped_);
  }

 private:
  static constexpr size_t kHugePage = size_t{2} << 20;

  [[noreturn]] static void refuse(size_t bytes, const std::string& why) {
    fail(kOp, "no room for ", bytes, " bytes of pinned host memory, ", why);
  }

  void* base_ = nullptr;  // what was mapped, with what lies before and behind
  void* memory_ = nullptr;
  size_t mapped_ = 0, bytes_ = 0;
  pid_t process_ = getpid();
};

struct Block {
  Pinned pinned;
  int64_t bytes;
  int32_t device;
  std::vector<const void*> histories;  // of the jobs that use it
};

struct LayerJob {
  UpdatePagesParams params;
  void* job;
};

// All host tensors of the process. Never destroyed: tensors may outlive every destructor.
struct Registry {
  std::mutex mutex;
  std::map<uintptr_t, Block> blocks;               // by address
  std::unordered_map<const void*, LayerJob> jobs;  // by history
  std::vector<Block> waiting;                      // to be given back when no capture is going on

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

void give_back(const Block& block) {
  const OutsideCapture outside;
  int device = 0;
  cudaGetDevice(&device);
  cudaSetDevice(block.device);
  cudaDeviceSynchronize();  // kernels that were launched before may still read it
  block.pinned.give_back();
  cudaSetDevice(device);
  cudaGetLastError();
}

void give_back_waiting() {
  std::vector<Block> waiting;
  {
    Registry& all = registry();
    const std::lock_guard<std::mutex> lock(all.mutex);
    waiting.swap(all.waiting);
  }
  for (const Block& block : waiting) give_back(block);
}

// The deleter of a host tensor.
void release(void* memory) {
  Registry& all = registry();
  std::vector<void*> jobs;
  std::unique_lock<std::mutex> lock(all.mutex);
  const auto found = all.blocks.find(reinterpret_cast<uintptr_t>(memory));
  if (found == all.blocks.end()) return;
  Block block = std::move(found->second);
  all.blocks.erase(found);
  for (const void* history : block.histories) {
    const auto job = all.jobs.find(history);
    if (job == all.jobs.end()) continue;  // another of its tensors went before
    jobs.push_back(job->second.job);
    all.jobs.erase(job);
  }
  lock.unlock();
  for (void* job : jobs) {
    if (worker_api().drop(job, kDropPatience)) continue;
    std::fprintf(
        stderr,
        "retro_ops: an update of the page cache has not ended for %g s; %lld bytes of host memory "
        "are not given back\n",
        kDropPatience, static_cast<long long>(block.bytes));
    return;
  }
  if (is_capturing(current_stream(block.device))) {
    lock.lock();
    all.waiting.push_back(std::move(block));
    return;
  }
  give_back(block);
}

Tensor host_tensor(const Tensor& like, std::vector<int64_t> size) {
  give_back_waiting();
  int64_t count = 1;
  std::vector<int64_t> strides(size.size());
  for (size_t axis = size.size(); axis-- > 0;) {
    check(size[axis] >= 0, kOp, "sizes must not be negative, got ", size[axis]);
    strides[axis] = count;
    check(
        !__builtin_mul_overflow(count, std::max<int64_t>(size[axis], 1), &count) &&
            count < int64_t{1} << 56,
        kOp, "no memory has room for sizes like these, got ", size[axis], " on axis ", axis);
  }
  const int64_t bytes = count * static_cast<int64_t>(like.element_size());
  const int32_t device = like.get_device_index();
  const Launcher launch(kOp, like);  // makes the device current
  const Pinned pinned = [&] {
    const OutsideCapture outside;
    return Pinned(static_cast<size_t>(bytes));
  }();
  void* const memory = pinned.memory();
  {
    Registry& all = registry();
    const std::lock_guard<std::mutex> lock(all.mutex);
    all.blocks.emplace(reinterpret_cast<uintptr_t>(memory), Block{pinned, bytes, device, {}});
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
