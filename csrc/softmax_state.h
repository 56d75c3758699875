// The online-softmax state of a set of tokens, for G queries: largest logit m, sum of e^(logit - m), and
// the values weighted alike. States of disjoint sets merge into the state of their union; the merge is
// associative and commutative up to rounding. Included inside namespace retro::RETRO_ISA only.

struct SoftmaxState {
  float* largest;  // [G]; -inf when empty
  float* mass;     // [G]
  float* values;   // [G, D]

  static int64_t floats(int64_t groups, int64_t head_dim) {
    return round_up(2 * groups, kLanes) + groups * head_dim;
  }

  static SoftmaxState at(float* memory, int64_t groups, int64_t head_dim) {
    (void)head_dim;
    return {memory, memory + groups, memory + round_up(2 * groups, kLanes)};
  }

  void clear(int64_t groups, int64_t head_dim) const {
    for (int64_t g = 0; g < groups; ++g) {
      largest[g] = -std::numeric_limits<float>::infinity();
      mass[g] = 0.0f;
    }
    std::memset(values, 0, static_cast<size_t>(groups * head_dim) * sizeof(float));
  }
};

inline void scale_row(float* row, int64_t head_dim, float factor) {
  for (int64_t d = 0; d < head_dim; d += kLanes) store(row + d, load(row + d) * factor);
}

// into += from, one query
inline void merge_state(
    const SoftmaxState& into, const SoftmaxState& from, int64_t g, int64_t head_dim) {
  if (from.mass[g] == 0.0f) return;
  const float largest = std::max(into.largest[g], from.largest[g]);
  const float keep = into.mass[g] == 0.0f ? 0.0f : std::exp(into.largest[g] - largest);
  const float add = std::exp(from.largest[g] - largest);
  into.largest[g] = largest;
  into.mass[g] = into.mass[g] * keep + from.mass[g] * add;
  float* values = into.values + g * head_dim;
  const float* other = from.values + g * head_dim;
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    store(values + d, load(values + d) * keep + load(other + d) * add);
  }
}
