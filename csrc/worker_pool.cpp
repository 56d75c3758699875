#include "worker_pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace retro {
namespace {

// An update takes microseconds for each row and head. More threads would only wake up.
constexpr int kMostThreads = 8;
// A job that still runs when the process exits gets so long. Then the process exits around it.
constexpr auto kExitPatience = std::chrono::milliseconds(1000);
constexpr auto kPoll = std::chrono::microseconds(50);

// The pool of this process; it is never destroyed, since threads may outlive every destructor.
std::atomic<WorkerPool*> pool{nullptr};
std::atomic<uint64_t> generation{0};  // forks since the program started
std::atomic<bool> exiting{false};

// The processors of the process: the mask of its first thread, not of the thread that happens to call.
cpu_set_t process_mask() {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  if (sched_getaffinity(getpid(), sizeof mask, &mask) != 0) CPU_ZERO(&mask);
  return mask;
}

}  // namespace

class WorkerPool {
 public:
  explicit WorkerPool(uint64_t generation) : generation_(generation) {}

  static WorkerPool& of_this_process() {
    if (WorkerPool* running = pool.load(std::memory_order_acquire)) return *running;
    static const int once = [] {
      // Handlers run in the opposite order: ours before the destructors of what was there before us.
      std::atexit([] { on_exit(); });
      pthread_atfork(nullptr, nullptr, [] {
        generation.fetch_add(1);
        pool.store(nullptr);
      });
      return 0;
    }();
    (void)once;
    auto* fresh = new WorkerPool(generation.load());
    WorkerPool* running = nullptr;
    if (!pool.compare_exchange_strong(running, fresh)) {
      delete fresh;
      return *running;
    }
    fresh->start();
    return *fresh;
  }

  void post(const std::shared_ptr<Job>& job) {
    const uint64_t own = generation_ << 2;
    uint64_t state = job->state_.load(std::memory_order_acquire);
    for (;;) {
      const bool known = state >> 2 == generation_;
      const uint64_t is = known ? state & 3 : Job::kIdle;
      if (is == Job::kQueued || is == Job::kRunningAgain) return;
      const uint64_t next = own | (is == Job::kIdle ? Job::kQueued : Job::kRunningAgain);
      if (!job->state_.compare_exchange_weak(state, next, std::memory_order_acq_rel)) continue;
      if (is == Job::kRunning) return;
      break;
    }
    pending_.fetch_add(1);
    job->self_ = job;
    push(job.get());
    posts_.fetch_add(1, std::memory_order_release);
    posts_.notify_all();
  }

  bool wait(double seconds) const {
    const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    while (pending_.load(std::memory_order_acquire) > 0) {
      if (std::chrono::steady_clock::now() > until) return false;
      std::this_thread::sleep_for(kPoll);
    }
    return true;
  }

  WorkerPoolStatus status() const { return {alive_.load(), pending_.load(), failures_.load()}; }

 private:
  void start() {
    const cpu_set_t mask = process_mask();
    const int processors = CPU_COUNT(&mask);
    const int count = std::clamp(processors, 1, kMostThreads);
    sigset_t all, before;  // signals are for the program's own threads
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int i = 0; i < count; ++i) {
      alive_.fetch_add(1);
      try {
        std::thread([this, mask, processors] {
          if (processors > 0) sched_setaffinity(0, sizeof mask, &mask);
          pthread_setname_np(pthread_self(), "retro_pages");
          work();
          alive_.fetch_sub(1);
        }).detach();
      } catch (
          const std::exception&) {  // the system has no more threads; what is posted never runs
        alive_.fetch_sub(1);
        if (i == 0) failures_.fetch_add(1);
        break;
      }
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void push(Job* job) {
    Job* top = top_.load(std::memory_order_relaxed);
    do job->below_ = top;
    while (!top_.compare_exchange_weak(top, job, std::memory_order_release));
  }

  // Moves what was posted behind what waits, oldest first; under the mutex.
  void collect() {
    std::vector<Job*> posted;
    for (Job* job = top_.exchange(nullptr, std::memory_order_acquire); job; job = job->below_) {
      posted.push_back(job);
    }
    for (auto job = posted.rbegin(); job != posted.rend(); ++job) {
      (*job)->state_.store(generation_ << 2 | Job::kRunning, std::memory_order_release);
      (*job)->taken_ = (*job)->done_ = 0;
      if ((*job)->parts_ > 0) waiting_.push_back(*job);
      else finish(*job);
    }
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      const uint32_t seen = posts_.load(std::memory_order_acquire);
      if (exiting.load()) return;
      collect();
      if (waiting_.empty()) {
        lock.unlock();
        posts_.wait(seen, std::memory_order_acquire);
        lock.lock();
        continue;
      }
      Job* job = waiting_.front();
      const int64_t part = job->taken_++;
      if (job->taken_ == job->parts_) waiting_.pop_front();
      lock.unlock();
      try {
        job->run_(part);
      } catch (...) {
        failures_.fetch_add(1);
      }
      lock.lock();
      if (++job->done_ == job->parts_) finish(job);
    }
  }

  // Under the mutex; the job may be gone afterwards.
  void finish(Job* job) {
    const uint64_t own = generation_ << 2;
    uint64_t state = own | Job::kRunning;
    std::shared_ptr<Job> self = std::move(job->self_);
    if (job->state_.compare_exchange_strong(state, own | Job::kIdle, std::memory_order_acq_rel)) {
      self.reset();  // before anyone who waits goes on
      pending_.fetch_sub(1, std::memory_order_release);
      return;
    }
    job->self_ = std::move(self);  // posted while it ran
    job->state_.store(own | Job::kQueued, std::memory_order_release);
    push(job);
  }

  static void on_exit() {
    exiting.store(true);
    WorkerPool* running = pool.load();
    if (running == nullptr) return;
    const auto until = std::chrono::steady_clock::now() + kExitPatience;
    while (running->alive_.load() > 0 && std::chrono::steady_clock::now() < until) {
      running->posts_.fetch_add(1);
      running->posts_.notify_all();
      std::this_thread::sleep_for(kPoll);
    }
  }

  const uint64_t generation_;
  std::atomic<Job*> top_{nullptr};  // what was posted and no thread has seen yet, latest first
  std::atomic<uint32_t> posts_{0};  // what idle threads wait on
  std::atomic<int64_t> pending_{0}, failures_{0}, alive_{0};
  std::mutex mutex_;          // of the threads; posting does not take it
  std::deque<Job*> waiting_;  // jobs with parts that no thread has taken
};

void start_workers() {
  if (!exiting.load()) WorkerPool::of_this_process();
}

void post(const std::shared_ptr<Job>& job) {
  if (!exiting.load()) WorkerPool::of_this_process().post(job);
}

bool wait_for_workers(double seconds) {
  const WorkerPool* running = pool.load();
  return running == nullptr || running->wait(seconds);
}

WorkerPoolStatus worker_status() {
  const WorkerPool* running = pool.load();
  return running == nullptr ? WorkerPoolStatus{0, 0, 0} : running->status();
}

}  // namespace retro
