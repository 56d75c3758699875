// CPU kernel of grow_index. Included inside namespace retro::RETRO_ISA only.

// The tokens behind the sinks become one segment; the tokens behind them move up.
template <typename T>
inline void grow_head(const GrowIndexParams& params, int64_t b, int64_t h, int64_t steady_tokens) {
  const int64_t tokens = params.update_segment, head_dim = params.head_dim;
  const int64_t clusters = cluster_count(tokens, params.cluster_size);
  Scratch& scratch = Scratch::of_this_thread();
  scratch.begin(
      SegmentMemory::bytes(tokens, clusters, head_dim) +
      Scratch::bytes<float>(kSumRows * head_dim));
  const SegmentMemory memory = SegmentMemory::take(scratch, tokens, clusters, head_dim);
  const auto key = [&](int64_t t) {
    return params.steady_keys.row<T>(b, h, params.sink_tokens + t);
  };
  const auto value = [&](int64_t t) {
    return params.steady_values.row<T>(b, h, params.sink_tokens + t);
  };
  const int64_t outliers = outlier_count(tokens, clusters);
  cluster_segment<T>(
      key, [&](int64_t c) { return key(seed_token(c, tokens, clusters - outliers)); }, tokens,
      clusters, outliers, head_dim, params.iterations, memory);
  pack_tokens<T>(
      params.index, end_of_index(params.index, b), b, h, tokens, clusters, head_dim, key, value,
      [&](int64_t t) { return memory.assigned[t]; }, scratch.take<float>(kSumRows * head_dim));
  const size_t row_bytes = static_cast<size_t>(head_dim) * sizeof(T);
  for (int64_t t = 0; t < steady_tokens - params.sink_tokens - tokens; ++t) {
    std::memmove(key(t), key(t + tokens), row_bytes);
    std::memmove(value(t), value(t + tokens), row_bytes);
  }
}

// The latest `tokens` tokens of the index become one segment. Their clusters so far are what k-means
// begins with, so that it needs few passes.
template <typename T>
inline void merge_head(const GrowIndexParams& params, int64_t b, int64_t h, int64_t tokens) {
  const int64_t head_dim = params.head_dim;
  const int64_t clusters =
      params.merged_updates * cluster_count(params.update_segment, params.cluster_size);
  const IndexView& index = params.index;
  Place place = end_of_index(index, b);
  place.slot -= tokens;
  place.cluster -= clusters;
  Scratch& scratch = Scratch::of_this_thread();
  scratch.begin(
      SegmentMemory::bytes(tokens, clusters, head_dim) + 2 * Scratch::bytes<T>(tokens * head_dim) +
      Scratch::bytes<int32_t>(tokens) + Scratch::bytes<float>((kSumRows + 2) * head_dim));
  const SegmentMemory memory = SegmentMemory::take(scratch, tokens, clusters, head_dim);
  T* keys = scratch.take<T>(tokens * head_dim);
  T* values = scratch.take<T>(tokens * head_dim);
  int32_t* assigned = scratch.take<int32_t>(tokens);
  float* sums = scratch.take<float>((kSumRows + 2) * head_dim);
  float* old_residuals = sums + kSumRows * head_dim;

  const int32_t* offsets =
      index.offsets + (b * index.heads + h) * (index.clusters + 1) + place.cluster;
  for (int64_t c = 0; c < clusters; ++c) {
    for (int64_t slot = offsets[c]; slot < offsets[c + 1]; ++slot) {
      assigned[slot - place.slot] = static_cast<int32_t>(c);
    }
  }
  // Packed once more as they are, but into scratch: a copy of the tokens, and what the clusters add to
  // the totals.
  IndexView copy = index;
  copy.store_keys = {keys - place.slot * head_dim, 0, 0, head_dim};
  copy.store_values = {values - place.slot * head_dim, 0, 0, head_dim};
  copy.residuals = old_residuals - (b * index.heads + h) * head_dim;
  copy.value_sums = copy.residuals + head_dim;
  std::memset(old_residuals, 0, static_cast<size_t>(2 * head_dim) * sizeof(float));
  pack_tokens<T>(
      copy, place, b, h, tokens, clusters, head_dim,
      [&](int64_t t) { return index.store_keys.row<const T>(b, h, place.slot + t); },
      [&](int64_t t) { return index.store_values.row<const T>(b, h, place.slot + t); },
      [&](int64_t t) { return assigned[t]; }, sums);
  float* residuals = index.residuals + (b * index.heads + h) * head_dim;
  float* value_sums = index.value_sums + (b * index.heads + h) * head_dim;
  for (int64_t d = 0; d < head_dim; ++d) {
    // Sums in another order may differ in their last digits: no residual falls below zero.
    residuals[d] = std::max(residuals[d] - old_residuals[d], 0.0f);
    value_sums[d] -= old_residuals[head_dim + d];
  }

  const auto key = [&](int64_t t) { return keys + t * head_dim; };
  cluster_segment<T>(
      key, [&](int64_t c) { return index.centroid_keys.row<const T>(b, h, place.cluster + c); },
      tokens, clusters, 0, head_dim, params.merge_iterations, memory);
  pack_tokens<T>(
      index, place, b, h, tokens, clusters, head_dim, key,
      [&](int64_t t) { return values + t * head_dim; },
      [&](int64_t t) { return memory.assigned[t]; }, sums);
}

// Calls `work` for all heads of the rows that `chosen` picks by their counters; says whether there are any.
template <typename Chosen, typename Work>
inline bool for_heads_of(const GrowIndexParams& params, const Chosen& chosen, const Work& work) {
  bool any = false;
  for (int64_t b = 0; b < params.batch; ++b) {
    any = any || chosen(params.index.counters + b * kCounters);
  }
  if (!any) return false;
  torch::stable::parallel_for(0, params.batch * params.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / params.heads;
      if (chosen(params.index.counters + b * kCounters)) work(b, task % params.heads);
    }
  });
  return true;
}

template <typename T>
void grow_index_typed(const GrowIndexParams& params) {
  const int64_t segment = params.update_segment, merged = merged_tokens(params);
  const int64_t full = params.sink_tokens + params.local_tokens + segment;
  const auto is_full = [&](const int64_t* row) { return row[kSteadyTokens] >= full; };
  // Exactly: all open tokens together begin where a cluster does.
  const auto is_ripe = [&](const int64_t* row) { return merged > 0 && row[kOpenTokens] == merged; };
  while (for_heads_of(params, is_full, [&](int64_t b, int64_t h) {
    grow_head<T>(params, b, h, params.index.counters[b * kCounters + kSteadyTokens]);
  })) {
    for (int64_t b = 0; b < params.batch; ++b) {
      int64_t* row = params.index.counters + b * kCounters;
      if (!is_full(row)) continue;
      row[kSteadyTokens] -= segment;
      row[kIndexedTokens] += segment;
      row[kClusters] += cluster_count(segment, params.cluster_size);
      row[kUpdates] += 1;
      if (merged > 0) row[kOpenTokens] += segment;
    }
    for_heads_of(
        params, is_ripe, [&](int64_t b, int64_t h) { merge_head<T>(params, b, h, merged); });
    for (int64_t b = 0; b < params.batch; ++b) {
      int64_t* row = params.index.counters + b * kCounters;
      if (is_ripe(row)) row[kOpenTokens] = 0;
    }
  }
}

void grow_index(const GrowIndexParams& params) {
  RETRO_DISPATCH(params.dtype, grow_index_typed, params);
}
