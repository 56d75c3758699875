// wave_estimate, page_gather and merged_attention in four launches, with update_pages posted between them.
#include "offloaded_attention.h"

#include "host_memory.h"
#include "page_gather_cuda.h"
#include "wave_estimate_cuda.h"

namespace retro {
namespace {

constexpr const char* kOp = "offloaded_attention";

Tensor offloaded_attention(
    const Tensor& query,
    const Tensor& steady,
    const Tensor& store,
    const Tensor& centroids,
    const Tensor& offsets,
    const Tensor& variances,
    const Tensor& totals,
    const Tensor& pages,
    const Tensor& page_table,
    const Tensor& free_pages,
    const Tensor& requests,
    const Tensor& cached,
    const Tensor& history,
    const Tensor& decisions,
    const Tensor& counters,
    int64_t max_retrieved,
    double retrieval_budget,
    int64_t min_retrieved_clusters,
    double estimation_budget,
    std::string estimator,
    double scale,
    int64_t page_size,
    std::string policy,
    bool join) {
  Tensor retrieved;
  const OffloadedAttentionCall call = offloaded_attention_call(
      query, steady, store, centroids, offsets, variances, totals, pages, page_table, free_pages,
      requests, cached, history, decisions, counters, max_retrieved, retrieval_budget,
      min_retrieved_clusters, estimation_budget, estimator, scale, page_size, policy, retrieved);
  const WaveEstimateParams& params = call.estimate.params;
  const PageGatherParams& gather = call.gather.params;
  const Launcher launch(kOp, query);
  check_lookup(kOp, launch, gather);
  const Tensor readable_steady = readable(steady);
  Tensor out = torch::stable::new_empty(
      query, {params.batch, query.size(1), params.head_dim}, query.scalar_type());
  const int64_t tasks = params.batch * params.heads;
  if (tasks * params.groups == 0) return out;

  Choice choice = {};
  AttendParams sizes = estimate_params(params, choice);
  plan_attend(launch, sizes);
  Workspace workspace;
  const ChoiceSpace choice_space = reserve_choice(launch, workspace, params);
  const AttendSpace attend_space = reserve_attend(workspace, sizes);
  const int64_t first = workspace.reserve<int32_t>(tasks * params.max_retrieved);
  const int64_t sources = workspace.reserve<int32_t>(tasks * source_capacity(gather));
  workspace.allocate(query);

  choice.retrieved = static_cast<int32_t*>(retrieved.data_ptr());
  choice.before = workspace.at<int32_t>(choice_space.before);
  choice.shift = workspace.at<int32_t>(choice_space.shift);
  choice.store_capacity = store.size(3);
  choice.counters = static_cast<int64_t*>(counters.data_ptr());
  choice.tickets = workspace.at<int32_t>(attend_space.tickets);
  choice.ticket_count = ticket_count(sizes);
  choose(launch, params, workspace, choice_space, choice);

  PageLookupParams look_up = {};
  look_up.op = gather;
  look_up.early_decisions = true;
  look_up.first = workspace.at<int32_t>(first);
  look_up.sources = workspace.at<int32_t>(sources);
  look_up.source_capacity = source_capacity(gather);
  look_up_pages(launch, look_up);
  // From here on the host may know what was retrieved: it decides while attention runs.
  post_update(kOp, launch, call.update);

  AttendParams attention = estimate_params(params, choice);
  plan_attend(launch, attention);
  attention.steady_capacity = steady.size(3);
  attention.steady_keys = half_of(readable_steady, 0);
  attention.steady_values = half_of(readable_steady, 1);
  attention.store_keys = gather.store_keys;
  attention.store_values = gather.store_values;
  attention.retrieved = {choice.before, choice.shift, params.max_retrieved};
  attention.pages.sources = look_up.sources;
  attention.pages.first = look_up.first;
  attention.pages.stride = look_up.source_capacity;
  attention.pages.keys = gather.page_keys;
  attention.pages.values = gather.page_values;
  attention.pages.pages = gather.pages;
  attention.pages.page_size = page_size;
  attention.pages.fills = true;
  attention.out = out.data_ptr();
  use_attend(attend_space, workspace, attention);
  attend(launch, attention);
  if (join) join_updates(launch);
  return out;
}

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CUDA, m) {
  m.impl("offloaded_attention", TORCH_BOX(&retro::offloaded_attention));
}
