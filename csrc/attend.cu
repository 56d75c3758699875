#include "attend.h"

#include "counters.h"

namespace retro {
namespace {

constexpr int kTileTokens = 16;  // rows of a matrix instruction
constexpr int kAttendWarps = 4;
constexpr int kAttendThreads = kAttendWarps * 32;
// Ranks whose places fit beside the tiles of three blocks on one processor.
constexpr int64_t kRanksInShared = 1280;
constexpr int64_t kBlocksPerProcessor = 2;
// Where there are more (row, head) pairs than that gives pieces: rows differ, and a processor that is done
// early takes another piece.
constexpr int64_t kFewestPieces = 12;
// Of the bytes that attention reads at the default budgets, centroids are about a fourth.
constexpr int64_t kEstimatePercent = 27;

// Sizes of one warp's tile. A warp reads rows in the order in which its lanes feed the matrix units:
// lane 4 r + j holds of keys r and r + 8 every fourth chunk from j, and of values 2 j, 2 j + 1, 2 j + 8,
// 2 j + 9 every eighth chunk from r. Tiles are copied in the order of memory: the loads of eight lanes make
// one access only if they read one line.
template <typename T, int kGroups, int kQueryTiles>
struct Shape {
  static constexpr int kElements = kChunk<T>;
  static constexpr int kValueGroups = (kGroups + 1) / 2;
  static constexpr int kQueries = 8 * kQueryTiles;
  static constexpr int kPadded = kValueGroups * 8 * kElements;  // head_dim rounded up
  static constexpr int kKeyChunks = 2 * kGroups * 32;
  static constexpr int kValueChunks = 4 * kValueGroups * 32;
  static constexpr int kMassWords = 4 * kQueryTiles * 32;
  // Estimates need masses where tokens need keys.
  static constexpr int kTileBytes =
      16 * kValueChunks + (16 * kKeyChunks > 4 * kMassWords ? 16 * kKeyChunks : 4 * kMassWords);
  // Tiles of a warp that are under way or in use. Three blocks to a processor hide each other's beginning
  // and end.
  static constexpr int kStages = kTileBytes <= 4096 ? 4 : kTileBytes <= 16384 ? 2 : 1;
  static constexpr int kWarpBytes = kStages * kTileBytes;
  // More copies written out would keep too many addresses in registers.
  static constexpr int kUnroll = kGroups <= 4 ? 4 : 2;
  static_assert(
      kWarpBytes >= 4 * kQueries * kPadded, "the state of a warp takes the place of its tiles");
};

struct Place {
  int32_t task, b, h, first_query;  // (row, head), and where its query tile begins
  int32_t queries;                  // of the tile
  int32_t piece, pieces;
};

// The softmax state of a warp for its queries, spread over its lanes: lane 4 r + j has, of queries
// 8 n + 2 j + x, element e of the chunks 8 c + r.
template <typename T, int kGroups, int kQueryTiles>
struct WarpState {
  using S = Shape<T, kGroups, kQueryTiles>;
  float largest[kQueryTiles][2];
  float mass[kQueryTiles][2];  // of this lane's rows
  float values[kQueryTiles][S::kValueGroups][S::kElements][2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kQueryTiles; ++n) {
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        largest[n][x] = -INFINITY;
        mass[n][x] = 0.0f;
#pragma unroll
        for (int c = 0; c < S::kValueGroups; ++c) {
#pragma unroll
          for (int e = 0; e < S::kElements; ++e) values[n][c][e][x] = 0.0f;
        }
      }
    }
  }

