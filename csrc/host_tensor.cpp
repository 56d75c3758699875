// Memory that a GPU and its host share; on a CPU there is one kind of memory.
#include "checks.h"

namespace retro {
namespace {

Tensor host_tensor(const Tensor& like, std::vector<int64_t> size) {
  return torch::stable::new_zeros(like, size);
}

int64_t host_bytes(const Tensor& like) {
  (void)like;
  return 0;
}

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CPU, m) {
  m.impl("host_tensor", TORCH_BOX(&retro::host_tensor));
  m.impl("host_bytes", TORCH_BOX(&retro::host_bytes));
}
