// Which clusters may leave the page cache, the one least likely to be missed first.
#pragma once

#include <string>

#include "update_pages_cpu.h"

namespace retro {

// Tensors must be on the device of `like`, an argument of `op`.
inline Call<UpdatePagesParams> update_pages_call(
    const char* op,
    const Tensor& like,
    const char* like_name,
    const Tensor& requests,
    const Tensor& cached,
    const Tensor& history,
    const Tensor& decisions,
    const std::string& policy) {
  check_shape(op, "requests", requests, "B, Hkv, 3 + R", {kAny, kAny, kAny});
  check_dtype(op, "requests", requests, ScalarType::Int);
  check_contiguous(op, "requests", requests);
  const int64_t batch = requests.size(0), heads = requests.size(1);
  check(
      requests.size(2) >= kRequestHeader, op, "requests must hold 3 + R >= 3 columns, got ",
      requests.size(2));
  check_shape(op, "cached", cached, "B, Hkv, C", {batch, heads, kAny});
  check_dtype(op, "cached", cached, ScalarType::Byte);
  check_contiguous(op, "cached", cached);
  const int64_t clusters = cached.size(2);
  check_shape(op, "history", history, "B, Hkv, C + 1, 2", {batch, heads, clusters + 1, 2});
  check_dtype(op, "history", history, ScalarType::Long);
  check_contiguous(op, "history", history);
  check_shape(op, "decisions", decisions, "B, Hkv, 2 + P", {batch, heads, kAny});
  check_dtype(op, "decisions", decisions, ScalarType::Int);
  check_contiguous(op, "decisions", decisions);
  check(
      decisions.size(2) >= kDecisionHeader, op, "decisions must hold 2 + P >= 2 columns, got ",
      decisions.size(2));
  check_device(op, "requests", requests, like, like_name);
  check_device(op, "cached", cached, like, like_name);
  check_device(op, "history", history, like, like_name);
  check_device(op, "decisions", decisions, like, like_name);

  Call<UpdatePagesParams> call;
  UpdatePagesParams& params = call.params;
  check(
      find_policy(policy, params.policy), op, "policy must be one of ", policy_names(), ", got '",
      policy, "'");
  params.tasks = batch * heads;
  params.retrieved_clusters = requests.size(2) - kRequestHeader;
  params.clusters = clusters;
  params.pages = decisions.size(2) - kDecisionHeader;
  params.requests = static_cast<const int32_t*>(requests.data_ptr());
  params.cached = static_cast<const uint8_t*>(cached.data_ptr());
  params.history = static_cast<int64_t*>(history.data_ptr());
  params.decisions = static_cast<int32_t*>(decisions.data_ptr());
  for (const Tensor& tensor : {requests, cached, history, decisions}) call.hold(tensor);
  return call;
}

}  // namespace retro
