// The table of contents: every op of the library, in the order in which data flows through them.
//
// Shape letters: B rows of the batch, Hq query heads, Hkv key heads, G = Hq / Hkv, T tokens, D head_dim,
// N capacity of the store in tokens, S capacity of the steady zone in tokens, C capacity of the index in
// clusters, R retrieved clusters. A leading 2 holds keys, then values. `counters` is int64
// [B, kCounters]; its columns are named in counters.h.
#include "checks.h"

STABLE_TORCH_LIBRARY(retro, m) {
  // Building the index.
  m.def(
      "cluster_keys(Tensor keys, Tensor spans, int cluster_size, int segment_size, int iterations) "
      "-> Tensor");
  m.def(
      "pack_clusters(Tensor keys, Tensor values, Tensor assignment, Tensor(a!) store, "
      "Tensor(b!) centroids, Tensor(c!) offsets, Tensor(d!) variances, Tensor(e!) residuals, "
      "Tensor(f!) counters, int cluster_size) -> ()");

  // New tokens.
  m.def(
      "append_tokens(Tensor keys, Tensor values, Tensor? mask, Tensor(a!) steady, "
      "Tensor(b!) counters, int max_length) -> ()");
  m.def(
      "grow_index(Tensor(a!) steady, Tensor(b!) store, Tensor(c!) centroids, Tensor(d!) offsets, "
      "Tensor(e!) variances, Tensor(f!) residuals, Tensor(g!) counters, int sink_tokens, "
      "int local_tokens, int update_segment, int cluster_size, int iterations) -> ()");

  // The decode step.
  m.def(
      "wave_estimate(Tensor query, Tensor centroids, Tensor offsets, Tensor variances, "
      "Tensor residuals, Tensor counters, SymInt max_retrieved, float retrieval_budget, "
      "int min_retrieved_clusters, float estimation_budget, str estimator, float scale) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("cluster_gather(Tensor retrieved, Tensor offsets, Tensor(a!) counters) -> Tensor");
  m.def(
      "merged_attention(Tensor query, Tensor steady, Tensor store, Tensor addresses, "
      "Tensor counters, Tensor estimate, Tensor estimate_lse, float scale) -> (Tensor, Tensor)");
  m.def(
      "decode_attention(Tensor query, Tensor steady, Tensor store, Tensor centroids, Tensor "
      "offsets, "
      "Tensor variances, Tensor residuals, Tensor(a!) counters, SymInt max_retrieved, "
      "float retrieval_budget, int min_retrieved_clusters, float estimation_budget, str estimator, "
      "float scale) -> Tensor");

  // What the backward pass of every op calls, for each argument; it raises.
  m.def("no_backward(Tensor grad, Tensor argument, str op) -> Tensor");

  // Which CPU kernels run: 'avx512bf16', 'avx512', 'avx2' or 'portable'; a name selects them, '' only asks.
  m.def("cpu_kernels(str select) -> str");

  // The version of this library: what an exported model names as the one that it needs.
  m.def("library_version() -> str");
}