  // Adds 16 rows. logits[n][2 i + x]: row r + 8 i, query 8 n + 2 j + x, base 2; -inf: left out.
  __device__ __forceinline__ void add(
      float (&logits)[kQueryTiles][4], const uint4* rows, int lane) {
    float factor[kQueryTiles][2];
    bool rescales = false;
#pragma unroll
    for (int n = 0; n < kQueryTiles; ++n) {
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        float top = fmaxf(logits[n][x], logits[n][2 + x]);
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
          top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
        }
        top = fmaxf(top, largest[n][x]);
        const float origin = top == -INFINITY ? 0.0f : top;
        factor[n][x] = exp2_of(largest[n][x] - origin);
        rescales = rescales || (factor[n][x] != 1.0f);
        largest[n][x] = top;
#pragma unroll
        for (int i = 0; i < 2; ++i) logits[n][2 * i + x] = exp2_of(logits[n][2 * i + x] - origin);
        mass[n][x] = mass[n][x] * factor[n][x] + logits[n][x] + logits[n][2 + x];
      }
    }
    if (__any_sync(kAllLanes, rescales)) {
#pragma unroll
      for (int n = 0; n < kQueryTiles; ++n) {
#pragma unroll
        for (int c = 0; c < S::kValueGroups; ++c) {
#pragma unroll
          for (int e = 0; e < S::kElements; ++e) {
            values[n][c][e][0] *= factor[n][0];
            values[n][c][e][1] *= factor[n][1];
          }
        }
      }
    }
    if constexpr (kMatrix<T>) {
      // Weights as a sum of two 16-bit numbers: their rounding is then far below that of the values.
      uint32_t high[kQueryTiles][2], low[kQueryTiles][2];
#pragma unroll
      for (int n = 0; n < kQueryTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float first = logits[n][2 * i], second = logits[n][2 * i + 1];
          const uint32_t rounded = pack_pair<T>(first, second);
          const float2 back = unpack_pair<T>(rounded);
          high[n][i] = transpose_tile(rounded);
          low[n][i] = transpose_tile(pack_pair<T>(first - back.x, second - back.y));
        }
      }
#pragma unroll
      for (int c = 0; c < S::kValueGroups; ++c) {
        uint4 chunks[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) chunks[i] = rows[(i * S::kValueGroups + c) * 32 + lane];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          uint32_t words[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) words[i] = (&chunks[i].x)[w];
          const uint32_t a0 = __byte_perm(words[0], words[1], 0x5410);
          const uint32_t a1 = __byte_perm(words[0], words[1], 0x7632);
          const uint32_t a2 = __byte_perm(words[2], words[3], 0x5410);
          const uint32_t a3 = __byte_perm(words[2], words[3], 0x7632);
#pragma unroll
          for (int n = 0; n < kQueryTiles; ++n) {
            float (&even)[2] = values[n][c][2 * w];
            float (&odd)[2] = values[n][c][2 * w + 1];
            multiply_tiles<T>(
                even[0], even[1], odd[0], odd[1], a0, a1, a2, a3, high[n][0], high[n][1]);
            multiply_tiles<T>(
                even[0], even[1], odd[0], odd[1], a0, a1, a2, a3, low[n][0], low[n][1]);
          }
        }
      }
    } else {
      const int r = lane / 4, j = lane % 4;
#pragma unroll
      for (int t = 0; t < kTileTokens; ++t) {
        float weights[kQueryTiles][2];
#pragma unroll
        for (int n = 0; n < kQueryTiles; ++n) {
#pragma unroll
          for (int x = 0; x < 2; ++x) {
            weights[n][x] = __shfl_sync(kAllLanes, logits[n][t / 8 * 2 + x], t % 8 * 4 + j);
          }
        }
        const int slot = (t & 1) + (t >> 3) * 2, from = r * 4 + (t & 7) / 2;
#pragma unroll
        for (int c = 0; c < S::kValueGroups; ++c) {
          float row[S::kElements];
          unpack_chunk<T>(rows[(slot * S::kValueGroups + c) * 32 + from], row);
#pragma unroll
          for (int n = 0; n < kQueryTiles; ++n) {
#pragma unroll
            for (int e = 0; e < S::kElements; ++e) {
              values[n][c][e][0] += weights[n][0] * row[e];
              values[n][c][e][1] += weights[n][1] * row[e];
            }
          }
        }
      }
    }
  }

  // To shared memory: values [queries, kPadded], sums [queries].
  __device__ __forceinline__ void store(float* to_values, float2* to_sums, int lane) {
    const int r = lane / 4, j = lane % 4;
#pragma unroll
    for (int n = 0; n < kQueryTiles; ++n) {
#pragma unroll
      for (int x = 0; x < 2; ++x) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
          mass[n][x] += __shfl_xor_sync(kAllLanes, mass[n][x], step);
        }
        const int query = 8 * n + 2 * j + x;
        if (r == 0) to_sums[query] = make_float2(largest[n][x], mass[n][x]);
#pragma unroll
        for (int c = 0; c < S::kValueGroups; ++c) {
          float* row = to_values + query * S::kPadded + (8 * c + r) * S::kElements;
#pragma unroll
          for (int e = 0; e < S::kElements; ++e) row[e] = values[n][c][e][x];
        }
      }
    }
  }
};

