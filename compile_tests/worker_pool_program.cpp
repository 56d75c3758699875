// Cases of the worker pool that need jobs of their own; test_update_pages.py compiles and runs it.
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "worker_pool.h"

namespace {

using retro::Job;
using std::chrono::milliseconds;

void require(bool ok, const char* what) {
  if (ok) return;
  std::printf("failed: %s\n", what);
  std::_Exit(1);
}

void pause(int milliseconds_) { std::this_thread::sleep_for(milliseconds(milliseconds_)); }

double seconds_of(const std::function<void()>& run) {
  const auto begin = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Never destroyed: threads may run when main has returned.
std::shared_ptr<Job> make(int64_t parts, std::function<void(int64_t)> run) {
  return *new std::shared_ptr<Job>(std::make_shared<Job>(parts, std::move(run)));
}

void rounds() {
  auto& runs = *new std::atomic<int>(0);
  const auto job = make(1, [&](int64_t) { ++runs; });
  for (int i = 1; i <= 100; ++i) {
    retro::post(job);
    require(retro::wait_for_workers(5), "a job ends");
    require(runs == i, "every round runs once");
  }
  retro::post(make(0, [](int64_t) { require(false, "a job without parts has none to run"); }));
  require(retro::wait_for_workers(5), "a job without parts ends");
}

// Posted while it waits it runs once; posted while it runs, once more; never two rounds at once.
void again() {
  auto& runs = *new std::atomic<int>(0);
  auto& inside = *new std::atomic<int>(0);
  auto& open = *new std::atomic<bool>(false);
  const auto job = make(1, [&](int64_t) {
    require(++inside == 1, "one round at a time");
    while (!open) pause(1);
    ++runs;
    --inside;
  });
  retro::post(job);
  while (inside == 0) pause(1);
  for (int i = 0; i < 50; ++i) retro::post(job);
  open = true;
  require(retro::wait_for_workers(5), "both rounds end");
  require(runs == 2, "fifty posts of a running job are one more round");
}

void parts() {
  auto& counts = *new std::vector<std::atomic<int>>(1000);
  const auto job = make(1000, [&](int64_t part) { ++counts[part]; });
  for (int i = 0; i < 20; ++i) {
    retro::post(job);
    require(retro::wait_for_workers(5), "all parts end");
  }
  for (const auto& count : counts) require(count == 20, "every part runs once a round");
}

void throws() {
  retro::post(make(2, [](int64_t part) {
    if (part == 0) throw std::runtime_error("no");
  }));
  require(retro::wait_for_workers(5), "a job that throws ends");
  require(retro::worker_status().failures == 1, "and is counted");
}

// A job that stalls holds up nobody who posts, not even those who post it.
void stall() {
  auto& open = *new std::atomic<bool>(false);
  retro::start_workers();
  std::vector<std::shared_ptr<Job>> jobs;
  for (int i = 0; i < 20; ++i)
    jobs.push_back(make(1, [&](int64_t) {
      while (!open) pause(1);
    }));
  const double seconds = seconds_of([&] {
    for (int i = 0; i < 1000; ++i) {
      for (const auto& job : jobs) retro::post(job);
    }
  });
  require(seconds < 1, "20,000 posts take a second at most");
  require(!retro::wait_for_workers(0.05), "nothing ends while it is stalled");
  require(retro::worker_status().pending == 20, "all of it is pending");
  open = true;
  require(retro::wait_for_workers(5), "all ends once it is not");
}

// main returns with a queue of jobs behind one that runs; they are dropped.
void exit_with_jobs() {
  for (int i = 0; i < 100; ++i) retro::post(make(1, [](int64_t) { pause(20); }));
  std::atexit([] { retro::post(make(1, [](int64_t) {})); });
}

// A job that never ends does not keep the process from ending.
void never() {
  auto& runs = *new std::atomic<bool>(false);
  retro::post(make(1, [&](int64_t) {
    runs = true;
    for (;;) pause(100);
  }));
  while (!runs) pause(1);
}

void fork_with_jobs() {
  auto& open = *new std::atomic<bool>(false);
  auto& runs = *new std::atomic<int>(0);
  const auto job = make(1, [&](int64_t) {
    while (!open) pause(1);
    ++runs;
  });
  retro::post(job);
  pause(20);
  const pid_t child = fork();
  if (child == 0) {
    require(retro::worker_status().threads == 0, "a child starts without threads");
    open = true;
    retro::post(job);
    require(retro::wait_for_workers(5), "a job that ran when the process forked runs in the child");
    require(runs == 1, "once");
    std::exit(0);  // through the exit handlers
  }
  int status = 0;
  waitpid(child, &status, 0);
  require(status == 0, "the child ends well");
  open = true;
  require(retro::wait_for_workers(5), "the parent's job ends");
  require(runs == 1, "the parent has not noticed");
}

// Many threads post many jobs.
void many() {
  constexpr int kJobs = 50, kPosters = 8;
  auto& sums = *new std::vector<std::atomic<int64_t>>(kJobs);
  auto& inside = *new std::vector<std::atomic<int>>(kJobs);
  std::vector<std::shared_ptr<Job>> jobs;
  for (int j = 0; j < kJobs; ++j) {
    jobs.push_back(make(1, [&, j](int64_t) {
      require(++inside[j] == 1, "one round at a time");
      ++sums[j];
      --inside[j];
    }));
  }
  std::vector<std::thread> posters;
  for (int p = 0; p < kPosters; ++p) {
    posters.emplace_back([&] {
      for (int i = 0; i < 2000; ++i) {
        for (const auto& job : jobs) retro::post(job);
      }
    });
  }
  for (auto& poster : posters) poster.join();
  require(retro::wait_for_workers(20), "all end");
  for (const auto& sum : sums) require(sum >= 1, "every job ran");
  require(jobs[0].use_count() == 2, "the pool keeps no idle job");
}

}  // namespace

int main(int, char** arguments) {
  const std::map<std::string, void (*)()> cases = {
      {"rounds", rounds}, {"again", again},         {"parts", parts},
      {"throws", throws}, {"stall", stall},         {"exit", exit_with_jobs},
      {"never", never},   {"fork", fork_with_jobs}, {"many", many},
  };
  cases.at(arguments[1])();
  return 0;
}
