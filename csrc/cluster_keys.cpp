#include "cluster_keys.h"

#include "cpu_kernels.h"

namespace retro {
namespace {

constexpr const char* kOp = "cluster_keys";

Tensor cluster_keys(
    const Tensor& keys,
    const Tensor& spans,
    int64_t cluster_size,
    int64_t segment_size,
    int64_t iterations) {
  Tensor assignment;
  const Call<ClusterKeysParams> call =
      cluster_keys_call(keys, spans, cluster_size, segment_size, iterations, assignment);
  const ClusterKeysParams& params = call.params;
  for (int64_t b = 0; b < params.batch; ++b) {
    const int64_t first = params.spans[2 * b], last = params.spans[2 * b + 1];
    check(
        first >= 0 && last <= params.tokens, kOp, "spans of row ", b, " must lie in 0 .. ",
        params.tokens, ", got ", first, " .. ", last);
  }
  cpu_kernels().cluster_keys(params);
  return assignment;
}

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CPU, m) {
  m.impl("cluster_keys", TORCH_BOX(&retro::cluster_keys));
}
