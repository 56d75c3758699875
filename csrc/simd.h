// Vectors of float32 as wide as a register, in GCC and Clang vector extensions: one source, compiled once
// per instruction set (see cpu_avx512.cpp, cpu_avx2.cpp, cpu_portable.cpp). Included inside namespace
// retro::RETRO_ISA only, after the system headers. head_dim is a multiple of 16, so rows are whole vectors.

#if RETRO_ISA_LEVEL >= 2
constexpr int64_t kLanes = 16;
#elif RETRO_ISA_LEVEL == 1
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

typedef float floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t bits32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t halves __attribute__((vector_size(2 * kLanes)));

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline floats splat(float value) { return floats{} + value; }

inline floats load(const float* p) {
  floats v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline floats load(const bfloat16* p) {
  halves bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bit_cast<floats>(__builtin_convertvector(bits, bits32) << 16);
}

inline floats load(const float16* p) {
#if RETRO_ISA_LEVEL >= 2
  // The zero-masking forms keep GCC 12 from warning about an undefined register.
  return (floats)_mm512_maskz_cvtph_ps(
      0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif RETRO_ISA_LEVEL == 1
  return (floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  halves half;
  std::memcpy(&half, p, sizeof(half));
  const bits32 bits = __builtin_convertvector(half, bits32);
  // Exponent and fraction in place, then 2^112 moves the bias from 15 to 127; subnormals come out right.
  const floats moved = bit_cast<floats>((bits & 0x7fffu) << 13) * bit_cast<float>(0x77800000u);
  const bits32 special = (bits32)((bits & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return bit_cast<floats>(bit_cast<bits32>(moved) | special | ((bits & 0x8000u) << 16));
#endif
}

inline void store(float* p, floats v) { std::memcpy(p, &v, sizeof(v)); }

// Round to nearest, ties to even; NaN stays NaN.
inline void store(bfloat16* p, floats v) {
  const bits32 bits = bit_cast<bits32>(v);
  const bits32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bits32 is_nan = (bits32)(v != v);
  const halves out = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0u), halves);
  std::memcpy(p, &out, sizeof(out));
}

inline void store(float16* p, floats v) {
#if RETRO_ISA_LEVEL >= 2
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, (__m512)v, 0));
#else
  for (int64_t i = 0; i < kLanes; ++i) {
    p[i].bits = torch::headeronly::detail::fp16_ieee_from_fp32_value(v[i]);
  }
#endif
}

inline floats max_each(floats a, floats b) { return a > b ? a : b; }

typedef float quad __attribute__((vector_size(16)));

inline quad lane_sums(floats v) {
#if RETRO_ISA_LEVEL > 0
  typedef float eight __attribute__((vector_size(32)));
  eight part[kLanes / 8];
  std::memcpy(part, &v, sizeof(v));
  for (int64_t i = 1; i < kLanes / 8; ++i) part[0] += part[i];
  quad half[2];
  std::memcpy(half, part, sizeof(half));
  return half[0] + half[1];
#else
  return v;
#endif
}

inline float reduce_add(floats v) {
  const quad sums = lane_sums(v);
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

// The sums of four vectors, each added up in the order of reduce_add, so that a row's logit does not
// depend on its place in a block.
inline quad reduce_add(floats a, floats b, floats c, floats d) {
#if RETRO_ISA_LEVEL >= 2
  const floats ab =
      __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
      __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  const floats cd =
      __builtin_shufflevector(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
      __builtin_shufflevector(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  floats four =
      __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
      __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  four += __builtin_shufflevector(four, four, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  four += __builtin_shufflevector(four, four, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  return __builtin_shufflevector(four, four, 0, 4, 8, 12);
#elif RETRO_ISA_LEVEL == 1
  floats ab = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
      __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  floats cd = __builtin_shufflevector(c, d, 0, 1, 2, 3, 8, 9, 10, 11) +
      __builtin_shufflevector(c, d, 4, 5, 6, 7, 12, 13, 14, 15);
  // sums of lanes 0 and 2, and of 1 and 3, of every vector
  const floats four = __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
      __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
  return __builtin_shufflevector(four, four, 0, 4, 2, 6) +
      __builtin_shufflevector(four, four, 1, 5, 3, 7);
#else
  return quad{reduce_add(a), reduce_add(b), reduce_add(c), reduce_add(d)};
#endif
}

inline float reduce_max(floats v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof(v));
  float best = lanes[0];
  for (int64_t i = 1; i < kLanes; ++i) best = std::max(best, lanes[i]);
  return best;
}

// e^x to about 2 units in the last place; 0 below -87.3, where float32 would go subnormal.
inline floats exp_each(floats x) {
  const floats floor = splat(-87.3f);
  const ints underflow = x < floor;
  x = max_each(x, floor);
  x = x > 88.7f ? splat(88.7f) : x;
  // x = n ln 2 + r with |r| <= ln 2 / 2; adding 1.5 * 2^23 rounds to an integer
  const floats shifted = x * 1.44269504f + 12582912.0f;
  const floats n = shifted - 12582912.0f;
  const floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const ints exponent = (bit_cast<ints>(shifted) - 0x4b400000) << 23;
  const floats result = bit_cast<floats>(bit_cast<ints>(p) + exponent);
  return underflow ? splat(0.0f) : result;
}

template <typename T>
inline void load_row(const T* row, int64_t head_dim, float* out) {
  for (int64_t d = 0; d < head_dim; d += kLanes) store(out + d, load(row + d));
}

// What queries are multiplied as. Products of two bfloat16 are exact in float32, and one instruction
// adds up pairs of them.
#if RETRO_ISA_LEVEL == 3
template <typename T>
using QueryOf = std::conditional_t<std::is_same_v<T, bfloat16>, bfloat16, float>;
#else
template <typename T>
using QueryOf = float;
#endif

template <typename T>
inline void load_query(const T* row, int64_t head_dim, QueryOf<T>* out) {
  if constexpr (std::is_same_v<QueryOf<T>, T>) {
    std::memcpy(out, row, static_cast<size_t>(head_dim) * sizeof(T));
  } else {
    load_row(row, head_dim, out);
  }
}

// sums[r][g] += the products of rows[r] and q[g], spread over lanes
template <int RT, int GT, typename T>
inline void add_products(
    const T* const* rows, const float* q, int64_t head_dim, floats (&sums)[RT][GT]) {
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    floats query[GT];
    for (int g = 0; g < GT; ++g) query[g] = load(q + g * head_dim + d);
    for (int r = 0; r < RT; ++r) {
      const floats key = load(rows[r] + d);
      for (int g = 0; g < GT; ++g) sums[r][g] += key * query[g];
    }
  }
}

#if RETRO_ISA_LEVEL == 3
inline __m512bh load_pairs(const bfloat16* p) {
  __m512bh pairs;
  std::memcpy(&pairs, p, sizeof(pairs));
  return pairs;
}

inline __m512bh load_half(const bfloat16* p) {
  __m512bh pairs{};
  std::memcpy(&pairs, p, sizeof(pairs) / 2);
  return pairs;
}

template <int RT, int GT, typename Load>
inline void add_pairs(
    const bfloat16* const* rows,
    const bfloat16* q,
    int64_t head_dim,
    int64_t d,
    floats (&sums)[RT][GT],
    const Load& load) {
  __m512bh query[GT];
  for (int g = 0; g < GT; ++g) query[g] = load(q + g * head_dim + d);
  for (int r = 0; r < RT; ++r) {
    const __m512bh key = load(rows[r] + d);
    for (int g = 0; g < GT; ++g) {
      sums[r][g] = (floats)_mm512_dpbf16_ps((__m512)sums[r][g], key, query[g]);
    }
  }
}

template <int RT, int GT>
inline void add_products(
    const bfloat16* const* rows, const bfloat16* q, int64_t head_dim, floats (&sums)[RT][GT]) {
  const int64_t whole = head_dim / (2 * kLanes) * (2 * kLanes);
  for (int64_t d = 0; d < whole; d += 2 * kLanes) {
    add_pairs(rows, q, head_dim, d, sums, [](const bfloat16* p) { return load_pairs(p); });
  }
  if (whole != head_dim) {  // head_dim is a multiple of 16, not of 32
    add_pairs(rows, q, head_dim, whole, sums, [](const bfloat16* p) { return load_half(p); });
  }
}
#endif

// logits[g * stride + r] = scale q[g] . rows[r], for a tile of RT rows and GT queries
template <int RT, int GT, typename T>
inline void dot_tile(
    const T* const* rows,
    const QueryOf<T>* q,
    float scale,
    int64_t head_dim,
    float* logits,
    int64_t stride) {
  floats sums[RT][GT] = {};
  add_products(rows, q, head_dim, sums);
  for (int g = 0; g < GT; ++g) {
    if constexpr (RT == 4) {
      const quad four = reduce_add(sums[0][g], sums[1][g], sums[2][g], sums[3][g]) * scale;
      std::memcpy(logits + g * stride, &four, sizeof(four));
    } else {
      for (int r = 0; r < RT; ++r) logits[g * stride + r] = reduce_add(sums[r][g]) * scale;
    }
  }
}

template <int GT, typename T>
inline void dot_strip(
    const T* const* rows,
    int64_t count,
    const QueryOf<T>* q,
    float scale,
    int64_t head_dim,
    float* logits,
    int64_t stride) {
  const int64_t tiled = count / 4 * 4;
  for (int64_t r = 0; r < tiled; r += 4) {
    dot_tile<4, GT>(rows + r, q, scale, head_dim, logits + r, stride);
  }
  for (int64_t i = 0; i < count % 4; ++i) {
    dot_tile<1, GT>(rows + tiled + i, q, scale, head_dim, logits + tiled + i, stride);
  }
}

// logits[g * stride + r] = scale q[g] . rows[r]; q is [groups, head_dim]
template <typename T>
inline void dot_rows(
    const T* const* rows,
    int64_t count,
    const QueryOf<T>* q,
    float scale,
    int64_t groups,
    int64_t head_dim,
    float* logits,
    int64_t stride) {
  int64_t g = 0;
  for (; g + 4 <= groups; g += 4) {
    dot_strip<4>(rows, count, q + g * head_dim, scale, head_dim, logits + g * stride, stride);
  }
  for (; g + 2 <= groups; g += 2) {
    dot_strip<2>(rows, count, q + g * head_dim, scale, head_dim, logits + g * stride, stride);
  }
  for (; g < groups; ++g) {
    dot_strip<1>(rows, count, q + g * head_dim, scale, head_dim, logits + g * stride, stride);
  }
}

// Asks for a row before it is needed: clusters lie anywhere, so no hardware guesses the next one.
template <typename T>
inline void prefetch_row(const T* row, int64_t head_dim) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t d = 0; d < head_dim; d += kLine) __builtin_prefetch(row + d, 0, 3);
}

template <int DT, int GT, typename T>
inline void accumulate_tile(
    const T* const* rows,
    int64_t count,
    int64_t d,
    const float* weights,
    int64_t stride,
    int64_t head_dim,
    float* sums) {
  floats sum[GT][DT];
  // From zero, not from the sum so far: the rounding error grows with the rows of a block, not with
  // those of the context.
  for (int g = 0; g < GT; ++g) {
    for (int i = 0; i < DT; ++i) sum[g][i] = floats{};
  }
  for (int64_t r = 0; r < count; ++r) {
    floats value[DT];
    for (int i = 0; i < DT; ++i) value[i] = load(rows[r] + d + i * kLanes);
    for (int g = 0; g < GT; ++g) {
      for (int i = 0; i < DT; ++i) sum[g][i] += value[i] * weights[g * stride + r];
    }
  }
  for (int g = 0; g < GT; ++g) {
    for (int i = 0; i < DT; ++i) {
      float* to = sums + g * head_dim + d + i * kLanes;
      store(to, load(to) + sum[g][i]);
    }
  }
}

template <int GT, typename T>
inline void accumulate_strip(
    const T* const* rows,
    int64_t count,
    const float* weights,
    int64_t stride,
    int64_t head_dim,
    float* sums) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes) {
    accumulate_tile<4, GT>(rows, count, d, weights, stride, head_dim, sums);
  }
  for (; d < head_dim; d += kLanes) {
    accumulate_tile<1, GT>(rows, count, d, weights, stride, head_dim, sums);
  }
}

// sums[g] += sum_r weights[g * stride + r] rows[r]; sums is float32 [groups, head_dim]
template <typename T>
inline void accumulate_rows(
    const T* const* rows,
    int64_t count,
    const float* weights,
    int64_t stride,
    int64_t groups,
    int64_t head_dim,
    float* sums) {
  int64_t g = 0;
  for (; g + 4 <= groups; g += 4) {
    accumulate_strip<4>(rows, count, weights + g * stride, stride, head_dim, sums + g * head_dim);
  }
  for (; g < groups; ++g) {
    accumulate_strip<1>(rows, count, weights + g * stride, stride, head_dim, sums + g * head_dim);
  }
}
