// CPU kernel of cluster_keys. Included inside namespace retro::RETRO_ISA only.
//
// One task is one segment of one (row, head): its keys, centred, in float32, and its centroids as panels
// [D, kPanel] so that a lane is a cluster. Tokens are summed in their order, so the same keys give the
// same clusters, bit for bit, on any number of threads.

constexpr int64_t kPanel = 2 * kLanes;  // clusters scored together
#if RETRO_ISA_LEVEL >= 2
constexpr int kTile = 12;  // tokens scored together: 24 of 32 registers hold sums
#else
constexpr int kTile = 6;  // 12 of 16
#endif

// What inner products are made of. Pairs of bfloat16 take half the time of float32; rounding a centred key
// moves only ties that are as good as equal.
#if RETRO_ISA_LEVEL == 3
using Scored = bfloat16;
constexpr int64_t kStep = 2;  // neighbours in a row that one instruction multiplies
#else
using Scored = float;
constexpr int64_t kStep = 1;
#endif
constexpr bool kRounded = !std::is_same_v<Scored, float>;

struct Segment {
  int64_t first, tokens;  // in the span
  int64_t cluster, clusters;
};

inline Segment segment_at(int64_t index, int64_t segments, int64_t tokens, int64_t clusters) {
  const int64_t first = tokens * index / segments;
  const int64_t cluster = clusters * index / segments;
  return {
      first, tokens * (index + 1) / segments - first, cluster,
      clusters * (index + 1) / segments - cluster};
}

struct SegmentMemory {
  float* keys;        // [tokens rounded up to kTile, D], centred
  Scored* scored;     // [tokens rounded up to kTile, D], as scored; the same memory in float32
  Scored* panels;     // [clusters rounded up to kPanel, D], unit centroids as panels
  float* sums;        // [clusters, D]
  int64_t* counts;    // [clusters]
  float* distances;   // [outliers]: of the farthest keys from the means of their clusters, squared
  int64_t* farthest;  // [outliers]: those keys
  double* mean;       // [D]
  int32_t* assigned;  // [tokens rounded up to kTile]

  static size_t bytes(int64_t tokens, int64_t clusters, int64_t head_dim) {
    const int64_t rows = round_up(tokens, kTile);
    return Scratch::bytes<float>(rows * head_dim) +
        Scratch::bytes<Scored>(kRounded ? rows * head_dim : 0) +
        Scratch::bytes<Scored>(round_up(clusters, kPanel) * head_dim) +
        Scratch::bytes<float>(clusters * head_dim) + Scratch::bytes<int64_t>(clusters) +
        Scratch::bytes<float>(outlier_count(tokens, clusters)) +
        Scratch::bytes<int64_t>(outlier_count(tokens, clusters)) +
        Scratch::bytes<double>(head_dim) + Scratch::bytes<int32_t>(rows);
  }

  static SegmentMemory take(Scratch& scratch, int64_t tokens, int64_t clusters, int64_t head_dim) {
    const int64_t rows = round_up(tokens, kTile);
    SegmentMemory memory;
    memory.keys = scratch.take<float>(rows * head_dim);
#if RETRO_ISA_LEVEL == 3
    memory.scored = scratch.take<Scored>(rows * head_dim);
#else
    memory.scored = memory.keys;
#endif
    memory.panels = scratch.take<Scored>(round_up(clusters, kPanel) * head_dim);
    memory.sums = scratch.take<float>(clusters * head_dim);
    memory.counts = scratch.take<int64_t>(clusters);
    memory.distances = scratch.take<float>(outlier_count(tokens, clusters));
    memory.farthest = scratch.take<int64_t>(outlier_count(tokens, clusters));
    memory.mean = scratch.take<double>(head_dim);
    memory.assigned = scratch.take<int32_t>(rows);
    return memory;
  }
};

inline float norm_of(const float* row, int64_t head_dim) {
  floats squares{};
  for (int64_t d = 0; d < head_dim; d += kLanes) squares += load(row + d) * load(row + d);
  return std::sqrt(reduce_add(squares));
}

// The direction of `row` becomes the centroid of `cluster`; a zero row keeps the old one.
inline void set_centroid(Scored* panels, int64_t cluster, const float* row, int64_t head_dim) {
  const float norm = norm_of(row, head_dim);
  if (!(norm > 0.0f)) return;
  float unit[kMaxHeadDim];
  for (int64_t d = 0; d < head_dim; d += kLanes) store(unit + d, load(row + d) / norm);
  alignas(64) Scored scored[kMaxHeadDim];
  for (int64_t d = 0; d < head_dim; d += kLanes) store(scored + d, load(unit + d));
  Scored* panel = panels + cluster / kPanel * kPanel * head_dim + cluster % kPanel * kStep;
  for (int64_t d = 0; d < head_dim; d += kStep) {
    for (int64_t i = 0; i < kStep; ++i) panel[d * kPanel + i] = scored[d + i];
  }
}

