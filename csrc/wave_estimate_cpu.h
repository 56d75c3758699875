// CPU kernel of wave_estimate. Included inside namespace retro::RETRO_ISA only.
//
// With logit_gi = scale q_g . c_i, cluster i has for query g the estimated mass
//   mass_gi = size_i (1 + v_gi) exp(logit_gi),   v_gi = scale^2 / 2 variance_i sum_d q_gd^2 residual_d,
// residual normalised to sum to 1 (v = 0 for the paper's estimator). Clusters rank by the mass relative
// to the row's total, summed over the G queries of a KV head; the paper ranks by exp(logit) alone.
// The tail, clusters neither retrieved nor estimated, counts with its mass at the mean of all values; the
// paper has none.

constexpr int64_t kScoreChunk = 256;     // clusters scored by one task
constexpr int64_t kScoreAhead = 32;      // clusters fetched ahead: hardware stops at every page
constexpr int64_t kEstimateChunk = 512;  // clusters estimated by one task; fixed, as sums are then
constexpr int64_t kSmallTasks = 16;      // (row, head)s whose short steps are not worth a thread

template <typename T>
struct WaveMemory {
  int64_t padded;     // C rounded up to whole vectors
  int64_t partials;   // estimation tasks of one (row, head)
  QueryOf<T>* query;  // [B * Hkv, G, D]
  float* spread;      // [B * Hkv, G]: v_gi / variance_i
  float* mass;        // [B * Hkv, G, padded]: logits, then masses, then those of estimated clusters
  float* rank;        // [B * Hkv, padded]: a query's ranking terms; then 1 in the tail
  float* score;       // [B * Hkv, padded]
  uint64_t* keys;     // [B * Hkv, padded]: sort keys
  uint64_t* spare;    // [B * Hkv, padded]: some of them in order
  int32_t* estimated;  // [B * Hkv, padded]: ids of the estimated clusters, ascending
  float* largest;      // [B * Hkv, G]: largest logit
  double* tail;        // [B * Hkv, G]: mass of the tail
  float* sums;         // [B * Hkv, partials, G, D]
  int64_t* chosen;     // [B * Hkv]: number of estimated clusters
};

template <typename T>
inline WaveMemory<T> wave_memory(const WaveEstimateParams& params) {
  const int64_t tasks = params.batch * params.heads, groups = params.groups;
  WaveMemory<T> memory;
  memory.padded = round_up(std::max<int64_t>(params.clusters, 1), kLanes);
  memory.partials = (params.clusters + kEstimateChunk - 1) / kEstimateChunk;
  const int64_t sums = tasks * memory.partials * groups * params.head_dim;
  Scratch& scratch = Scratch::of_this_thread();
  scratch.begin(
      Scratch::bytes<QueryOf<T>>(tasks * groups * params.head_dim) +
      2 * Scratch::bytes<float>(tasks * groups) + Scratch::bytes<double>(tasks * groups) +
      Scratch::bytes<float>(tasks * groups * memory.padded) +
      2 * Scratch::bytes<float>(tasks * memory.padded) +
      2 * Scratch::bytes<uint64_t>(tasks * memory.padded) +
      Scratch::bytes<int32_t>(tasks * memory.padded) + Scratch::bytes<float>(sums) +
      Scratch::bytes<int64_t>(tasks));
  memory.query = scratch.take<QueryOf<T>>(tasks * groups * params.head_dim);
  memory.spread = scratch.take<float>(tasks * groups);
  memory.largest = scratch.take<float>(tasks * groups);
  memory.tail = scratch.take<double>(tasks * groups);
  memory.mass = scratch.take<float>(tasks * groups * memory.padded);
  memory.rank = scratch.take<float>(tasks * memory.padded);
  memory.score = scratch.take<float>(tasks * memory.padded);
  memory.keys = scratch.take<uint64_t>(tasks * memory.padded);
  memory.spare = scratch.take<uint64_t>(tasks * memory.padded);
  memory.estimated = scratch.take<int32_t>(tasks * memory.padded);
  memory.sums = scratch.take<float>(sums);
  memory.chosen = scratch.take<int64_t>(tasks);
  return memory;
}

template <typename T>
inline void prepare_query(
    const WaveEstimateParams& params, const WaveMemory<T>& memory, int64_t task) {
  const int64_t b = task / params.heads, h = task % params.heads, head_dim = params.head_dim;
  const float* residuals = params.residuals + task * head_dim;
  floats total{};
  for (int64_t d = 0; d < head_dim; d += kLanes) total += load(residuals + d);
  const float residual_sum = reduce_add(total);
  for (int64_t g = 0; g < params.groups; ++g) {
    const T* query = params.query.row<const T>(b, h, g);
    load_query(query, head_dim, memory.query + (task * params.groups + g) * head_dim);
    floats spread{};
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const floats q = load(query + d) * params.scale;
      spread += q * q * load(residuals + d);
    }
    const bool spreads = params.use_variance && residual_sum > 0.0f;
    memory.spread[task * params.groups + g] =
        spreads ? 0.5f * reduce_add(spread) / residual_sum : 0.0f;
  }
}

