// How the library of CUDA kernels reaches the worker pool, which is in the library of CPU kernels. Neither links
// the other: the op `worker_api` gives a pointer to this.
#pragma once

#include "update_pages_cpu.h"

namespace retro {

// What the pool has done for one layer.
enum JobCount : int64_t {
  kJobPosts = 0,    // calls of post
  kJobUpdates,      // updates that have ended
  kJobNanoseconds,  // from their (latest) post to their end, in sum
  kJobCounts,
};

struct WorkerApi {
  // A job that updates a layer in memory that the host and a GPU share, for `post`; starts the pool.
  void* (*make)(const UpdatePagesParams& params);
  // Has the pool run it: never waits, takes no lock, may be called at any time, and by a CUDA host function;
  // does nothing once the job has been dropped.
  void (*post)(void* job);
  // After this no thread touches the layer's memory any more. False: one still did after so many seconds,
  // the memory must stay.
  bool (*drop)(void* job, double seconds);
  void (*count)(void* job, int64_t (&counts)[kJobCounts]);
};

}  // namespace retro
