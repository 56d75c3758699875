// A CUDA graph of work that is repeated. Without CUDA's headers, where RETRO_RUNNER_CUDA is not defined, it refuses.
#pragma once

#include <c10/core/Device.h>

#include <functional>
#include <memory>

namespace retro {

class Graph {
 public:
  // Records what `work` does on the current stream, which must not be the default one. `work` runs three times, the
  // first two to allocate and load what it needs: what it changes is changed. It may read and write only memory that
  // stays where it is. Throws std::runtime_error where this program was built without CUDA.
  explicit Graph(const std::function<void()>& work);
  ~Graph();

  void replay();

 private:
  struct Recording;
  std::unique_ptr<Recording> recording_;
};

// Gives the calling thread a stream of its own on a GPU, on which a graph can be recorded, unless it has one.
void use_own_stream(c10::Device device);

}  // namespace retro