// The queries of a block, as the lanes feed them to the matrix units; in float32 in shared memory.
template <typename T, int kGroups, int kQueryTiles>
struct Queries {
  using S = Shape<T, kGroups, kQueryTiles>;
  uint4 chunks[kMatrix<T> ? kQueryTiles : 1][kMatrix<T> ? kGroups : 1];
  const float* rows;  // [queries, kPadded]

  __device__ __forceinline__ void load(
      const AttendParams& params, const Place& place, float* shared, int lane) {
    if constexpr (kMatrix<T>) {
      const int row_chunks = static_cast<int>(params.head_dim) / S::kElements;
#pragma unroll
      for (int n = 0; n < kQueryTiles; ++n) {
        const int query = 8 * n + lane / 4;
        const T* row = params.query.row<const T>(place.b, place.h, place.first_query + query);
#pragma unroll
        for (int c = 0; c < kGroups; ++c) {
          const int chunk = 4 * c + lane % 4;
          chunks[n][c] = query < place.queries && chunk < row_chunks
              ? reinterpret_cast<const uint4*>(row)[chunk]
              : make_uint4(0, 0, 0, 0);
        }
      }
    } else {
      rows = shared;
      for (int i = static_cast<int>(threadIdx.x); i < S::kQueries * S::kPadded;
           i += kAttendThreads) {
        const int query = i / S::kPadded, d = i % S::kPadded;
        shared[i] = query < place.queries && d < params.head_dim
            ? to_float(params.query.row<const T>(place.b, place.h, place.first_query + query)[d])
            : 0.0f;
      }
    }
  }

  // sums[n][2 i + x]: key r + 8 i times query 8 n + 2 j + x
  __device__ __forceinline__ void score(
      const uint4* keys, int lane, float (&sums)[kQueryTiles][4]) const {
    if constexpr (kMatrix<T>) {
#pragma unroll
      for (int n = 0; n < kQueryTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
      }
#pragma unroll
      for (int c = 0; c < kGroups; ++c) {
        const uint4 near = keys[c * 32 + lane], far = keys[(kGroups + c) * 32 + lane];
#pragma unroll
        for (int n = 0; n < kQueryTiles; ++n) {
          float (&s)[4] = sums[n];
          const uint4& q = chunks[n][c];
          multiply_tiles<T>(s[0], s[1], s[2], s[3], near.x, far.x, near.y, far.y, q.x, q.y);
          multiply_tiles<T>(s[0], s[1], s[2], s[3], near.z, far.z, near.w, far.w, q.z, q.w);
        }
      }
    } else {
      const int j = lane % 4;
      float parts[2][S::kQueries] = {};
#pragma unroll 2
      for (int c = 0; c < kGroups; ++c) {
        float key[2][S::kElements];
        unpack_chunk<T>(keys[c * 32 + lane], key[0]);
        unpack_chunk<T>(keys[(kGroups + c) * 32 + lane], key[1]);
#pragma unroll
        for (int query = 0; query < S::kQueries; ++query) {
          float row[S::kElements];
          const float4 chunk =
              *reinterpret_cast<const float4*>(rows + query * S::kPadded + (4 * c + j) * 4);
          row[0] = chunk.x, row[1] = chunk.y, row[2] = chunk.z, row[3] = chunk.w;
#pragma unroll
          for (int e = 0; e < S::kElements; ++e) {
            parts[0][query] += key[0][e] * row[e];
            parts[1][query] += key[1][e] * row[e];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int query = 0; query < S::kQueries; ++query) {
          float sum = parts[i][query];
          sum += __shfl_xor_sync(kAllLanes, sum, 1);
          sum += __shfl_xor_sync(kAllLanes, sum, 2);
          if (query % 8 / 2 == j) sums[query / 8][2 * i + query % 2] = sum;
        }
      }
    }
  }
};

// Rows of one (row, head) in two places: the steady zone, and the store or the centroids.
template <typename T>
struct TwoPlaces {
  const T* near;
  const T* far;
  int64_t near_stride, far_stride;

