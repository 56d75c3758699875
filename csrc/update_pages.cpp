#include "update_pages.h"

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

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CPU, m) {
  m.impl("update_pages", TORCH_BOX(&retro::update_pages));
}
