// Generates by one package after another, and tells what memory each leaves; test_export.py builds and runs it.
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/InferenceMode.h>
#ifdef RETRO_RUNNER_CUDA
#include <c10/cuda/CUDACachingAllocator.h>
#endif

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "package.h"

namespace {

int64_t live = 0;  // bytes of tensors on the host; all are made and freed by one thread

struct Block {
  at::DataPtr memory;
  size_t bytes;
};

void free_block(void* block) {
  live -= static_cast<int64_t>(static_cast<Block*>(block)->bytes);
  delete static_cast<Block*>(block);
}

// torch's own, with an account.
struct Counting : c10::Allocator {
  c10::Allocator* own = c10::GetCPUAllocator();

  at::DataPtr allocate(size_t bytes) override {
    auto* block = new Block{own->allocate(bytes), bytes};
    live += static_cast<int64_t>(bytes);
    return {block->memory.get(), block, &free_block, at::kCPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    own->copy_data(to, from, bytes);
  }
};

int64_t live_on_gpu() {
#ifdef RETRO_RUNNER_CUDA
  if (at::hasCUDA()) {
    return c10::cuda::CUDACachingAllocator::getDeviceStats(0).allocated_bytes[0].current;
  }
#endif
  return 0;
}

std::vector<int64_t> generate(retro::Package& package, const std::vector<int64_t>& prompt) {
  const int64_t rows = package.batch_size();
  const at::Tensor ids = at::tensor(prompt, at::kLong).expand({rows, -1}).contiguous();
  at::Tensor chosen =
      package.prefill(ids, at::zeros({rows}, at::TensorOptions(at::kLong))).argmax(1, true);
  std::vector<int64_t> tokens;
  for (int step = 0; step < 5; ++step) {
    if (step) chosen = package.decode(chosen).argmax(1, true);
    tokens.push_back(chosen[0].item<int64_t>());
  }
  return tokens;
}

}  // namespace

// PACKAGE OPS... -- ID...: every row of the package gets the same prompt.
int main(int count, char** words) {
  const c10::InferenceMode inference;
  at::set_num_threads(1);
  int word = 2;
  for (; std::string(words[word]) != "--"; ++word) retro::load_library(words[word]);
  std::vector<int64_t> prompt;
  for (++word; word < count; ++word) prompt.push_back(std::atoll(words[word]));
  Counting counting;
  c10::SetCPUAllocator(&counting, /*priority=*/100);
  for (int conversation = 0; conversation < 4; ++conversation) {
    std::vector<int64_t> tokens;
    {
      retro::Package package(words[1], "");
      tokens = generate(package, prompt);
      {  // Another one on the same thread, which comes and goes, changes nothing.
        retro::Package other(words[1], "");
        generate(other, {1, 2});
      }
      if (generate(package, prompt) != tokens) return 1;
    }
    for (const int64_t token : tokens) std::printf("%lld ", static_cast<long long>(token));
    std::printf(
        ":%lld %lld\n", static_cast<long long>(live), static_cast<long long>(live_on_gpu()));
  }
  // Its allocator goes before torch does: nothing that is freed later may look for it.
  std::fflush(stdout);
  std::_Exit(0);
}