  // A slot of the far place, or -2 - slot of the near one; for -1 any row, which is not read.
  __device__ __forceinline__ const uint4* row(int32_t at) const {
    const T* start = at < -1 ? near : far;
    const int64_t stride = at < -1 ? near_stride : far_stride;
    const int32_t slot = at < -1 ? -2 - at : at < 0 ? 0 : at;
    return reinterpret_cast<const uint4*>(start + slot * stride);
  }
};

// One warp's walk over the tiles of a piece; the copies of later tiles are under way meanwhile. Every part
// stands in the code once: at batch 1 most of it runs once or twice, and fetching it takes its time.
template <typename T, int kGroups, int kQueryTiles>
struct Walker {
  using S = Shape<T, kGroups, kQueryTiles>;
  TwoPlaces<T> keys, values;
  char* memory;  // of this warp
  int lane, row_chunks;
  bool estimates;
  int32_t rows;  // tokens, or clusters to estimate
  // Tokens.
  int32_t steady_tokens, ranks;
  int32_t rank;           // of the token that was found last
  const int32_t* before;  // in shared memory, if they fit
  const int32_t* shift;
  // Clusters.
  const int32_t* ids;
  const float* masses;  // of the first query of this block
  int32_t groups, queries;

  __device__ __forceinline__ uint4* values_at(int stage) const {
    return reinterpret_cast<uint4*>(memory + stage * S::kTileBytes);
  }
  __device__ __forceinline__ uint4* keys_at(int stage) const {
    return values_at(stage) + S::kValueChunks;
  }
  __device__ __forceinline__ float* masses_at(int stage) const {
    return reinterpret_cast<float*>(keys_at(stage));
  }

  // Where row v lies; -1: nowhere.
  __device__ __forceinline__ int32_t find(int32_t v) {
    if (v >= rows) return -1;
    if (estimates) return ids[v];
    if (v < steady_tokens) return -2 - v;
    const int32_t u = v - steady_tokens;
    if (rank < 0) {
      int32_t high = ranks;
      rank = 0;
#pragma unroll 1
      while (high - rank > 1) {
        const int32_t middle = (rank + high) / 2;
        if (before[middle] <= u) rank = middle;
        else high = middle;
      }
    }
    // A lane's tokens come in their order, a few ranks apart.
#pragma unroll 1
    while (before[rank + 1] <= u) ++rank;
    return shift[rank] + u;
  }

  // Copies the tile whose rows lie where `at` says, this lane's at lane % 16.
  __device__ __forceinline__ void copy(int stage, int32_t at) {
    const int r = lane / 4, j = lane % 4;
    if (estimates) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int32_t own = __shfl_sync(kAllLanes, at, r + 8 * i);
        const float* from = masses + static_cast<int64_t>(own < 0 ? 0 : own) * groups;
#pragma unroll
        for (int n = 0; n < kQueryTiles; ++n) {
#pragma unroll
          for (int x = 0; x < 2; ++x) {
            const int query = 8 * n + 2 * j + x;
            const bool inside = own >= 0 && query < queries;
            copy_async_word(
                masses_at(stage) + (n * 4 + 2 * i + x) * 32 + lane, from + (inside ? query : 0),
                inside);
          }
        }
      }
    } else {
#pragma unroll(S::kUnroll)
      for (int k = 0; k < 2 * kGroups; ++k) {
        const int index = k * 32 + lane, row = index / (4 * kGroups), chunk = index % (4 * kGroups);
        const int32_t own = __shfl_sync(kAllLanes, at, row);
        copy_async(
            keys_at(stage) + (row / 8 * kGroups + chunk / 4) * 32 + row % 8 * 4 + chunk % 4,
            keys.row(own) + chunk, own != -1 && chunk < row_chunks);
      }
    }
#pragma unroll(S::kUnroll)
    for (int k = 0; k < 4 * S::kValueGroups; ++k) {
      constexpr int kRowChunks = 8 * S::kValueGroups;
      const int index = k * 32 + lane, row = index / kRowChunks, chunk = index % kRowChunks;
      const int32_t own = __shfl_sync(kAllLanes, at, row);
      const int i = row % 2 + row / 8 * 2;
      copy_async(
          values_at(stage) + (i * S::kValueGroups + chunk / 8) * 32 + chunk % 8 * 4 + row % 8 / 2,
          values.row(own) + chunk, own != -1 && chunk < row_chunks);
    }
  }

  // Calls use(stage, tile) for every tile.
  template <typename Use>
  __device__ __forceinline__ void walk(int32_t first, int32_t last, const Use& use) {
    int stage = 0, ahead_stage = 0;
    // Found a tile ahead of the copy, which would have to wait for it.
    int32_t at = find(first * kTileTokens + lane % kTileTokens);
#pragma unroll 1
    for (int32_t ahead = first;; ++ahead) {
      const int32_t tile = ahead - (S::kStages - 1);
      if (tile >= last) break;
      if (ahead < last) {
        copy(ahead_stage, at);
        at = find((ahead + 1) * kTileTokens + lane % kTileTokens);
      }
      commit_copies();
      if (++ahead_stage == S::kStages) ahead_stage = 0;
      if (tile < first) continue;
      wait_for_copies<S::kStages - 1>();
      __syncwarp();
      use(stage, tile);
      __syncwarp();
      if (++stage == S::kStages) stage = 0;
    }
    wait_for_copies<0>();
    __syncwarp();
  }
};

