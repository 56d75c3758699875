// CPU kernel of merged_attention. Included inside namespace retro::RETRO_ISA only.
//
// The working set of a (row, head) is cut into fixed pieces (steady tokens, then ranks), one task each,
// so that all threads work at batch 1; the states of the pieces merge in their order.

constexpr int64_t kBlockTokens = 32;   // tokens scored before the softmax state is updated; a
                                       // block is fetched while the one before is worked on
constexpr int64_t kSteadyPiece = 256;  // steady tokens of one task
constexpr int64_t kRankPiece = 16;     // retrieved clusters of one task

// Adds blocks of rows to a softmax state.
template <typename T>
struct Attender {
  const MergedAttentionParams& params;
  const QueryOf<T>* query;  // [G, D]
  SoftmaxState state;
  float* logits;  // [G, kBlockTokens]
  const T* keys[2][kBlockTokens];
  const T* values[2][kBlockTokens];
  int64_t count = 0;  // of the block that fills up
  int filling = 0;
  bool waiting = false;  // the other block is full

  void add(const T* key, const T* value) {
    prefetch_row(key, params.head_dim);
    prefetch_row(value, params.head_dim);
    keys[filling][count] = key;
    values[filling][count] = value;
    if (++count < kBlockTokens) return;
    if (waiting) attend(1 - filling, kBlockTokens);
    waiting = true;
    filling = 1 - filling;
    count = 0;
  }

  void finish() {
    if (waiting) attend(1 - filling, kBlockTokens);
    if (count > 0) attend(filling, count);
  }

  void attend(int block_of, int64_t count) {
    const int64_t groups = params.groups, head_dim = params.head_dim;
    dot_rows(keys[block_of], count, query, params.scale, groups, head_dim, logits, kBlockTokens);
    const int64_t padded = round_up(count, kLanes);
    for (int64_t g = 0; g < groups; ++g) {
      float* row = logits + g * kBlockTokens;
      for (int64_t i = count; i < padded; ++i) row[i] = -std::numeric_limits<float>::infinity();
      floats block = splat(-std::numeric_limits<float>::infinity());
      for (int64_t i = 0; i < padded; i += kLanes) block = max_each(block, load(row + i));
      const float largest = reduce_max(block);
      if (largest > state.largest[g]) {
        const float keep = std::exp(state.largest[g] - largest);
        state.largest[g] = largest;
        state.mass[g] *= keep;
        scale_row(state.values + g * head_dim, head_dim, keep);
      }
      floats mass{};
      for (int64_t i = 0; i < padded; i += kLanes) {
        const floats weight = exp_each(load(row + i) - state.largest[g]);
        store(row + i, weight);
        mass += weight;
      }
      state.mass[g] += reduce_add(mass);
    }
    accumulate_rows(values[block_of], count, logits, kBlockTokens, groups, head_dim, state.values);
  }
};

// The tokens of one cluster, in their order, from wherever they lie.
template <typename T>
void attend_cluster(Attender<T>& attender, int64_t b, int64_t h, const int64_t* address) {
  const MergedAttentionParams& params = attender.params;
  const int64_t first = address[0], tokens = address[1];
  const auto add = [&](const Rows& keys, const Rows& values, int64_t slot, int64_t count) {
    for (int64_t t = slot; t < slot + count; ++t) {
      attender.add(keys.row<const T>(b, h, t), values.row<const T>(b, h, t));
    }
  };
  if (params.page_size == 0) return add(params.store_keys, params.store_values, first, tokens);
  const int32_t* page = params.page_table + (b * params.heads + h) * params.entries + address[2];
  for (int64_t t = 0; t < tokens; t += params.page_size, ++page) {
    const int64_t count = std::min(params.page_size, tokens - t);
    if (*page < 0) add(params.store_keys, params.store_values, first + t, count);
    else add(params.page_keys, params.page_values, *page * params.page_size, count);
  }
}