template <typename T>
inline void score_chunk(
    const WaveEstimateParams& params,
    const WaveMemory<T>& memory,
    int64_t task,
    int64_t first,
    int64_t last) {
  const int64_t b = task / params.heads, h = task % params.heads;
  const QueryOf<T>* query = memory.query + task * params.groups * params.head_dim;
  float* logits = memory.mass + task * params.groups * memory.padded;
  const T* rows[kLanes];
  for (int64_t c = first; c < last; c += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, last - c);
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = params.centroid_keys.row<const T>(b, h, c + i);
      if (c + i + kScoreAhead < params.clusters) {
        prefetch_row(params.centroid_keys.row<const T>(b, h, c + i + kScoreAhead), params.head_dim);
      }
    }
    dot_rows(
        rows, count, query, params.scale, params.groups, params.head_dim, logits + c,
        memory.padded);
  }
}

// sizes of clusters c .. c + 15, 0 behind the last live one
inline floats sizes_at(const int32_t* offsets, int64_t c, int64_t live) {
  if (c + kLanes <= live) {
    ints begin, end;
    std::memcpy(&begin, offsets + c, sizeof(begin));
    std::memcpy(&end, offsets + c + 1, sizeof(end));
    return __builtin_convertvector(end - begin, floats);
  }
  floats sizes{};
  for (int64_t i = 0; c + i < live; ++i) {
    sizes[i] = static_cast<float>(offsets[c + i + 1] - offsets[c + i]);
  }
  return sizes;
}

inline floats variances_at(const float* variances, int64_t c, int64_t live) {
  if (c + kLanes <= live) return load(variances + c);
  floats values{};
  for (int64_t i = 0; c + i < live; ++i) values[i] = variances[c + i];
  return values;
}

// Logits become masses; the score of a cluster is its share, summed over the queries of the KV head.
template <typename T>
inline void rank_clusters(
    const WaveEstimateParams& params, const WaveMemory<T>& memory, int64_t task, int64_t live) {
  const int32_t* offsets = params.offsets + task * (params.clusters + 1);
  const float* variances = params.variances + task * params.clusters;
  float* score = memory.score + task * memory.padded;
  float* rank = memory.rank + task * memory.padded;
  const int64_t padded = round_up(live, kLanes);
  for (int64_t c = 0; c < padded; c += kLanes) store(score + c, splat(0.0f));
  for (int64_t g = 0; g < params.groups; ++g) {
    float* mass = memory.mass + (task * params.groups + g) * memory.padded;
    // An empty cluster has no logit: its centroid, 0, could outdo all others and drown them.
    const floats none = splat(-std::numeric_limits<float>::infinity());
    floats largest = none;
    for (int64_t c = 0; c < padded; c += kLanes) {
      const floats logit = sizes_at(offsets, c, live) > 0.0f ? load(mass + c) : none;
      store(mass + c, logit);
      largest = max_each(largest, logit);
    }
    const float top = reduce_max(largest);
    memory.largest[task * params.groups + g] = top;
    const float spread = memory.spread[task * params.groups + g];
    floats total{};
    for (int64_t c = 0; c < padded; c += kLanes) {
      const floats weight = exp_each(load(mass + c) - top);
      const floats size = sizes_at(offsets, c, live);
      const floats estimated = weight * size * (variances_at(variances, c, live) * spread + 1.0f);
      const floats ranked = params.use_variance ? estimated : weight;
      store(mass + c, estimated);
      store(rank + c, ranked);
      total += ranked;
    }
    const float inverse = 1.0f / reduce_add(total);
    for (int64_t c = 0; c < padded; c += kLanes) {
      store(score + c, load(score + c) + load(rank + c) * inverse);
    }
  }
}

// Ascending keys are descending scores, ties by cluster id. A cluster without tokens, or whose score is
// not a number, comes behind all others.
inline uint64_t sort_key(float score, int32_t size, int64_t cluster) {
  const bool valid = size > 0 && score >= 0.0f;
  const uint64_t high = valid ? 0xfffffffeull - bit_cast<uint32_t>(score) : 0xffffffffull;
  return high << 32 | static_cast<uint64_t>(cluster);
}

