#include "update_pages.h"

#include <pthread.h>

#include <chrono>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "cpu_ops.h"
#include "worker_api.h"
#include "worker_pool.h"

namespace retro {
namespace {

constexpr const char* kOp = "update_pages";

}  // namespace

void update_pages(
    const Tensor& requests,
    const Tensor& cached,
    const Tensor& history,
    const Tensor& decisions,
    std::string policy,
    bool join) {
  (void)join;  // it has ended when the op returns
  const Call<UpdatePagesParams> call =
      update_pages_call(kOp, requests, "requests", requests, cached, history, decisions, policy);
  torch::stable::parallel_for(0, call.params.tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) update_pages_head(call.params, task);
  });
}

namespace {

// What a layer posts. Its call holds the layer's tensors, so no other layer gets their memory meanwhile.
struct LayerJob {
  Policy policy;
  std::shared_ptr<Job> job;

  // Nobody else holds the job, so no thread runs it or is about to let go of it.
  bool idle() const { return job.use_count() == 1; }
};

// The job of one layer: two of them at once would both write its history.
std::shared_ptr<Job> job_of(
    const Tensor& requests,
    const Tensor& cached,
    const Tensor& history,
    const Tensor& decisions,
    const std::string& policy) {
  // Not held by another thread when the process forks: the child would wait for it for ever.
  static auto& mutex = *new std::mutex;
  static const int at_fork =
      pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); });
  (void)at_fork;
  // Never destroyed: threads may run until the process is gone. A worker must not let go of a tensor either:
  // the last one to do so needs Python's lock, which a process that ends gives to no thread. So the jobs
  // stay here, and who posts for another layer clears away what is idle.
  static auto& jobs = *new std::unordered_map<const void*, LayerJob>;
  auto call = std::make_shared<Call<UpdatePagesParams>>(
      update_pages_call(kOp, requests, "requests", requests, cached, history, decisions, policy));
  const UpdatePagesParams& params = call->params;
  std::vector<LayerJob> cleared;  // let go of after the lock: that may wait for Python's
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = jobs.find(params.history);
  if (known != jobs.end()) {
    if (known->second.policy == params.policy) return known->second.job;
    check(
        known->second.idle(), "post_update_pages",
        "history is being written for another policy, got '", policy, "'");
  }
  for (auto entry = jobs.begin(); entry != jobs.end();) {
    if (!entry->second.idle()) {
      ++entry;
      continue;
    }
    cleared.push_back(std::move(entry->second));
    entry = jobs.erase(entry);
  }
  auto job = std::make_shared<Job>(
      params.tasks, [call](int64_t task) { update_pages_head(call->params, task); });
  jobs[params.history] = {params.policy, job};
  return job;
}

void post_update_pages(
    const Tensor& requests,
    const Tensor& cached,
    const Tensor& history,
    const Tensor& decisions,
    std::string policy) {
  post(job_of(requests, cached, history, decisions, policy));
}

// A layer in memory that the host shares with a GPU. It holds no tensor: whoever frees the memory drops it first.
// It stays for ever, a few hundred bytes: graphs of layers that are gone may still post it.
struct SharedMemoryJob {
  explicit SharedMemoryJob(const UpdatePagesParams& layer)
      : params(layer),
        job(std::make_shared<Job>(layer.tasks, [this](int64_t task) { run(task); })) {}

  void run(int64_t task) {
    running.fetch_add(1);
    if (!dropped.load()) update_pages_head(params, task);
    running.fetch_sub(1);
    if (done.fetch_add(1) + 1 < params.tasks) return;
    done.store(0);
    nanoseconds.fetch_add(now() - posted.load());
    updates.fetch_add(1);
  }

  static int64_t now() {
    const auto time = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
  }

  const UpdatePagesParams params;
  const std::shared_ptr<Job> job;
  std::atomic<bool> dropped{false};
  std::atomic<int64_t> running{0}, done{0};  // parts: now; of this round
  std::atomic<int64_t> posts{0}, updates{0}, posted{0}, nanoseconds{0};
};

constexpr WorkerApi kWorkerApi = {
    [](const UpdatePagesParams& params) -> void* {
      start_workers();
      return new SharedMemoryJob(params);
    },
    [](void* job) {
      auto* layer = static_cast<SharedMemoryJob*>(job);
      layer->posts.fetch_add(1);
      layer->posted.store(SharedMemoryJob::now());
      if (!layer->dropped.load()) post(layer->job);
    },
    [](void* job, double seconds) {
      auto* layer = static_cast<SharedMemoryJob*>(job);
      layer->dropped.store(true);
      const int64_t until = SharedMemoryJob::now() + static_cast<int64_t>(1e9 * seconds);
      while (layer->running.load() > 0) {
        if (SharedMemoryJob::now() > until) return false;
        std::this_thread::sleep_for(std::chrono::microseconds(50));
      }
      return true;
    },
    [](void* job, int64_t (&counts)[kJobCounts]) {
      const auto* layer = static_cast<const SharedMemoryJob*>(job);
      counts[kJobPosts] = layer->posts.load();
      counts[kJobUpdates] = layer->updates.load();
      counts[kJobNanoseconds] = layer->nanoseconds.load();
    },
};

int64_t worker_api() { return reinterpret_cast<int64_t>(&kWorkerApi); }

// Of CPU tensors nothing is counted: an update has ended when its op returns.
std::vector<int64_t> update_counts(const Tensor& history) {
  (void)history;
  return std::vector<int64_t>(kJobCounts, 0);
}

std::string worker_pool(double seconds) {
  wait_for_workers(seconds);
  const WorkerPoolStatus status = worker_status();
  std::ostringstream text;
  text << "threads " << status.threads << ", pending " << status.pending << ", failures "
       << status.failures;
  return text.str();
}

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CPU, m) {
  m.impl("update_pages", TORCH_BOX(&retro::update_pages));
  m.impl("post_update_pages", TORCH_BOX(&retro::post_update_pages));
  m.impl("update_counts", TORCH_BOX(&retro::update_counts));
}

STABLE_TORCH_LIBRARY_IMPL(retro, CompositeExplicitAutograd, m) {
  m.impl("worker_api", TORCH_BOX(&retro::worker_api));
  m.impl("worker_pool", TORCH_BOX(&retro::worker_pool));
}