// The softmax state of several pieces for one query.
struct Merged {
  float largest, mass;
};

// Normalised result of tokens with state (largest, mass, value), merged with an estimate.
__device__ __forceinline__ float merge_weights(
    const Merged& exact, float estimate_lse, float& keep, float& add) {
  if (exact.mass == 0.0f) {  // the estimate comes back as it is
    keep = 0.0f;
    add = estimate_lse == -INFINITY ? 0.0f : 1.0f;
    return estimate_lse;
  }
  const float other = estimate_lse * kLog2e;
  const float top = fmaxf(exact.largest, other);
  keep = exp2_of(exact.largest - top);
  add = exp2_of(other - top);
  const float mass = exact.mass * keep + add;
  keep /= mass;
  add /= mass;
  return (top + log2f(mass)) * kLn2;  // once a query: the approximation of log2_of would show
}

template <typename T>
__device__ void merge_pieces(
    const AttendParams& params,
    const Place& place,
    int64_t tile,
    int queries_of_tile,
    char* shared) {
  const int pieces = place.pieces, thread = static_cast<int>(threadIdx.x);
  float2* sums = reinterpret_cast<float2*>(shared);                            // [pieces, queries]
  float* factors = reinterpret_cast<float*>(sums + pieces * queries_of_tile);  // the same
  Merged* merged = reinterpret_cast<Merged*>(factors + pieces * queries_of_tile);  // [2, queries]
  const float2* from = params.sums + tile * pieces * queries_of_tile;
#pragma unroll 2
  for (int i = thread; i < pieces * queries_of_tile; i += kAttendThreads)
    sums[i] = __ldcg(from + i);
  __syncthreads();
#pragma unroll 1
  for (int i = thread; i < 2 * queries_of_tile; i += kAttendThreads) {
    const int query = i % queries_of_tile;
    const bool estimates = i >= queries_of_tile;
    const int first = estimates ? params.exact_pieces : 0;
    const int last = estimates ? pieces : params.exact_pieces;
    Merged state = {-INFINITY, 0.0f};
#pragma unroll 4
    for (int p = first; p < last; ++p) {
      state.largest = fmaxf(state.largest, sums[p * queries_of_tile + query].x);
    }
    const float origin = state.largest == -INFINITY ? 0.0f : state.largest;
#pragma unroll 4
    for (int p = first; p < last; ++p) {
      const float2 own = sums[p * queries_of_tile + query];
      const float factor = own.y == 0.0f ? 0.0f : exp2_of(own.x - origin);
      factors[p * queries_of_tile + query] = factor;
      state.mass += own.y * factor;
    }
    merged[i] = state;
  }
  __syncthreads();
  const int quads = static_cast<int>(params.head_dim) / 4;
  const float4* values =
      reinterpret_cast<const float4*>(params.values) + tile * pieces * queries_of_tile * quads;
#pragma unroll 1
  for (int i = thread; i < place.queries * quads; i += kAttendThreads) {
    const int query = i / quads, quad = i % quads;
    float4 estimate, sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {  // clusters, then tokens
      estimate = sum;
      sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      const int first = part == 0 ? params.exact_pieces : 0;
      const int last = part == 0 ? pieces : params.exact_pieces;
#pragma unroll 8
      for (int p = first; p < last; ++p) {
        const float factor = factors[p * queries_of_tile + query];
        const float4 own = __ldcg(values + (p * queries_of_tile + query) * quads + quad);
        sum.x += factor * own.x;
        sum.y += factor * own.y;
        sum.z += factor * own.z;
        sum.w += factor * own.w;
      }
    }
    const int64_t q = static_cast<int64_t>(place.task) * params.groups + place.first_query + query;
    const Merged exact = merged[query], guess = merged[queries_of_tile + query];
    float estimate_lse = -INFINITY;
    if (params.given_estimate != nullptr) {
      estimate = reinterpret_cast<const float4*>(params.given_estimate)[q * quads + quad];
      estimate_lse = params.given_estimate_lse[q];
    } else if (guess.mass > 0.0f) {
      const float inverse = 1.0f / guess.mass;
      estimate.x *= inverse, estimate.y *= inverse, estimate.z *= inverse, estimate.w *= inverse;
      estimate_lse = (guess.largest + log2f(guess.mass)) * kLn2;
    }
    if (params.out == nullptr) {
      reinterpret_cast<float4*>(params.estimate)[q * quads + quad] = estimate;
      if (quad == 0) params.estimate_lse[q] = estimate_lse;
      continue;
    }
    float keep, add;
    const float lse = merge_weights(exact, estimate_lse, keep, add);
    // An estimate of weight 0 may hold anything.
    const auto blend = [&](float exact_sum, float guessed) {
      return add > 0.0f ? exact_sum * keep + guessed * add : exact_sum * keep;
    };
    T* out = static_cast<T*>(params.out) + (q * quads + quad) * 4;
    out[0] = from_float<T>(blend(sum.x, estimate.x));
    out[1] = from_float<T>(blend(sum.y, estimate.y));
    out[2] = from_float<T>(blend(sum.z, estimate.z));
    out[3] = from_float<T>(blend(sum.w, estimate.w));
    if (quad == 0 && params.lse != nullptr) params.lse[q] = lse;
  }
}