// Keys are counted by their first 12 bits: sign, exponent and three bits of the score's fraction.
constexpr int kBinShift = 52;
constexpr int64_t kBins = int64_t{1} << (64 - kBinShift);

// The key that `rank` of the keys are smaller than. Only the keys of its bin are put in order.
inline uint64_t key_of_rank(
    const uint64_t* keys, int64_t count, const int32_t* bins, int64_t rank, uint64_t* spare) {
  int64_t bin = 0, before = 0;
  while (before + bins[bin] <= rank) before += bins[bin++];
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    spare[found] = keys[i];
    found += static_cast<int64_t>(keys[i] >> kBinShift) == bin;
  }
  std::nth_element(spare, spare + (rank - before), spare + found);
  return spare[rank - before];
}

// The mass of a query's tail, in chunks as the estimated masses: never what is left of a total, which
// would cancel.
inline double tail_mass(const float* mass, const float* in_tail, int64_t padded) {
  double total = 0.0;
  for (int64_t first = 0; first < padded; first += kEstimateChunk) {
    floats chunk{};
    const int64_t last = std::min(first + kEstimateChunk, padded);
    for (int64_t c = first; c < last; c += kLanes) {
      chunk += load(in_tail + c) > 0.0f ? load(mass + c) : floats{};
    }
    total += reduce_add(chunk);
  }
  return total;
}

template <typename T>
inline void choose_clusters(
    const WaveEstimateParams& params, const WaveMemory<T>& memory, int64_t task, int64_t live) {
  const int32_t* offsets = params.offsets + task * (params.clusters + 1);
  const float* score = memory.score + task * memory.padded;
  uint64_t* keys = memory.keys + task * memory.padded;
  uint64_t* spare = memory.spare + task * memory.padded;
  int32_t bins[kBins] = {};
  for (int64_t c = 0; c < live; ++c) {
    keys[c] = sort_key(score[c], offsets[c + 1] - offsets[c], c);
    ++bins[keys[c] >> kBinShift];
  }
  const int64_t retrieved =
      retrieved_count(params.retrieval_budget, params.min_retrieved_clusters, live);
  const int64_t estimated =
      std::min(budget_count(params.estimation_budget, live), live - retrieved);
  // Keys of retrieved clusters lie below `first`, those of estimated ones below `last`.
  const auto key_at = [&](int64_t rank) {
    return rank < live ? key_of_rank(keys, live, bins, rank, spare) : ~0ull;
  };
  const uint64_t first = key_at(retrieved);
  const uint64_t last = estimated > 0 ? key_at(retrieved + estimated) : first;
  int64_t found = 0;
  for (int64_t c = 0; c < live; ++c) {
    if (keys[c] < first) spare[found++] = keys[c];
  }
  std::sort(spare, spare + retrieved);
  int32_t* ids = params.retrieved + task * params.max_retrieved;
  for (int64_t r = 0; r < retrieved; ++r) ids[r] = static_cast<int32_t>(spare[r] & 0xffffffffu);
  for (int64_t r = retrieved; r < params.max_retrieved; ++r) ids[r] = -1;
  memory.chosen[task] = estimated;
  float* in_tail = memory.rank + task * memory.padded;
  for (int64_t c = 0; c < live; ++c) in_tail[c] = keys[c] >= last ? 1.0f : 0.0f;
  const bool has_tail = params.use_variance && retrieved + estimated < live;
  for (int64_t g = 0; g < params.groups; ++g) {
    const float* mass = memory.mass + (task * params.groups + g) * memory.padded;
    // Behind the live clusters masses are 0.
    memory.tail[task * params.groups + g] =
        has_tail ? tail_mass(mass, in_tail, round_up(live, kLanes)) : 0.0;
  }
  if (estimated == 0) return;

  // Estimated clusters in the order of memory, so that sums come out the same every time; their
  // masses move together. The place that is written never passes the one that is read.
  int32_t* estimated_ids = memory.estimated + task * memory.padded;
  float* mass = memory.mass + task * params.groups * memory.padded;
  int64_t e = 0;
  for (int64_t c = 0; c < live; ++c) {
    estimated_ids[e] = static_cast<int32_t>(c);
    for (int64_t g = 0; g < params.groups; ++g) {
      mass[g * memory.padded + e] = mass[g * memory.padded + c];
    }
    e += keys[c] >= first && keys[c] < last;
  }
  for (int64_t g = 0; g < params.groups; ++g) {
    for (int64_t i = e; i < round_up(e, kLanes); ++i) mass[g * memory.padded + i] = 0.0f;
  }
}

