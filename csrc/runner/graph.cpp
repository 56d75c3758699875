#include "graph.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <stdexcept>

#ifdef RETRO_RUNNER_CUDA
#include <ATen/cuda/CUDAGraph.h>
#endif

namespace retro {

void use_own_stream(c10::Device device) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  // For each further stream torch would keep a workspace of cuBLAS, 32 MiB on an H100.
  if (guard.getStream(device) != guard.getDefaultStream(device)) return;
  guard.exchangeStream(guard.getStreamFromGlobalPool(device));
}

#ifdef RETRO_RUNNER_CUDA

struct Graph::Recording {
  at::cuda::CUDAGraph graph;
};

Graph::Graph(const std::function<void()>& work) : recording_(std::make_unique<Recording>()) {
  for (int i = 0; i < 2; ++i) work();
  // Other threads may go on to allocate memory.
  recording_->graph.capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
  work();
  recording_->graph.capture_end();
}

void Graph::replay() { recording_->graph.replay(); }

#else

struct Graph::Recording {};

Graph::Graph(const std::function<void()>&) {
  throw std::runtime_error(
      "this program was built without CUDA's headers and records no graph; build it where "
      "CUDA_HOME names CUDA, or give --no-graph");
}

void Graph::replay() {}

#endif

Graph::~Graph() = default;

}  // namespace retro
