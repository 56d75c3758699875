// The table of contents: every op of the library, in the order in which data flows through them.
//
// Shape letters: B rows of the batch, Hq query heads, Hkv key heads, G = Hq / Hkv, T tokens, D head_dim,
// N capacity of the store in tokens, S capacity of the steady zone in tokens, C capacity of the index in
// clusters, R retrieved clusters, P pages of the page cache. A leading 2 holds keys, then values. `counters` is int64
// [B, kCounters]; its columns are named in counters.h.
#include "checks.h"

STABLE_TORCH_LIBRARY(retro, m) {
  // Building the index.
  m.def(
      "cluster_keys(Tensor keys, Tensor spans, int cluster_size, int segment_size, int iterations) "
      "-> Tensor");
  m.def(
      "pack_clusters(Tensor keys, Tensor values, Tensor assignment, Tensor(a!) store, "
      "Tensor(b!) centroids, Tensor(c!) offsets, Tensor(d!) variances, Tensor(e!) totals, "
      "Tensor(f!) counters, int cluster_size) -> ()");

  // New tokens.
  m.def(
      "append_tokens(Tensor keys, Tensor values, Tensor? mask, Tensor(a!) steady, "
      "Tensor(b!) counters, int max_length) -> ()");
  m.def(
      "grow_index(Tensor(a!) steady, Tensor(b!) store, Tensor(c!) centroids, Tensor(d!) offsets, "
      "Tensor(e!) variances, Tensor(f!) totals, Tensor(g!) counters, int sink_tokens, "
      "int local_tokens, int update_segment, int cluster_size, int iterations, "
      "int merged_updates=1, int merge_iterations=1) -> ()");

  // The decode step.
  m.def(
      "wave_estimate(Tensor query, Tensor centroids, Tensor offsets, Tensor variances, "
      "Tensor totals, Tensor counters, SymInt max_retrieved, float retrieval_budget, "
      "int min_retrieved_clusters, float estimation_budget, str estimator, float scale) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("cluster_gather(Tensor retrieved, Tensor offsets, Tensor(a!) counters) -> Tensor");
  m.def(  // cluster_gather, offloaded
      "page_gather(Tensor retrieved, Tensor offsets, Tensor store, Tensor(a!) pages, "
      "Tensor(b!) page_table, Tensor(c!) free_pages, Tensor decisions, Tensor(d!) requests, "
      "Tensor(e!) cached, Tensor(f!) counters, int page_size) -> Tensor");
  m.def(
      "merged_attention(Tensor query, Tensor steady, Tensor store, Tensor addresses, "
      "Tensor counters, Tensor estimate, Tensor estimate_lse, float scale, Tensor? pages=None, "
      "Tensor? page_table=None, int page_size=0) -> (Tensor, Tensor)");
  m.def(  // offloaded; beside the step: the next one's page_gather reads the decisions
      "update_pages(Tensor requests, Tensor cached, Tensor(a!) history, Tensor(b!) decisions, "
      "str policy, bool join=True) -> ()");
  m.def(
      "decode_attention(Tensor query, Tensor steady, Tensor store, Tensor centroids, Tensor "
      "offsets, "
      "Tensor variances, Tensor totals, Tensor(a!) counters, SymInt max_retrieved, "
      "float retrieval_budget, int min_retrieved_clusters, float estimation_budget, str estimator, "
      "float scale) -> Tensor");

  m.def(  // decode_attention, offloaded; posts update_pages
      "offloaded_attention(Tensor query, Tensor steady, Tensor store, Tensor centroids, "
      "Tensor offsets, Tensor variances, Tensor totals, Tensor(a!) pages, Tensor(b!) page_table, "
      "Tensor(c!) free_pages, Tensor(d!) requests, Tensor(e!) cached, Tensor(f!) history, "
      "Tensor(g!) decisions, Tensor(h!) counters, SymInt max_retrieved, float retrieval_budget, "
      "int min_retrieved_clusters, float estimation_budget, str estimator, float scale, "
      "int page_size, str policy, bool join) -> Tensor");

  // Zeros in memory of the host that the GPU of `like` reads and writes as its own, in like's dtype; of a CPU,
  // in memory like any other.
  m.def("host_tensor(Tensor like, int[] size) -> Tensor");
  // Bytes of host memory that such tensors on like's device have.
  m.def("host_bytes(Tensor like) -> int");

  // update_pages by a thread of the worker pool: posts it and returns, as the CUDA op will. What was posted
  // for the same tensors and has not begun runs once.
  m.def(
      "post_update_pages(Tensor requests, Tensor cached, Tensor(a!) history, Tensor(b!) decisions, "
      "str policy) -> ()");
  // Waits until the worker pool has nothing to do, at most so long; 'threads 2, pending 0, failures 0'.
  m.def("worker_pool(float seconds) -> str");
  // Of the layer with this history, if it is on a GPU: posts, updates that have ended, and nanoseconds from
  // post to end, in sum.
  m.def("update_counts(Tensor history) -> int[]");
  // A pointer, for the library of CUDA kernels; see worker_api.h.
  m.def("worker_api() -> int");

  // What the backward pass of every op calls, for each argument; it raises.
  m.def("no_backward(Tensor grad, Tensor argument, str op) -> Tensor");

  // Which CPU kernels run: 'avx512bf16', 'avx512', 'avx2' or 'portable'; a name selects them, '' only asks.
  m.def("cpu_kernels(str select) -> str");

  // The version of this library: what an exported model names as the one that it needs.
  m.def("library_version() -> str");
}