template <typename T>
inline void estimate_chunk(
    const WaveEstimateParams& params, const WaveMemory<T>& memory, int64_t task, int64_t partial) {
  const int64_t b = task / params.heads, h = task % params.heads;
  const int64_t groups = params.groups, head_dim = params.head_dim;
  const int64_t first = partial * kEstimateChunk;
  const int64_t last = std::min(first + kEstimateChunk, memory.chosen[task]);
  if (first >= last) return;
  const int32_t* ids = memory.estimated + task * memory.padded;
  const float* mass = memory.mass + task * groups * memory.padded;
  float* sums = memory.sums + (task * memory.partials + partial) * groups * head_dim;
  std::memset(sums, 0, static_cast<size_t>(groups * head_dim) * sizeof(float));
  constexpr int64_t kBlock = 32;
  const T* rows[kEstimateChunk];
  for (int64_t e = first; e < last; ++e) {
    rows[e - first] = params.centroid_values.row<const T>(b, h, ids[e]);
    if (e - first < kBlock) prefetch_row(rows[e - first], head_dim);
  }
  for (int64_t e = first; e < last; e += kBlock) {
    for (int64_t next = e + kBlock; next < std::min(e + 2 * kBlock, last); ++next) {
      prefetch_row(rows[next - first], head_dim);
    }
    accumulate_rows(
        rows + (e - first), std::min(kBlock, last - e), mass + e, memory.padded, groups, head_dim,
        sums);
  }
}

template <typename T>
inline void finish_estimate(
    const WaveEstimateParams& params, const WaveMemory<T>& memory, int64_t task) {
  const int64_t groups = params.groups, head_dim = params.head_dim;
  const int64_t* counters = params.counters + task / params.heads * kCounters;
  const int64_t tokens = std::max<int64_t>(counters[kIndexedTokens], 1);
  const float* value_sums = params.value_sums + task * head_dim;
  const int64_t estimated = memory.chosen[task];
  const int64_t partials = (estimated + kEstimateChunk - 1) / kEstimateChunk;
  for (int64_t g = 0; g < groups; ++g) {
    const float* mass = memory.mass + (task * groups + g) * memory.padded;
    double total = 0.0;
    for (int64_t first = 0; first < estimated; first += kEstimateChunk) {
      floats chunk{};
      const int64_t last = std::min(first + kEstimateChunk, estimated);
      for (int64_t e = first; e < last; e += kLanes) chunk += load(mass + e);
      total += reduce_add(chunk);
    }
    const double tail = memory.tail[task * groups + g];
    total += tail;
    float* out = params.estimate + (task * groups + g) * head_dim;
    float& lse = params.estimate_lse[task * groups + g];
    if (total == 0.0) {
      std::memset(out, 0, static_cast<size_t>(head_dim) * sizeof(float));
      lse = -std::numeric_limits<float>::infinity();
      continue;
    }
    lse = memory.largest[task * groups + g] + static_cast<float>(std::log(total));
    const float inverse = static_cast<float>(1.0 / total);
    const float of_value_sums = static_cast<float>(tail / total / static_cast<double>(tokens));
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      floats sum{};
      for (int64_t p = 0; p < partials; ++p) {
        sum += load(memory.sums + ((task * memory.partials + p) * groups + g) * head_dim + d);
      }
      sum = sum * inverse;
      if (tail > 0.0) sum += load(value_sums + d) * of_value_sums;
      store(out + d, sum);
    }
  }
}

template <typename T>
void wave_estimate_typed(const WaveEstimateParams& params) {
  const WaveMemory<T> memory = wave_memory<T>(params);
  const int64_t tasks = params.batch * params.heads;
  const auto live = [&](int64_t task) {
    return params.counters[task / params.heads * kCounters + kClusters];
  };
  torch::stable::parallel_for(0, tasks, kSmallTasks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) prepare_query<T>(params, memory, task);
  });
  const int64_t chunks = (params.clusters + kScoreChunk - 1) / kScoreChunk;
  torch::stable::parallel_for(0, tasks * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t task = i / chunks, first = i % chunks * kScoreChunk;
      const int64_t last = std::min(first + kScoreChunk, live(task));
      if (first < last) score_chunk<T>(params, memory, task, first, last);
    }
  });
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      rank_clusters<T>(params, memory, task, live(task));
      choose_clusters<T>(params, memory, task, live(task));
    }
  });
  torch::stable::parallel_for(0, tasks * memory.partials, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      estimate_chunk<T>(params, memory, i / memory.partials, i % memory.partials);
    }
  });
  torch::stable::parallel_for(0, tasks, kSmallTasks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) finish_estimate<T>(params, memory, task);
  });
}

void wave_estimate(const WaveEstimateParams& params) {
  RETRO_DISPATCH(params.dtype, wave_estimate_typed, params);
}
