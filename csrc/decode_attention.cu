// wave_estimate, cluster_gather and merged_attention in three launches.
#include <string>

#include "wave_estimate_cuda.h"

namespace retro {
namespace {

constexpr const char* kOp = "decode_attention";

Tensor decode_attention(
    const Tensor& query,
    const Tensor& steady,
    const Tensor& store,
    const Tensor& centroids,
    const Tensor& offsets,
    const Tensor& variances,
    const Tensor& totals,
    const Tensor& counters,
    int64_t max_retrieved,
    double retrieval_budget,
    int64_t min_retrieved_clusters,
    double estimation_budget,
    std::string estimator,
    double scale) {
  const Call<WaveEstimateParams> call = wave_estimate_call(
      kOp, query, centroids, offsets, variances, totals, counters, max_retrieved, retrieval_budget,
      min_retrieved_clusters, estimation_budget, estimator, scale);
  const WaveEstimateParams& params = call.params;
  const int64_t batch = params.batch, heads = params.heads, head_dim = params.head_dim;
  check_shape(kOp, "steady", steady, "2, B, Hkv, S, D", {2, batch, heads, kAny, head_dim});
  check_dtype(kOp, "steady", steady, query.scalar_type());
  check_device(kOp, "steady", steady, query, "query");
  check_shape(kOp, "store", store, "2, B, Hkv, N, D", {2, batch, heads, kAny, head_dim});
  check_dtype(kOp, "store", store, query.scalar_type());
  check_device(kOp, "store", store, query, "query");
  const Launcher launch(kOp, query);
  const Tensor readable_steady = readable(steady), readable_store = readable(store);
  Tensor out =
      torch::stable::new_empty(query, {batch, query.size(1), head_dim}, query.scalar_type());
  const int64_t tasks = batch * heads;
  if (tasks * params.groups == 0) return out;

  Choice choice = {};
  AttendParams sizes = estimate_params(params, choice);
  plan_attend(launch, sizes);
  Workspace workspace;
  const ChoiceSpace choice_space = reserve_choice(launch, workspace, params);
  const AttendSpace attend_space = reserve_attend(workspace, sizes);
  workspace.allocate(query);

  choice.before = workspace.at<int32_t>(choice_space.before);
  choice.shift = workspace.at<int32_t>(choice_space.shift);
  choice.store_capacity = store.size(3);
  choice.counters = static_cast<int64_t*>(counters.data_ptr());
  choice.tickets = workspace.at<int32_t>(attend_space.tickets);
  choice.ticket_count = ticket_count(sizes);
  choose(launch, params, workspace, choice_space, choice);

  AttendParams attention = estimate_params(params, choice);
  plan_attend(launch, attention);
  attention.steady_capacity = steady.size(3);
  attention.steady_keys = half_of(readable_steady, 0);
  attention.steady_values = half_of(readable_steady, 1);
  attention.store_keys = half_of(readable_store, 0);
  attention.store_values = half_of(readable_store, 1);
  attention.retrieved = {choice.before, choice.shift, params.max_retrieved};
  attention.out = out.data_ptr();
  use_attend(attend_space, workspace, attention);
  attend(launch, attention);
  return out;
}

}  // namespace
}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CUDA, m) {
  m.impl("decode_attention", TORCH_BOX(&retro::decode_attention));
}
