// A few threads of the process that decide what leaves the page caches, beside the steps. One pool serves
// all layers and models; its threads start with the first job. Plain C++, without torch.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>

namespace retro {

class WorkerPool;

// What is posted again and again, once a step. Its parts run on any threads at once; two rounds of it never
// do. Posted while it waits, it runs once for both; while it runs, once more.
class Job {
 public:
  // `run(part)` for every part in 0 .. parts - 1. What it uses must live as long as the job. The pool's
  // threads hold the job while it is posted: who posts keeps a reference too, unless any thread may be the
  // one that destroys it, which none may whose destruction takes Python's lock (a tensor's).
  Job(int64_t parts, std::function<void(int64_t)> run) : parts_(parts), run_(std::move(run)) {}

 private:
  friend class WorkerPool;

  enum State : uint64_t { kIdle, kQueued, kRunning, kRunningAgain };

  const int64_t parts_;
  const std::function<void(int64_t)> run_;
  // A State, and above it the generation of the pool that it is about: a forked process starts anew.
  std::atomic<uint64_t> state_{kIdle};
  std::shared_ptr<Job> self_;     // while it is not idle
  Job* below_ = nullptr;          // the job posted before it, while it is on the pool's stack
  int64_t taken_ = 0, done_ = 0;  // parts of this round; guarded by the pool's mutex
};

struct WorkerPoolStatus {
  int64_t threads;   // that run; 0 before the first job
  int64_t pending;   // jobs that wait or run
  int64_t failures;  // parts that threw, and jobs for which no thread could be started
};

// Starts the threads, if there are none yet; post() does so by itself, but takes longer then.
void start_workers();

// Has the job run on the pool's threads. Takes no lock and never waits for one, so a CUDA host function may
// call it. Once the process exits it does nothing.
void post(const std::shared_ptr<Job>& job);

// Waits until no job waits or runs; false if that takes longer.
bool wait_for_workers(double seconds);

WorkerPoolStatus worker_status();

}  // namespace retro
