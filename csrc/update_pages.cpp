#include "update_pages.h"

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

// The job of one layer: two of them at once would both write its history.
std::shared_ptr<Job> job_of(
    const Tensor& requests,
    const Tensor& cached,
    const Tensor& history,
    const Tensor& decisions,
    const std::string& policy) {
  static std::mutex mutex;
  static auto& jobs = *new std::unordered_map<const void*, std::weak_ptr<Job>>;  // outlives threads
  // The call holds the tensors, so no other layer gets their memory while the job is there.
  auto call = std::make_shared<Call<UpdatePagesParams>>(
      update_pages_call(requests, cached, history, decisions, policy));
  const std::lock_guard<std::mutex> lock(mutex);
  std::weak_ptr<Job>& known = jobs[call->params.history];
  std::shared_ptr<Job> job = known.lock();
  if (job) return job;
  std::erase_if(jobs, [](const auto& entry) { return entry.second.expired(); });
  job = std::make_shared<Job>(
      call->params.tasks, [call](int64_t task) { update_pages_head(call->params, task); });
  jobs[call->params.history] = job;
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