// After a barrier: what this block has written is seen by the block that gets a later ticket.
__device__ __forceinline__ int32_t take_ticket(int32_t* tickets) {
  int32_t ticket;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;"
               : "=r"(ticket)
               : "l"(tickets)
               : "memory");
  return ticket;
}

template <typename T, int kGroups, int kQueryTiles>
__global__ void __launch_bounds__(
    kAttendThreads, kMatrix<T>&& kGroups <= 4 && kQueryTiles == 1 ? 3 : 2)
    attend_kernel(const __grid_constant__ AttendParams params) {
  using S = Shape<T, kGroups, kQueryTiles>;
  extern __shared__ uint4 shared[];
  __shared__ float2 warp_sums[kAttendWarps][S::kQueries];
  __shared__ bool is_last;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  release_successor();

  Place place;
  place.pieces = params.exact_pieces + params.estimate_pieces;
  const int32_t tile = static_cast<int32_t>(blockIdx.x) / place.pieces;  // of queries
  const int32_t groups = static_cast<int32_t>(params.groups),
                heads = static_cast<int32_t>(params.heads);
  const int32_t query_tiles = (groups + S::kQueries - 1) / S::kQueries;
  place.piece = static_cast<int32_t>(blockIdx.x) - tile * place.pieces;
  place.task = tile / query_tiles;
  place.b = place.task / heads;
  place.h = place.task - place.b * heads;
  place.first_query = (tile - place.task * query_tiles) * S::kQueries;
  place.queries = min(groups - place.first_query, S::kQueries);
  char* memory = reinterpret_cast<char*>(shared);
  char* behind = memory + kAttendWarps * S::kWarpBytes;

  Walker<T, kGroups, kQueryTiles> walker;
  walker.memory = memory + warp * S::kWarpBytes;
  walker.lane = lane;
  walker.row_chunks = static_cast<int>(params.head_dim) / S::kElements;
  walker.estimates = place.piece >= params.exact_pieces;
  walker.rank = -1;
  walker.groups = groups;
  walker.queries = place.queries;
  WarpState<T, kGroups, kQueryTiles> state;
  state.clear();
  Queries<T, kGroups, kQueryTiles> queries;
  wait_for_predecessor();

  int32_t piece = place.piece, pieces = params.exact_pieces;
  if (walker.estimates) {
    const EstimatedClusters& clusters = params.estimated;
    piece -= params.exact_pieces;
    pieces = params.estimate_pieces;
    walker.rows = clusters.counts[place.task];
    walker.ids = clusters.ids + place.task * clusters.clusters;
    walker.masses =
        clusters.log2_mass + place.task * clusters.clusters * groups + place.first_query;
    walker.values = {
        nullptr, clusters.centroid_values.row<const T>(place.b, place.h, 0), 0,
        clusters.centroid_values.stride_t};
  } else {
    const int32_t ranks = static_cast<int32_t>(params.retrieved.clusters);
    const int64_t first_rank = static_cast<int64_t>(place.task) * ranks;
    const int32_t* before = params.retrieved.before + first_rank + place.task;
    const int32_t* shift = params.retrieved.shift + first_rank;
    queries.load(params, place, reinterpret_cast<float*>(behind), lane);
    if constexpr (!kMatrix<T>) behind += S::kQueries * S::kPadded * sizeof(float);
    walker.before = before;
    walker.shift = shift;
    walker.ranks = ranks;
    if (ranks <= kRanksInShared) {
      int32_t* copied = reinterpret_cast<int32_t*>(behind);
#pragma unroll 1
      for (int i = thread; i <= ranks; i += kAttendThreads) {
        copied[i] = before[i];
        if (i < ranks) copied[ranks + 1 + i] = shift[i];
      }
      walker.before = copied;
      walker.shift = copied + ranks + 1;
    }
    const int64_t steady = params.counters[place.b * kCounters + kSteadyTokens];
    walker.steady_tokens = static_cast<int32_t>(
        steady < 0                            ? 0
            : steady < params.steady_capacity ? steady
                                              : params.steady_capacity);
    walker.rows = walker.steady_tokens + before[ranks];
    walker.keys = {
        params.steady_keys.row<const T>(place.b, place.h, 0),
        params.store_keys.row<const T>(place.b, place.h, 0), params.steady_keys.stride_t,
        params.store_keys.stride_t};
    walker.values = {
        params.steady_values.row<const T>(place.b, place.h, 0),
        params.store_values.row<const T>(place.b, place.h, 0), params.steady_values.stride_t,
        params.store_values.stride_t};
    __syncthreads();
  }
  const int64_t tiles = (walker.rows + kTileTokens - 1) / kTileTokens;
  const float scale2 = params.scale * kLog2e;
  const int32_t first = static_cast<int32_t>(tiles * piece / pieces);
  const int32_t count = static_cast<int32_t>(tiles * (piece + 1) / pieces) - first;
  walker.walk(
      first + count * warp / kAttendWarps, first + count * (warp + 1) / kAttendWarps,
      [&](int stage, int32_t t) {
        float logits[kQueryTiles][4];
        if (walker.estimates) {
#pragma unroll
          for (int n = 0; n < kQueryTiles; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              logits[n][i] = walker.masses_at(stage)[(n * 4 + i) * 32 + lane];
              if (8 * n + 2 * (lane % 4) + i % 2 >= place.queries) logits[n][i] = -INFINITY;
            }
          }
        } else {
          queries.score(walker.keys_at(stage), lane, logits);
#pragma unroll
          for (int n = 0; n < kQueryTiles; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) logits[n][i] *= scale2;
          }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (t * kTileTokens + lane / 4 + 8 * i < walker.rows) continue;
#pragma unroll
          for (int n = 0; n < kQueryTiles; ++n) {
            logits[n][2 * i] = logits[n][2 * i + 1] = -INFINITY;
          }
        }
        state.add(logits, walker.values_at(stage), lane);
      });
  state.store(reinterpret_cast<float*>(memory + warp * S::kWarpBytes), warp_sums[warp], lane);
  __syncthreads();

  // The states of the warps become that of the piece.
  const int64_t first_sum = (static_cast<int64_t>(tile) * place.pieces + place.piece) * S::kQueries;
  const int quads = static_cast<int>(params.head_dim) / 4;
  float4* values = reinterpret_cast<float4*>(params.values) + first_sum * quads;
