// Generates by one package after another, and tells what memory each leaves; test_export.py builds and runs it.
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/InferenceMode.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "package.h"

namespace {

int64_t live = 0;  // bytes of tensors; all are made and freed by one thread

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

}  // namespace

// OPS PACKAGE ID...: every row of the package gets the same prompt.
int main(int count, char** words) {
  const c10::InferenceMode inference;
  at::set_num_threads(1);
  retro::load_library(words[1]);
  Counting counting;
  c10::SetCPUAllocator(&counting, /*priority=*/100);
  std::vector<int64_t> prompt;
  for (int i = 3; i < count; ++i) prompt.push_back(std::atoll(words[i]));
  for (int conversation = 0; conversation < 4; ++conversation) {
    {
      retro::Package package(words[2], "cpu");
      const int64_t rows = package.batch_size();
      const at::Tensor ids = at::tensor(prompt, at::kLong).expand({rows, -1}).contiguous();
      at::Tensor chosen =
          package.prefill(ids, at::zeros({rows}, at::TensorOptions(at::kLong))).argmax(1, true);
      for (int step = 0; step < 5; ++step) {
        std::printf("%s%lld", step ? " " : "", static_cast<long long>(chosen[0].item<int64_t>()));
        if (step < 4) chosen = package.decode(chosen).argmax(1, true);
      }
    }
    std::printf(":%lld\n", static_cast<long long>(live));
  }
  // Its allocator goes before torch does: nothing that is freed later may look for it.
  std::fflush(stdout);
  std::_Exit(0);
}
