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
  cluster_segment<T>(key, tokens, clusters, head_dim, params.iterations, memory);
  pack_tokens<T>(
      params.index, b, h, tokens, clusters, head_dim, key, value,
      [&](int64_t t) { return memory.assigned[t]; }, scratch.take<float>(kSumRows * head_dim));
  const size_t row_bytes = static_cast<size_t>(head_dim) * sizeof(T);
  for (int64_t t = 0; t < steady_tokens - params.sink_tokens - tokens; ++t) {
    std::memmove(key(t), key(t + tokens), row_bytes);
    std::memmove(value(t), value(t + tokens), row_bytes);
  }
}

template <typename T>
void grow_index_typed(const GrowIndexParams& params) {
  const int64_t full = params.sink_tokens + params.local_tokens + params.update_segment;
  for (;;) {
    bool grown = false;
    for (int64_t b = 0; b < params.batch; ++b) {
      grown = grown || params.index.counters[b * kCounters + kSteadyTokens] >= full;
    }
    if (!grown) return;
    torch::stable::parallel_for(0, params.batch * params.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / params.heads;
        const int64_t steady_tokens = params.index.counters[b * kCounters + kSteadyTokens];
        if (steady_tokens >= full) grow_head<T>(params, b, task % params.heads, steady_tokens);
      }
    });
    for (int64_t b = 0; b < params.batch; ++b) {
      int64_t* row = params.index.counters + b * kCounters;
      if (row[kSteadyTokens] < full) continue;
      row[kSteadyTokens] -= params.update_segment;
      row[kIndexedTokens] += params.update_segment;
      row[kClusters] += cluster_count(params.update_segment, params.cluster_size);
      row[kUpdates] += 1;
    }
  }
}

void grow_index(const GrowIndexParams& params) {
  RETRO_DISPATCH(params.dtype, grow_index_typed, params);
}