// sums[t][i] += the products of kStep neighbours of token t with kPanel clusters
inline void score_step(
    const Scored* keys, const Scored* panel, int64_t head_dim, floats (&sums)[kTile][2]) {
#if RETRO_ISA_LEVEL == 3
  const __m512bh low = (__m512bh)_mm512_loadu_si512(panel);
  const __m512bh high = (__m512bh)_mm512_loadu_si512(panel + kStep * kLanes);
  for (int t = 0; t < kTile; ++t) {
    int32_t pair;
    std::memcpy(&pair, keys + t * head_dim, sizeof(pair));
    const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
    sums[t][0] = (floats)_mm512_dpbf16_ps((__m512)sums[t][0], low, x);
    sums[t][1] = (floats)_mm512_dpbf16_ps((__m512)sums[t][1], high, x);
  }
#else
  const floats low = load(panel);
  const floats high = load(panel + kLanes);
  for (int t = 0; t < kTile; ++t) {
    const float x = keys[t * head_dim];
    sums[t][0] += low * x;
    sums[t][1] += high * x;
  }
#endif
}

// The cluster with the largest inner product for each of kTile tokens; ties go to the lower cluster.
inline void assign_tile(
    const Scored* keys,
    const Scored* panels,
    int64_t clusters,
    int64_t head_dim,
    int32_t* assigned) {
  floats best[kTile][2];
  ints best_panel[kTile][2];
  for (int t = 0; t < kTile; ++t) {
    for (int i = 0; i < 2; ++i) {
      best[t][i] = splat(-std::numeric_limits<float>::infinity());
      best_panel[t][i] = ints{};
    }
  }
  const int64_t panel_count = round_up(clusters, kPanel) / kPanel;
  for (int64_t p = 0; p < panel_count; ++p) {
    const Scored* panel = panels + p * kPanel * head_dim;
    floats scores[kTile][2] = {};
    for (int64_t d = 0; d < head_dim; d += kStep) {
      score_step(keys + d, panel + d * kPanel, head_dim, scores);
    }
    const int32_t base = static_cast<int32_t>(p);
    const bool full = (p + 1) * kPanel <= clusters;
    for (int t = 0; t < kTile; ++t) {
      for (int i = 0; i < 2; ++i) {
        if (!full) {
          for (int64_t lane = 0; lane < kLanes; ++lane) {
            if (p * kPanel + i * kLanes + lane >= clusters) {
              scores[t][i][lane] = -std::numeric_limits<float>::infinity();
            }
          }
        }
        const ints better = scores[t][i] > best[t][i];
        best[t][i] = better ? scores[t][i] : best[t][i];
        best_panel[t][i] = better ? (ints{} + base) : best_panel[t][i];
      }
    }
  }
  for (int t = 0; t < kTile; ++t) {
    float score = -std::numeric_limits<float>::infinity();
    int32_t cluster = 0;
    for (int i = 0; i < 2; ++i) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const float s = best[t][i][lane];
        const int32_t c = static_cast<int32_t>(best_panel[t][i][lane] * kPanel + i * kLanes + lane);
        if (s > score || (s == score && c < cluster)) {
          score = s;
          cluster = c;
        }
      }
    }
    assigned[t] = cluster;
  }
}

// Centroids of outliers, behind the `regular` ones: of the keys t, t + outliers, ... each gets the one that
// is farthest from the mean of its cluster, by the sums and counts of the last pass. Neighbours in the
// text, the digits of one number, do not compete.
inline void set_outliers(
    const SegmentMemory& memory,
    int64_t tokens,
    int64_t regular,
    int64_t outliers,
    int64_t head_dim) {
  for (int64_t i = 0; i < outliers; ++i) memory.distances[i] = -1.0f;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t c = memory.assigned[t], i = t % outliers;
    const float* sum = memory.sums + c * head_dim;
    const float* row = memory.keys + t * head_dim;
    const float inverse = 1.0f / static_cast<float>(memory.counts[c]);
    floats squares{};
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const floats difference = load(row + d) - load(sum + d) * inverse;
      squares += difference * difference;
    }
    const float distance = reduce_add(squares);
    if (distance > memory.distances[i]) {
      memory.distances[i] = distance;
      memory.farthest[i] = t;
    }
  }
  for (int64_t i = 0; i < outliers; ++i) {
    if (memory.distances[i] < 0.0f) continue;  // no number
    const float* row = memory.keys + memory.farthest[i] * head_dim;
    set_centroid(memory.panels, regular + i, row, head_dim);
  }
}

