// CPU ops that another op calls.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "checks.h"

namespace retro {

std::tuple<Tensor, Tensor, Tensor> wave_estimate(
    const Tensor& query,
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
    double scale);

Tensor cluster_gather(const Tensor& retrieved, const Tensor& offsets, const Tensor& counters);

Tensor page_gather(
    const Tensor& retrieved,
    const Tensor& offsets,
    const Tensor& store,
    const Tensor& pages,
    const Tensor& page_table,
    const Tensor& free_pages,
    const Tensor& decisions,
    const Tensor& requests,
    const Tensor& cached,
    const Tensor& counters,
    int64_t page_size);

void update_pages(
    const Tensor& requests,
    const Tensor& cached,
    const Tensor& history,
    const Tensor& decisions,
    std::string policy,
    bool join);

std::tuple<Tensor, Tensor> merged_attention(
    const Tensor& query,
    const Tensor& steady,
    const Tensor& store,
    const Tensor& addresses,
    const Tensor& counters,
    const Tensor& estimate,
    const Tensor& estimate_lse,
    double scale,
    std::optional<Tensor> pages,
    std::optional<Tensor> page_table,
    int64_t page_size);

}  // namespace retro