#pragma unroll 1
  for (int i = thread; i < place.queries * quads; i += kAttendThreads) {
    const int query = i / quads, quad = i % quads;
    float top = -INFINITY;
#pragma unroll
    for (int w = 0; w < kAttendWarps; ++w) top = fmaxf(top, warp_sums[w][query].x);
    const float origin = top == -INFINITY ? 0.0f : top;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float mass = 0.0f;
#pragma unroll
    for (int w = 0; w < kAttendWarps; ++w) {
      const float factor = exp2_of(warp_sums[w][query].x - origin);
      const float4 own = *reinterpret_cast<const float4*>(
          memory + w * S::kWarpBytes + (query * S::kPadded + quad * 4) * sizeof(float));
      mass += factor * warp_sums[w][query].y;
      sum.x += factor * own.x;
      sum.y += factor * own.y;
      sum.z += factor * own.z;
      sum.w += factor * own.w;
    }
    __stcg(values + i, sum);
    if (quad == 0) __stcg(params.sums + first_sum + query, make_float2(top, mass));
  }

  // The block that comes last merges all pieces, always in the same order.
  __syncthreads();
  if (thread == 0) is_last = take_ticket(params.tickets + tile) == place.pieces - 1;
  __syncthreads();
  if (!is_last) return;
  merge_pieces<T>(params, place, tile, S::kQueries, memory);
}