template <typename T>
void merged_attention_typed(const MergedAttentionParams& params) {
  const int64_t tasks = params.batch * params.heads, groups = params.groups;
  const int64_t head_dim = params.head_dim;
  const int64_t steady_pieces = (params.steady_capacity + kSteadyPiece - 1) / kSteadyPiece;
  const int64_t pieces = steady_pieces + (params.retrieved_clusters + kRankPiece - 1) / kRankPiece;
  const int64_t state_floats = SoftmaxState::floats(groups, head_dim);
  const int64_t piece_floats = state_floats + groups * kBlockTokens;
  Scratch& scratch = Scratch::of_this_thread();
  scratch.begin(
      Scratch::bytes<QueryOf<T>>(tasks * groups * head_dim) +
      Scratch::bytes<float>(tasks * std::max<int64_t>(pieces, 1) * piece_floats));
  QueryOf<T>* queries = scratch.take<QueryOf<T>>(tasks * groups * head_dim);
  float* states = scratch.take<float>(tasks * std::max<int64_t>(pieces, 1) * piece_floats);
  for (int64_t task = 0; task < tasks; ++task) {
    for (int64_t g = 0; g < groups; ++g) {
      load_query(
          params.query.row<const T>(task / params.heads, task % params.heads, g), head_dim,
          queries + (task * groups + g) * head_dim);
    }
  }

  torch::stable::parallel_for(0, tasks * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t task = i / pieces, piece = i % pieces;
      const int64_t b = task / params.heads, h = task % params.heads;
      float* memory = states + i * piece_floats;
      const SoftmaxState state = SoftmaxState::at(memory, groups, head_dim);
      state.clear(groups, head_dim);
      Attender<T> attender{
          params, queries + task * groups * head_dim, state, memory + state_floats, {}, {}};
      if (piece < steady_pieces) {
        const int64_t first = piece * kSteadyPiece;
        const int64_t steady_tokens = params.counters[b * kCounters + kSteadyTokens];
        const int64_t last = std::min(first + kSteadyPiece, steady_tokens);
        for (int64_t t = first; t < last; ++t) {
          attender.add(
              params.steady_keys.row<const T>(b, h, t), params.steady_values.row<const T>(b, h, t));
        }
      } else {
        const int64_t first = (piece - steady_pieces) * kRankPiece;
        const int64_t last = std::min(first + kRankPiece, params.retrieved_clusters);
        for (int64_t r = first; r < last; ++r) {
          const int64_t* address =
              params.addresses + params.address_columns * (task * params.retrieved_clusters + r);
          attend_cluster(attender, b, h, address);
        }
      }
      attender.finish();
    }
  });

  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      for (int64_t g = 0; g < groups; ++g) {
        // The state of piece 0 becomes that of the whole working set.
        const SoftmaxState state = SoftmaxState::at(
            states + task * std::max<int64_t>(pieces, 1) * piece_floats, groups, head_dim);
        if (pieces == 0) state.clear(groups, head_dim);
        for (int64_t piece = 1; piece < pieces; ++piece) {
          merge_state(
              state,
              SoftmaxState::at(states + (task * pieces + piece) * piece_floats, groups, head_dim),
              g, head_dim);
        }
        const int64_t q = task * groups + g;
        const float estimate_lse = params.estimate_lse[q];
        const float* estimate = params.estimate + q * head_dim;
        float mass = state.mass[g], largest = state.largest[g], keep = 1.0f, add = 0.0f;
        if (estimate_lse != -std::numeric_limits<float>::infinity()) {
          const float top = mass == 0.0f ? estimate_lse : std::max(largest, estimate_lse);
          keep = mass == 0.0f ? 0.0f : std::exp(largest - top);
          add = std::exp(estimate_lse - top);
          mass = mass * keep + add;
          largest = top;
        }
        T* out = static_cast<T*>(params.out) + q * head_dim;
        const float* values = state.values + g * head_dim;
        if (mass == 0.0f) {  // nothing to attend to
          for (int64_t d = 0; d < head_dim; d += kLanes) store(out + d, splat(0.0f));
          params.lse[q] = -std::numeric_limits<float>::infinity();
          continue;
        }
        const float inverse = 1.0f / mass;
        for (int64_t d = 0; d < head_dim; d += kLanes) {
          floats sum = load(values + d) * (keep * inverse);
          if (add > 0.0f) sum += load(estimate + d) * (add * inverse);
          store(out + d, sum);
        }
        params.lse[q] = largest + std::log(mass);
      }
    }
  });
}

void merged_attention(const MergedAttentionParams& params) {
  RETRO_DISPATCH(params.dtype, merged_attention_typed, params);
}
