#include "update_pages.h"

#include <pthread.h>

#include <memory>
#include <mutex>
#include <unordered_map>

#include "worker_pool.h"

namespace retro {
namespace {

void update_pages(
    const Tensor& requests,
    const Tensor& cached,
    const Tensor& history,
    const Tensor& decisions,
    std::string policy) {
  const Call<UpdatePagesParams> call =
      update_pages_call(requests, cached, history, decisions, policy);
  torch::stable::parallel_for(0, call.params.tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) update_pages_head(call.params, task);
  });
}

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
      update_pages_call(requests, cached, history, decisions, policy));
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
}

STABLE_TORCH_LIBRARY_IMPL(retro, CompositeExplicitAutograd, m) {
  m.impl("worker_pool", TORCH_BOX(&retro::worker_pool));
}