// Clusters `tokens` rows, starting at key(0), into ids 0 .. clusters - 1, left in memory.assigned. Centroid
// c begins as seed(c), a row like those of keys, but for the last `outliers`, which set_outliers makes.
template <typename T, typename Key, typename Seed>
inline void cluster_segment(
    const Key& key,
    const Seed& seed,
    int64_t tokens,
    int64_t clusters,
    int64_t outliers,
    int64_t head_dim,
    int64_t iterations,
    const SegmentMemory& memory) {
  for (int64_t d = 0; d < head_dim; ++d) memory.mean[d] = 0.0;
  for (int64_t t = 0; t < tokens; ++t) {
    float* row = memory.keys + t * head_dim;
    load_row(static_cast<const T*>(key(t)), head_dim, row);
    for (int64_t d = 0; d < head_dim; ++d) memory.mean[d] += row[d];
  }
  for (int64_t d = 0; d < head_dim; ++d) memory.mean[d] /= static_cast<double>(tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    float* row = memory.keys + t * head_dim;
    for (int64_t d = 0; d < head_dim; ++d) row[d] -= static_cast<float>(memory.mean[d]);
  }
  const int64_t rows = round_up(tokens, kTile);
  std::memset(
      memory.keys + tokens * head_dim, 0,
      static_cast<size_t>((rows - tokens) * head_dim) * sizeof(float));
  if constexpr (kRounded) {
    for (int64_t i = 0; i < rows * head_dim; i += kLanes)
      store(memory.scored + i, load(memory.keys + i));
  }
  std::memset(
      memory.panels, 0,
      static_cast<size_t>(round_up(clusters, kPanel) * head_dim) * sizeof(Scored));
  const int64_t regular = clusters - outliers;
  for (int64_t c = 0; c < regular; ++c) {
    float row[kMaxHeadDim];
    load_row(static_cast<const T*>(seed(c)), head_dim, row);
    for (int64_t d = 0; d < head_dim; ++d) row[d] -= static_cast<float>(memory.mean[d]);
    set_centroid(memory.panels, c, row, head_dim);
  }
  for (int64_t pass = 0; pass < iterations; ++pass) {
    if (pass > 0) {
      const int64_t before = clusters_in_pass(clusters, outliers, pass - 1);
      std::memset(memory.sums, 0, static_cast<size_t>(before * head_dim) * sizeof(float));
      for (int64_t c = 0; c < before; ++c) memory.counts[c] = 0;
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t c = memory.assigned[t];
        float* sum = memory.sums + c * head_dim;
        const float* row = memory.keys + t * head_dim;
        for (int64_t d = 0; d < head_dim; d += kLanes)
          store(sum + d, load(sum + d) + load(row + d));
        ++memory.counts[c];
      }
      for (int64_t c = 0; c < before; ++c) {
        // the sum has the direction of the mean; an empty cluster keeps its centroid
        if (memory.counts[c] > 0)
          set_centroid(memory.panels, c, memory.sums + c * head_dim, head_dim);
      }
      if (pass == kOutlierPass && outliers > 0) {
        set_outliers(memory, tokens, regular, outliers, head_dim);
      }
    }
    const int64_t live = clusters_in_pass(clusters, outliers, pass);
    for (int64_t t = 0; t < rows; t += kTile) {
      assign_tile(memory.scored + t * head_dim, memory.panels, live, head_dim, memory.assigned + t);
    }
  }
}

// The token that cluster c of a segment begins with: they are evenly spaced.
inline int64_t seed_token(int64_t c, int64_t tokens, int64_t clusters) {
  return (2 * c + 1) * tokens / (2 * clusters);
}

template <typename T>
void cluster_keys_typed(const ClusterKeysParams& params) {
  // The most segments any span can have decides the grid; a span with fewer leaves tasks empty.
  const int64_t most_segments = segment_count(params.tokens, params.segment_size);
  const int64_t tasks = params.batch * params.heads * most_segments;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t index = task % most_segments;
      const int64_t h = task / most_segments % params.heads;
      const int64_t b = task / most_segments / params.heads;
      const int64_t first = params.spans[2 * b];
      const int64_t tokens = std::max<int64_t>(params.spans[2 * b + 1] - first, 0);
      int32_t* assignment = params.assignment + (b * params.heads + h) * params.tokens;
      if (index == 0) {
        for (int64_t t = 0; t < params.tokens; ++t) {
          if (tokens == 0 || t < first || t >= first + tokens) assignment[t] = -1;
        }
      }
      if (tokens == 0) continue;
      const int64_t segments = segment_count(tokens, params.segment_size);
      if (index >= segments) continue;
      const Segment segment =
          segment_at(index, segments, tokens, cluster_count(tokens, params.cluster_size));
      Scratch& scratch = Scratch::of_this_thread();
      scratch.begin(SegmentMemory::bytes(segment.tokens, segment.clusters, params.head_dim));
      const SegmentMemory memory =
          SegmentMemory::take(scratch, segment.tokens, segment.clusters, params.head_dim);
      const auto key = [&](int64_t t) {
        return params.keys.row<const T>(b, h, first + segment.first + t);
      };
      const int64_t outliers = outlier_count(segment.tokens, segment.clusters);
      const int64_t regular = segment.clusters - outliers;
      cluster_segment<T>(
          key, [&](int64_t c) { return key(seed_token(c, segment.tokens, regular)); },
          segment.tokens, segment.clusters, outliers, params.head_dim, params.iterations, memory);
      for (int64_t t = 0; t < segment.tokens; ++t) {
        assignment[first + segment.first + t] =
            static_cast<int32_t>(segment.cluster) + memory.assigned[t];
      }
    }
  });
}

void cluster_keys(const ClusterKeysParams& params) {
  RETRO_DISPATCH(params.dtype, cluster_keys_typed, params);
}