template <typename T, int kGroups, int kQueryTiles>
void launch_attend(const Launcher& launch, const AttendParams& params) {
  using S = Shape<T, kGroups, kQueryTiles>;
  int64_t bytes = kAttendWarps * S::kWarpBytes;
  if (!kMatrix<T>) bytes += S::kQueries * S::kPadded * static_cast<int64_t>(sizeof(float));
  if (params.exact_pieces > 0 && params.retrieved.clusters <= kRanksInShared) {
    bytes += (2 * params.retrieved.clusters + 1) * static_cast<int64_t>(sizeof(int32_t));
  }
  const int64_t pieces = params.exact_pieces + params.estimate_pieces;
  const int64_t merge_bytes = pieces * S::kQueries * 12 + 2 * S::kQueries * 8;
  launch(
      attend_kernel<T, kGroups, kQueryTiles>, grid_of(ticket_count(params) * pieces),
      kAttendThreads, std::max(bytes, merge_bytes), 1, params);
}

template <typename T, int kGroups>
void launch_groups(const Launcher& launch, const AttendParams& params) {
  if (query_tile(params.groups, params.head_dim) == 8) {
    launch_attend<T, kGroups, 1>(launch, params);
  } else if constexpr (kGroups * 4 * kChunk<T> <= 128) {
    launch_attend<T, kGroups, 2>(launch, params);
  }
}

template <typename T>
void launch_typed(const Launcher& launch, const AttendParams& params) {
  constexpr int kScale =
      4 / static_cast<int>(sizeof(T)) == 1 ? 2 : 1;  // float32 has twice the chunks
  if (params.head_dim <= 64) launch_groups<T, 2 * kScale>(launch, params);
  else if (params.head_dim <= 96) launch_groups<T, 3 * kScale>(launch, params);
  else if (params.head_dim <= 128) launch_groups<T, 4 * kScale>(launch, params);
  else launch_groups<T, 8 * kScale>(launch, params);
}

int64_t pieces_per_task(int64_t tasks, int64_t processors) {
  return std::max(kBlocksPerProcessor * processors / std::max<int64_t>(tasks, 1), kFewestPieces);
}

}  // namespace

int32_t estimate_piece_count(int64_t tasks, int64_t processors) {
  return static_cast<int32_t>((pieces_per_task(tasks, processors) * kEstimatePercent + 50) / 100);
}

int32_t exact_piece_count(int64_t tasks, int64_t processors) {
  return static_cast<int32_t>(
      pieces_per_task(tasks, processors) - estimate_piece_count(tasks, processors));
}

AttendSpace reserve_attend(Workspace& workspace, const AttendParams& params) {
  const int64_t tiles = ticket_count(params);
  const int64_t states = tiles * (params.exact_pieces + params.estimate_pieces) *
      query_tile(params.groups, params.head_dim);
  AttendSpace space;
  space.values = workspace.reserve<float>(states * params.head_dim);
  space.sums = workspace.reserve<float2>(states);
  space.tickets = workspace.reserve<int32_t>(tiles);
  return space;
}

void use_attend(const AttendSpace& space, const Workspace& workspace, AttendParams& params) {
  params.values = workspace.at<float>(space.values);
  params.sums = workspace.at<float2>(space.sums);
  params.tickets = workspace.at<int32_t>(space.tickets);
}

void attend(const Launcher& launch, const AttendParams& params) {
  RETRO_CUDA_DISPATCH(params.dtype, launch_typed, launch, params);
}

}  // namespace retro
