// CPU kernel of pack_clusters. Included inside namespace retro::RETRO_ISA only.

constexpr int64_t kSumRows = 5;  // rows of D floats that pack_tokens works in

// Tokens summed before their sum joins that of the cluster: in one long sum of float32, a cluster of
// hundreds of tokens would lose digits.
constexpr int64_t kSumTokens = 32;

// sum += part; part = 0
inline void fold(float* sum, float* part, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store(sum + i, load(sum + i) + load(part + i));
    store(part + i, floats{});
  }
}

// Where clusters of a row go: their first slot of the store, and the first of their ids.
struct Place {
  int64_t slot, cluster;
};

// Behind what the index holds.
inline Place end_of_index(const IndexView& index, int64_t b) {
  const int64_t* counters = index.counters + b * kCounters;
  return {counters[kIndexedTokens], counters[kClusters]};
}

// Packs `tokens` tokens of one (row, head) into a place of the index: a counting sort by cluster that
// keeps the order of tokens, then means and variances, cluster by cluster.
template <typename T, typename Key, typename Value, typename Assigned>
inline void pack_tokens(
    const IndexView& index,
    Place place,
    int64_t b,
    int64_t h,
    int64_t tokens,
    int64_t clusters,
    int64_t head_dim,
    const Key& key,
    const Value& value,
    const Assigned& assigned,
    float* sums) {
  const int64_t first_cluster = place.cluster;
  int32_t* offsets = index.offsets + (b * index.heads + h) * (index.clusters + 1) + first_cluster;
  float* variances = index.variances + (b * index.heads + h) * index.clusters + first_cluster;
  float* residuals = index.residuals + (b * index.heads + h) * head_dim;
  float* value_sums = index.value_sums + (b * index.heads + h) * head_dim;

  // While tokens are placed, offsets[c + 1] is where the next token of cluster c goes.
  const int32_t first_slot = static_cast<int32_t>(place.slot);
  for (int64_t c = 0; c <= clusters; ++c) offsets[c] = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const int32_t c = assigned(t);
    if (c >= 0 && c + 2 <= clusters) ++offsets[c + 2];
  }
  offsets[0] = first_slot;
  if (clusters > 0) offsets[1] = first_slot;
  for (int64_t c = 2; c <= clusters; ++c) offsets[c] += offsets[c - 1];
  const size_t row_bytes = static_cast<size_t>(head_dim) * sizeof(T);
  for (int64_t t = 0; t < tokens; ++t) {
    const int32_t c = assigned(t);
    if (c < 0) continue;
    const int64_t slot = offsets[c + 1]++;
    std::memcpy(index.store_keys.row<T>(b, h, slot), key(t), row_bytes);
    std::memcpy(index.store_values.row<T>(b, h, slot), value(t), row_bytes);
  }

  float* mean_key = sums;
  float* mean_value = sums + head_dim;
  float* squares = sums + 2 * head_dim;
  float* part = sums + 3 * head_dim;  // of key and value sums, then of squares
  for (int64_t c = 0; c < clusters; ++c) {
    const int64_t first = offsets[c], last = offsets[c + 1];
    std::memset(sums, 0, static_cast<size_t>(kSumRows * head_dim) * sizeof(float));
    for (int64_t slot = first; slot < last; ++slot) {
      const T* k = index.store_keys.row<const T>(b, h, slot);
      const T* v = index.store_values.row<const T>(b, h, slot);
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        store(part + d, load(part + d) + load(k + d));
        store(part + head_dim + d, load(part + head_dim + d) + load(v + d));
      }
      if ((slot + 1 - first) % kSumTokens == 0 || slot + 1 == last) fold(sums, part, 2 * head_dim);
    }
    const float size = static_cast<float>(std::max<int64_t>(last - first, 1));
    T* centroid_key = index.centroid_keys.row<T>(b, h, first_cluster + c);
    T* centroid_value = index.centroid_values.row<T>(b, h, first_cluster + c);
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      store(mean_key + d, load(mean_key + d) / size);
      store(centroid_key + d, load(mean_key + d));
      store(value_sums + d, load(value_sums + d) + load(mean_value + d));
      store(centroid_value + d, load(mean_value + d) / size);
    }
    for (int64_t slot = first; slot < last; ++slot) {
      const T* k = index.store_keys.row<const T>(b, h, slot);
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        const floats residual = load(k + d) - load(mean_key + d);
        store(part + d, load(part + d) + residual * residual);
      }
      if ((slot + 1 - first) % kSumTokens == 0 || slot + 1 == last) fold(squares, part, head_dim);
    }
    floats total{};
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      total += load(squares + d);
      store(residuals + d, load(residuals + d) + load(squares + d));
    }
    variances[c] = reduce_add(total) / size;
  }
}

template <typename T>
void pack_clusters_typed(const PackClustersParams& params) {
  torch::stable::parallel_for(0, params.batch * params.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / params.heads, h = task % params.heads;
      const int32_t* assignment = params.assignment + task * params.tokens;
      Scratch& scratch = Scratch::of_this_thread();
      scratch.begin(Scratch::bytes<float>(kSumRows * params.head_dim));
      pack_tokens<T>(
          params.index, end_of_index(params.index, b), b, h, params.tokens,
          cluster_count(params.packed[b], params.cluster_size), params.head_dim,
          [&](int64_t t) { return params.keys.row<const T>(b, h, t); },
          [&](int64_t t) { return params.values.row<const T>(b, h, t); },
          [&](int64_t t) { return assignment[t]; },
          scratch.take<float>(kSumRows * params.head_dim));
    }
  });
}

void pack_clusters(const PackClustersParams& params) {
  RETRO_DISPATCH(params.dtype, pack_clusters_typed, params);
}
