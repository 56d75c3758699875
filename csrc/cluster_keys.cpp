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
  check_shape(kOp, "keys", keys, "B, Hkv, T, D", {kAny, kAny, kAny, kAny});
  check_element_dtype(kOp, "keys", keys);
  const int64_t batch = keys.size(0), heads = keys.size(1), tokens = keys.size(2);
  check_head_dim(kOp, keys.size(3));
  check_shape(kOp, "spans", spans, "B, 2", {batch, 2});
  check_dtype(kOp, "spans", spans, ScalarType::Long);
  check(cluster_size >= 1, kOp, "cluster_size must be at least 1 token, got ", cluster_size);
  check(
      segment_size >= cluster_size, kOp, "segment_size must be at least cluster_size (",
      cluster_size, " tokens), got ", segment_size);
  check(iterations >= 1, kOp, "iterations must be at least 1, got ", iterations);

  const Tensor readable_keys = readable(keys);
  const Tensor contiguous_spans = torch::stable::contiguous(spans);
  Tensor assignment = torch::stable::new_empty(keys, {batch, heads, tokens}, ScalarType::Int);

  ClusterKeysParams params;
  params.dtype = element_dtype(keys);
  params.batch = batch;
  params.heads = heads;
  params.tokens = tokens;
  params.head_dim = keys.size(3);
  params.keys = rows_of(readable_keys);
  params.spans = static_cast<const int64_t*>(contiguous_spans.data_ptr());
  params.cluster_size = cluster_size;
  params.segment_size = segment_size;
  params.iterations = iterations;
  params.assignment = static_cast<int32_t*>(assignment.data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t first = params.spans[2 * b], last = params.spans[2 * b + 1];
    check(
        first >= 0 && last <= tokens, kOp, "spans of row ", b, " must lie in 0 .. ", tokens,
        ", got ", first, " .. ", last);
  }
  cpu_kernels().cluster_keys(params);
  return assignment;
}

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CPU, m) {
  m.impl("cluster_keys", TORCH_BOX(&retro::cluster_keys));
}
