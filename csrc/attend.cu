#include "attend.h"

#include "counters.h"

namespace retro {
namespace {

constexpr int kTileTokens = 16;  // rows of a matrix instruction
// Ranks whose places are kept in shared memory. Offloaded a rank has three numbers instead of two, in the
// same room: work must be shared out alike.
constexpr int64_t kRanksInShared = 1280;
constexpr int64_t kPagedRanksInShared = kRanksInShared * 2 / 3;
// One block fills a processor: what it waits for when it begins and ends, it waits for once.
constexpr int64_t kTileBytesPerBlock = 192 * 1024;
// Of the warps of a block. At the default budgets clusters are a fourth of the bytes or less, but half as
// many to a tile.
constexpr int kEstimatePercent = 33;
// Pieces for each processor where there are more (row, head) pairs than processors: rows differ, and who is
// done early takes another piece.
constexpr int64_t kRounds = 4;

// What a block needs to know of element type, head size (in groups of four chunks of keys) and queries (in
// tiles of eight). A warp copies 16 rows at a time, each chunk to a place where the lanes that feed the
// matrix units find it without bank conflicts: lane 4 r + j reads of keys r and r + 8 every fourth chunk from
// j, and of values 2 j, 2 j + 1, 2 j + 8, 2 j + 9 every eighth chunk from r.
template <typename Element, int kKeyGroups, int kTilesOfQueries>
struct Shape {
  using T = Element;
  static constexpr int kGroups = kKeyGroups;
  static constexpr int kQueryTiles = kTilesOfQueries;
  static constexpr int kElements = kChunk<T>;
  static constexpr int kKeyRow = 4 * kGroups;  // chunks
  static constexpr int kValueGroups = (kGroups + 1) / 2;
  static constexpr int kValueRow = 8 * kValueGroups;
  static constexpr int kQueries = 8 * kQueryTiles;
  static constexpr int kPadded = kValueRow * kElements;  // head_dim rounded up
  static constexpr int kKeyChunks = kTileTokens * kKeyRow;
  static constexpr int kValueChunks = kTileTokens * kValueRow;
  static constexpr int kMassChunks = kTileTokens * kQueries / 4;
  // Estimates need masses where tokens need keys.
  static constexpr int kTileBytes =
      16 * (kValueChunks + (kKeyChunks > kMassChunks ? kKeyChunks : kMassChunks));
  // Tiles of a warp that are under way or in use.
  static constexpr int kStages = kTileBytes <= 4096 ? 4 : kTileBytes <= 16384 ? 2 : 1;
  static constexpr int kWarpBytes = kStages * kTileBytes;
  // More would leave them too few registers.
  static constexpr int kMostWarps = kMatrix<T> && kGroups <= 4 && kQueryTiles == 1 ? 12 : 6;
  // More copies written out would keep too many addresses in registers.
  static constexpr int kUnroll = kGroups <= 3 ? 4 : 2;
  static_assert(
      kWarpBytes >= 4 * kQueries * kPadded, "the state of a warp takes the place of its tiles");

  static __device__ __forceinline__ int key_place(int row, int chunk) {
    return place_of<kKeyRow>(row, chunk);
  }
  static __device__ __forceinline__ int value_place(int row, int chunk) {
    return row * kValueRow + (chunk ^ (row >> 1 & 3) << 1);
  }
};

struct Place {
  int32_t task, b, h, first_query;  // (row, head), and where its query tile begins
  int32_t queries;                  // of the tile
  int32_t piece;
};

// The softmax state of a warp for its queries, spread over its lanes: lane 4 r + j has, of queries
// 8 n + 2 j + x, element e of the chunks 8 c + r.
template <typename S>
struct WarpState {
  using T = typename S::T;
  static constexpr int kQueryTiles = S::kQueryTiles;
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
        for (int i = 0; i < 4; ++i) {
          const int row = lane % 4 * 2 + i % 2 + i / 2 * 8;
          chunks[i] = rows[S::value_place(row, 8 * c + lane / 4)];
        }
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
#pragma unroll
        for (int c = 0; c < S::kValueGroups; ++c) {
          float row[S::kElements];
          unpack_chunk<T>(rows[S::value_place(t, 8 * c + r)], row);
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
template <typename S>
struct Queries {
  using T = typename S::T;
  static constexpr int kGroups = S::kGroups, kQueryTiles = S::kQueryTiles;
  uint4 chunks[kMatrix<T> ? kQueryTiles : 1][kMatrix<T> ? kGroups : 1];
  const float* rows;  // [queries, kPadded]

  __device__ __forceinline__ void load(
      const AttendParams& params, const Place& place, float* shared, int lane, int threads) {
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
      for (int i = static_cast<int>(threadIdx.x); i < S::kQueries * S::kPadded; i += threads) {
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
        const int chunk = 4 * c + lane % 4;
        const uint4 near = keys[S::key_place(lane / 4, chunk)];
        const uint4 far = keys[S::key_place(lane / 4 + 8, chunk)];
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
        unpack_chunk<T>(keys[S::key_place(lane / 4, 4 * c + j)], key[0]);
        unpack_chunk<T>(keys[S::key_place(lane / 4 + 8, 4 * c + j)], key[1]);
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

// And the page cache: of its slots, this bit is set.
constexpr int32_t kInPage = 1 << 30;
static_assert(kInPage == kMostSlots);

template <typename T>
struct ThreePlaces : TwoPlaces<T> {
  T* pages;
  int64_t page_stride;

  __device__ __forceinline__ const uint4* row(int32_t at) const {
    if (at < 0 || (at & kInPage) == 0) return TwoPlaces<T>::row(at);
    return reinterpret_cast<const uint4*>(page_row(at ^ kInPage));
  }
  __device__ __forceinline__ uint4* page_row(int32_t slot) const {
    return reinterpret_cast<uint4*>(pages + slot * page_stride);
  }
};

// Where a row lies, as far as it is known without waiting for what `source` was loaded from.
template <bool kPaged>
struct Found {
  int32_t at;
};
template <>
struct Found<true> {
  int32_t at;
  int32_t source, within;  // see RetrievedPages; which token of the page
};

// Slots of the page cache that the rows of the tiles under way go to, -1: none. A tile has 16 rows and a warp
// 32 lanes: two stages share a register.
template <int kStages>
struct Targets {
  int32_t of[(kStages + 1) / 2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int k = 0; k < (kStages + 1) / 2; ++k) of[k] = -1;
  }
  // `own`: of the row lane % 16.
  __device__ __forceinline__ void set(int stage, int32_t own, int lane) {
#pragma unroll
    for (int k = 0; k < (kStages + 1) / 2; ++k) {
      if (stage == 2 * k + lane / kTileTokens) of[k] = own;
    }
  }
  // In 16 lanes, from stage % 2 * 16 on, the targets of a stage.
  __device__ __forceinline__ int32_t get(int stage) const {
    int32_t found = of[0];
#pragma unroll
    for (int k = 1; k < (kStages + 1) / 2; ++k) {
      if (stage / 2 == k) found = of[k];
    }
    return found;
  }
};

// One warp's walk over the tiles of a piece; the copies of later tiles are under way meanwhile. Every part
// stands in the code once: at batch 1 most of it runs once or twice, and fetching it takes its time.
template <typename S, bool kPaged>
struct Walker {
  using T = typename S::T;
  using Places = std::conditional_t<kPaged, ThreePlaces<T>, TwoPlaces<T>>;
  Places keys, values;
  char* memory;  // of this warp
  int lane, row_chunks;
  bool estimates;
  int32_t rows;  // tokens, or clusters to estimate
  // Tokens.
  int32_t steady_tokens, ranks;
  int32_t rank;           // of the token that was found last
  const int32_t* before;  // in shared memory, if they fit
  const int32_t* shift;
  // Offloaded.
  const int32_t* first_source;  // like `before`
  const int32_t* sources;
  int32_t pages, page_size;
  bool fills;
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
  __device__ __forceinline__ Found<kPaged> find(int32_t v) {
    Found<kPaged> found;
    if constexpr (kPaged) {
      found.source = -1;
      found.within = 0;
    }
    found.at = -1;
    if (v >= rows) return found;
    if (estimates) {
      found.at = ids[v];
      return found;
    }
    found.at = -2 - v;
    if (v < steady_tokens) return found;
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
    found.at = shift[rank] + u;
    if constexpr (kPaged) {
      const uint32_t token = static_cast<uint32_t>(u - before[rank]);
      const uint32_t page = token / static_cast<uint32_t>(page_size);
      // Not __ldg: this kernel may have begun before the one that writes it.
      found.source = __ldcg(sources + first_source[rank] + page);
      found.within = static_cast<int32_t>(token - page * static_cast<uint32_t>(page_size));
    }
    return found;
  }

  // The same as one number; `target`: the slot of the page cache that the row goes to, or -1.
  __device__ __forceinline__ int32_t resolve(const Found<kPaged>& found, int32_t& target) const {
    if constexpr (kPaged) {
      target = -1;
      if (found.source >= 0 && found.source < pages) {
        return kInPage | (found.source * page_size + found.within);
      }
      const int32_t page = -2 - found.source;
      if (fills && page >= 0 && page < pages) target = page * page_size + found.within;
    }
    return found.at;
  }

  // Writes the rows of a tile that has come to the page cache.
  __device__ __forceinline__ void fill(int stage, const Targets<S::kStages>& targets) const {
    const int first_lane = stage % 2 * kTileTokens;  // of those with this stage's targets
    const int32_t target = targets.get(stage);
    if (!__any_sync(kAllLanes, target >= 0 && (lane & kTileTokens) == first_lane)) return;
#pragma unroll(S::kUnroll)
    for (int k = 0; k < S::kKeyChunks / 32; ++k) {
      const int index = k * 32 + lane, row = index / S::kKeyRow, chunk = index % S::kKeyRow;
      const int32_t own = __shfl_sync(kAllLanes, target, first_lane + row);
      if (own >= 0 && chunk < row_chunks) {
        keys.page_row(own)[chunk] = keys_at(stage)[S::key_place(row, chunk)];
      }
    }
#pragma unroll(S::kUnroll)
    for (int k = 0; k < S::kValueChunks / 32; ++k) {
      const int index = k * 32 + lane, row = index / S::kValueRow, chunk = index % S::kValueRow;
      const int32_t own = __shfl_sync(kAllLanes, target, first_lane + row);
      if (own >= 0 && chunk < row_chunks) {
        values.page_row(own)[chunk] = values_at(stage)[S::value_place(row, chunk)];
      }
    }
  }

  // Copies the tile whose rows lie where `at` says, this lane's at lane % 16.
  __device__ __forceinline__ void copy(int stage, int32_t at) {
    const uint64_t policy = once_policy();
    if (!estimates) {
#pragma unroll(S::kUnroll)
      for (int k = 0; k < S::kKeyChunks / 32; ++k) {
        const int index = k * 32 + lane, row = index / S::kKeyRow, chunk = index % S::kKeyRow;
        const int32_t own = __shfl_sync(kAllLanes, at, row);
        copy_async_with(
            policy, keys_at(stage) + S::key_place(row, chunk), keys.row(own) + chunk,
            own != -1 && chunk < row_chunks);
      }
    } else if (groups % 4 == 0) {
#pragma unroll
      for (int k = 0; k < S::kMassChunks / 32; ++k) {
        constexpr int kRow = S::kQueries / 4;
        const int index = k * 32 + lane, row = index / kRow, chunk = index % kRow;
        const int32_t own = __shfl_sync(kAllLanes, at, row);
        const float* from = masses + static_cast<int64_t>(own < 0 ? 0 : own) * groups;
        const bool inside = own >= 0 && chunk * 4 < queries;
        copy_async(masses_at(stage) + index * 4, from + (inside ? chunk * 4 : 0), inside);
      }
    } else {
#pragma unroll
      for (int k = 0; k < S::kMassChunks / 8; ++k) {
        const int index = k * 32 + lane, row = index / S::kQueries, query = index % S::kQueries;
        const int32_t own = __shfl_sync(kAllLanes, at, row);
        const float* from = masses + static_cast<int64_t>(own < 0 ? 0 : own) * groups;
        const bool inside = own >= 0 && query < queries;
        copy_async_word(masses_at(stage) + index, from + (inside ? query : 0), inside);
      }
    }
#pragma unroll(S::kUnroll)
    for (int k = 0; k < S::kValueChunks / 32; ++k) {
      const int index = k * 32 + lane, row = index / S::kValueRow, chunk = index % S::kValueRow;
      const int32_t own = __shfl_sync(kAllLanes, at, row);
      copy_async_with(
          policy, values_at(stage) + S::value_place(row, chunk), values.row(own) + chunk,
          own != -1 && chunk < row_chunks);
    }
  }

  // Asks for the first two tiles of values to come closer.
  __device__ __forceinline__ void prefetch(int32_t first, int32_t last) const {
    static_assert(2 * kTileTokens == 32);
    const int32_t v = first * kTileTokens + lane;
    if (v >= min(rows, last * kTileTokens)) return;
    const uint4* row = values.row(ids[v]);
#pragma unroll 1
    for (int chunk = 0; chunk < row_chunks; chunk += 8) prefetch_line(row + chunk);
  }

  // Calls use(stage, tile) for every tile.
  template <typename Use>
  __device__ __forceinline__ void walk(int32_t first, int32_t last, const Use& use) {
    int stage = 0, ahead_stage = 0;
    // Found a tile ahead of the copy, which would have to wait for it.
    Found<kPaged> found = find(first * kTileTokens + lane % kTileTokens);
    Targets<S::kStages> targets;
    targets.clear();
#pragma unroll 1
    for (int32_t ahead = first;; ++ahead) {
      const int32_t tile = ahead - (S::kStages - 1);
      if (tile >= last) break;
      if (ahead < last) {
        int32_t target;
        const int32_t at = resolve(found, target);
        if constexpr (kPaged) targets.set(ahead_stage, target, lane);
        copy(ahead_stage, at);
        found = find((ahead + 1) * kTileTokens + lane % kTileTokens);
      }
      commit_copies();
      if (++ahead_stage == S::kStages) ahead_stage = 0;
      if (tile < first) continue;
      wait_for_copies<S::kStages - 1>();
      __syncwarp();
      if constexpr (kPaged) fill(stage, targets);
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

// What a block that merges keeps in shared memory.
struct MergeMemory {
  float4* blended;  // [2, queries, quads]: values of tokens and of clusters
  Merged* merged;   // [2, queries]
  float* factors;   // [2, queries, pieces]

  static int64_t bytes(int64_t pieces, int64_t queries, int64_t quads) {
    return queries * 2 * (quads * 16 + 8 + pieces * 4);
  }
};

// Merges all pieces, always in the same order.
template <typename S>
__device__ void merge_pieces(
    const AttendParams& params, const Place& place, int64_t tile, char* shared) {
  using T = typename S::T;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32, pieces = params.pieces;
  const int exact_parts = params.exact_warps > 0, parts = exact_parts + (params.estimate_warps > 0);
  const int quads = static_cast<int>(params.head_dim) / 4, items = place.queries * quads;
  MergeMemory memory;
  memory.blended = reinterpret_cast<float4*>(shared);
  memory.merged = reinterpret_cast<Merged*>(memory.blended + 2 * S::kQueries * quads);
  memory.factors = reinterpret_cast<float*>(memory.merged + 2 * S::kQueries);
  const int64_t first_sum = tile * pieces * parts * S::kQueries;
  // Kind 0 is of tokens, kind 1 of clusters.
  const auto exists = [&](int kind) {
    return kind == 0 ? exact_parts > 0 : params.estimate_warps > 0;
  };
  // Values are asked for before their factors are known.
  constexpr int kAhead = 8;
  float4 ahead[kAhead];
  const auto fetch = [&](int item, int start) {
    const int kind = item / items;
    if (!exists(kind)) return;
    const float4* own = reinterpret_cast<const float4*>(params.values) +
        (first_sum + (kind == 0 ? 0 : exact_parts * S::kQueries)) * quads + (item - kind * items);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (start + k < pieces) ahead[k] = __ldcg(own + (start + k) * parts * S::kQueries * quads);
    }
  };
  if (thread < 2 * items) fetch(thread, 0);
#pragma unroll 1
  for (int i = thread / 32; i < 2 * place.queries; i += threads / 32) {
    const int kind = i / place.queries, query = i - kind * place.queries;
    Merged state = {-INFINITY, 0.0f};
    if (exists(kind)) {
      const float2* sums =
          params.sums + first_sum + (kind == 0 ? 0 : exact_parts * S::kQueries) + query;
      const float2 first =
          lane < pieces ? __ldcg(sums + lane * parts * S::kQueries) : make_float2(-INFINITY, 0.0f);
      state.largest = first.x;
#pragma unroll 1
      for (int p = lane + 32; p < pieces; p += 32) {
        state.largest = fmaxf(state.largest, __ldcg(sums + p * parts * S::kQueries).x);
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        state.largest = fmaxf(state.largest, __shfl_xor_sync(kAllLanes, state.largest, step));
      }
      const float origin = state.largest == -INFINITY ? 0.0f : state.largest;
#pragma unroll 1
      for (int p = lane; p < pieces; p += 32) {
        const float2 own = p == lane ? first : __ldcg(sums + p * parts * S::kQueries);
        const float factor = own.y == 0.0f ? 0.0f : exp2_of(own.x - origin);
        memory.factors[(kind * S::kQueries + query) * pieces + p] = factor;
        state.mass += own.y * factor;
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        state.mass += __shfl_xor_sync(kAllLanes, state.mass, step);
      }
    }
    if (lane == 0) memory.merged[kind * S::kQueries + query] = state;
  }
  __syncthreads();
#pragma unroll 1
  for (int item = thread; item < 2 * items; item += threads) {
    const int kind = item / items, query = (item - kind * items) / quads;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (exists(kind)) {
      const float* factors = memory.factors + (kind * S::kQueries + query) * pieces;
#pragma unroll 1
      for (int start = 0; start < pieces; start += kAhead) {
        if (start > 0 || item != thread) fetch(item, start);
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          if (start + k >= pieces) continue;
          const float factor = factors[start + k];
          sum.x += factor * ahead[k].x;
          sum.y += factor * ahead[k].y;
          sum.z += factor * ahead[k].z;
          sum.w += factor * ahead[k].w;
        }
      }
    }
    memory.blended[item] = sum;
  }
  __syncthreads();
#pragma unroll 1
  for (int i = thread; i < items; i += threads) {
    const int query = i / quads, quad = i - query * quads;
    const float4 sum = memory.blended[i];
    float4 estimate = memory.blended[items + i];
    const int64_t q = static_cast<int64_t>(place.task) * params.groups + place.first_query + query;
    const Merged exact = memory.merged[query], guess = memory.merged[S::kQueries + query];
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

// A warp's share of the tail: for each query the largest mass (base 2), and their sum relative to it.
__device__ __noinline__ void sum_tail(
    const AttendParams& params,
    int32_t task,
    int32_t first_query,
    int32_t queries,
    int32_t share,
    int32_t shares,
    float2* sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const EstimatedClusters& clusters = params.estimated;
  const int64_t counted =
      params.counters[task / static_cast<int32_t>(params.heads) * kCounters + kClusters];
  const int64_t live = counted < 0 ? 0 : counted < clusters.clusters ? counted : clusters.clusters;
  const int64_t all_words = (live + 31) / 32, stride = params.groups;
  const uint32_t* words = clusters.tail + task * ((clusters.clusters + 31) / 32);
  const float* masses = clusters.log2_mass + task * clusters.clusters * stride + first_query;
  const int32_t first = static_cast<int32_t>(all_words * share / shares);
  const int32_t last = static_cast<int32_t>(all_words * (share + 1) / shares);
  constexpr int kTogether = 4;  // queries
  constexpr int kAhead = 4;     // clusters of a lane that are under way
  const bool quads = stride % kTogether == 0;
#pragma unroll 1
  for (int query = 0; query < queries; query += kTogether) {
    float top[kTogether], sum[kTogether];
#pragma unroll
    for (int q = 0; q < kTogether; ++q) top[q] = -INFINITY, sum[q] = 0.0f;
    uint32_t own_word = 0;
#pragma unroll 1
    for (int32_t w = first; w < last; w += kAhead) {
      const int at = (w - first) % 32;
      if (at == 0) own_word = w + lane < last ? __ldcg(words + w + lane) : 0;
      float own[kAhead][kTogether];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const bool in_tail = __shfl_sync(kAllLanes, own_word, at + k) >> lane & 1;
        const float* row = masses + (int64_t{w + k} * 32 + lane) * stride + query;
        if (in_tail && quads) {
          const float4 four = __ldcg(reinterpret_cast<const float4*>(row));
          own[k][0] = four.x, own[k][1] = four.y, own[k][2] = four.z, own[k][3] = four.w;
          continue;
        }
#pragma unroll
        for (int q = 0; q < kTogether; ++q) {
          own[k][q] = in_tail && query + q < queries ? __ldcg(row + q) : -INFINITY;
        }
      }
#pragma unroll
      for (int q = 0; q < kTogether; ++q) {
        float higher = top[q];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) higher = fmaxf(higher, own[k][q]);
        const float origin = higher == -INFINITY ? 0.0f : higher;
        sum[q] *= exp2_of(top[q] - origin);
#pragma unroll
        for (int k = 0; k < kAhead; ++k) sum[q] += exp2_of(own[k][q] - origin);
        top[q] = higher;
      }
    }
#pragma unroll
    for (int q = 0; q < kTogether; ++q) {
      float higher = top[q];
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        higher = fmaxf(higher, __shfl_xor_sync(kAllLanes, higher, step));
      }
      float all = top[q] == -INFINITY ? 0.0f : sum[q] * exp2_of(top[q] - higher);
#pragma unroll
      for (int step = 16; step > 0; step /= 2) all += __shfl_xor_sync(kAllLanes, all, step);
      if (lane == 0 && query + q < queries) sums[query + q] = make_float2(higher, all);
    }
  }
}

template <typename S, bool kPaged>
__global__ void __launch_bounds__(S::kMostWarps * 32, 1)
    attend_kernel(const __grid_constant__ AttendParams params) {
  using T = typename S::T;
  constexpr int kQueryTiles = S::kQueryTiles;
  extern __shared__ __align__(kSharedLine) uint4 shared[];
  __shared__ float2 warp_sums[S::kMostWarps][S::kQueries];
  __shared__ float2 tail_sums[S::kMostWarps][S::kQueries];
  __shared__ bool is_last;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  release_successor();

  Place place;
  const int32_t pieces = params.pieces;
  const int32_t tile = static_cast<int32_t>(blockIdx.x) / pieces;  // of queries
  const int32_t groups = static_cast<int32_t>(params.groups),
                heads = static_cast<int32_t>(params.heads);
  const int32_t query_tiles = (groups + S::kQueries - 1) / S::kQueries;
  place.piece = static_cast<int32_t>(blockIdx.x) - tile * pieces;
  place.task = tile / query_tiles;
  place.b = place.task / heads;
  place.h = place.task - place.b * heads;
  place.first_query = (tile - place.task * query_tiles) * S::kQueries;
  place.queries = min(groups - place.first_query, S::kQueries);
  char* memory = reinterpret_cast<char*>(shared);
  const int exact_warps = params.exact_warps, estimate_warps = params.estimate_warps;
  char* behind = memory + (exact_warps + estimate_warps) * S::kWarpBytes;

  Walker<S, kPaged> walker;
  walker.memory = memory + warp * S::kWarpBytes;
  walker.lane = lane;
  walker.row_chunks = static_cast<int>(params.head_dim) / S::kElements;
  walker.estimates = warp >= exact_warps;
  walker.rank = -1;
  walker.groups = groups;
  walker.queries = place.queries;
  if constexpr (kPaged) {
    const RetrievedPages& pages = params.pages;
    walker.sources = pages.sources + place.task * pages.stride;
    walker.pages = static_cast<int32_t>(pages.pages);
    walker.page_size = static_cast<int32_t>(pages.page_size);
    // Blocks of other queries read the same rows.
    walker.fills = pages.fills && place.first_query == 0;
    walker.keys.pages = pages.keys.row<T>(place.b, place.h, 0);
    walker.keys.page_stride = pages.keys.stride_t;
    walker.values.pages = pages.values.row<T>(place.b, place.h, 0);
    walker.values.page_stride = pages.values.stride_t;
  }
  WarpState<S> state;
  state.clear();
  Queries<S> queries;
  wait_for_predecessor();

  const bool has_tail = params.estimated.tail != nullptr;
  int32_t share, shares;  // of the warps that have the same kind of rows
  if (walker.estimates) {
    const EstimatedClusters& clusters = params.estimated;
    share = place.piece * estimate_warps + warp - exact_warps;
    shares = pieces * estimate_warps;
    walker.rows = clusters.counts[place.task];
    walker.ids = clusters.ids + place.task * clusters.clusters;
    walker.masses =
        clusters.log2_mass + place.task * clusters.clusters * groups + place.first_query;
    static_cast<TwoPlaces<T>&>(walker.values) = {
        nullptr, clusters.centroid_values.row<const T>(place.b, place.h, 0), 0,
        clusters.centroid_values.stride_t};
  } else {
    share = place.piece * exact_warps + warp;
    shares = pieces * exact_warps;
    const int exact_threads = exact_warps * 32;
    const int32_t ranks = static_cast<int32_t>(params.retrieved.clusters);
    const int64_t first_rank = static_cast<int64_t>(place.task) * ranks;
    const int32_t* before = params.retrieved.before + first_rank + place.task;
    const int32_t* shift = params.retrieved.shift + first_rank;
    const int64_t steady = params.counters[place.b * kCounters + kSteadyTokens];
    const int32_t retrieved_tokens = before[ranks];
    queries.load(params, place, reinterpret_cast<float*>(behind), lane, exact_threads);
    if constexpr (!kMatrix<T>) behind += S::kQueries * S::kPadded * sizeof(float);
    walker.before = before;
    walker.shift = shift;
    walker.ranks = ranks;
    if constexpr (kPaged) walker.first_source = params.pages.first + first_rank;
    if (ranks <= (kPaged ? kPagedRanksInShared : kRanksInShared)) {
      int32_t* copied = reinterpret_cast<int32_t*>(behind);
#pragma unroll 1
      for (int i = thread; i <= ranks; i += exact_threads) {
        copied[i] = before[i];
        if (i < ranks) copied[ranks + 1 + i] = shift[i];
        if constexpr (kPaged) {
          if (i < ranks) copied[2 * ranks + 1 + i] = walker.first_source[i];
        }
      }
      walker.before = copied;
      walker.shift = copied + ranks + 1;
      if constexpr (kPaged) walker.first_source = copied + 2 * ranks + 1;
    }
    walker.steady_tokens = static_cast<int32_t>(
        steady < 0                            ? 0
            : steady < params.steady_capacity ? steady
                                              : params.steady_capacity);
    walker.rows = walker.steady_tokens + retrieved_tokens;
    static_cast<TwoPlaces<T>&>(walker.keys) = {
        params.steady_keys.row<const T>(place.b, place.h, 0),
        params.store_keys.row<const T>(place.b, place.h, 0), params.steady_keys.stride_t,
        params.store_keys.stride_t};
    static_cast<TwoPlaces<T>&>(walker.values) = {
        params.steady_values.row<const T>(place.b, place.h, 0),
        params.store_values.row<const T>(place.b, place.h, 0), params.steady_values.stride_t,
        params.store_values.stride_t};
  }
  __syncthreads();
  const int64_t tiles = (walker.rows + kTileTokens - 1) / kTileTokens;
  const float scale2 = params.scale * kLog2e;
  const int32_t first_tile = static_cast<int32_t>(tiles * share / shares);
  const int32_t last_tile = static_cast<int32_t>(tiles * (share + 1) / shares);
  if (walker.estimates && has_tail) {
    walker.prefetch(first_tile, last_tile);
    sum_tail(params, place.task, place.first_query, place.queries, share, shares, tail_sums[warp]);
  }
  walker.walk(first_tile, last_tile, [&](int stage, int32_t t) {
    float logits[kQueryTiles][4];
    if (walker.estimates) {
#pragma unroll
      for (int n = 0; n < kQueryTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int query = 8 * n + 2 * (lane % 4) + i % 2;
          logits[n][i] = query < place.queries
              ? walker.masses_at(stage)[(lane / 4 + i / 2 * 8) * S::kQueries + query]
              : -INFINITY;
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

  // The states of the warps become those of the piece.
  const int threads = static_cast<int>(blockDim.x);
  const int exact_parts = exact_warps > 0, parts = exact_parts + (estimate_warps > 0);
  const int64_t first_sum =
      (static_cast<int64_t>(tile) * pieces + place.piece) * parts * S::kQueries;
  const int quads = static_cast<int>(params.head_dim) / 4;
  float4* values = reinterpret_cast<float4*>(params.values) + first_sum * quads;
#pragma unroll 1
  for (int i = thread; i < parts * place.queries * quads; i += threads) {
    const int part = i / (place.queries * quads), rest = i % (place.queries * quads);
    const int query = rest / quads, quad = rest % quads;
    const int first = part < exact_parts ? 0 : exact_warps;
    const int last = part < exact_parts ? exact_warps : exact_warps + estimate_warps;
    float top = -INFINITY;
#pragma unroll 3
    for (int w = first; w < last; ++w) {
      top = fmaxf(top, warp_sums[w][query].x);
      if (has_tail && part >= exact_parts) top = fmaxf(top, tail_sums[w][query].x);
    }
    const float origin = top == -INFINITY ? 0.0f : top;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float mass = 0.0f;
    if (has_tail && part >= exact_parts) {
#pragma unroll 3
      for (int w = first; w < last; ++w) {
        mass += tail_sums[w][query].y * exp2_of(tail_sums[w][query].x - origin);
      }
      const float4 values_sum = reinterpret_cast<const float4*>(
          params.estimated.value_sums + place.task * params.head_dim)[quad];
      const int64_t indexed = params.counters[place.b * kCounters + kIndexedTokens];
      const float weight = mass / static_cast<float>(indexed > 1 ? indexed : 1);
      if (mass > 0.0f) {  // without a tail the sums may hold anything
        sum.x = weight * values_sum.x, sum.y = weight * values_sum.y;
        sum.z = weight * values_sum.z, sum.w = weight * values_sum.w;
      }
    }
#pragma unroll 3
    for (int w = first; w < last; ++w) {
      const float factor = exp2_of(warp_sums[w][query].x - origin);
      const float4 own = *reinterpret_cast<const float4*>(
          memory + w * S::kWarpBytes + (query * S::kPadded + quad * 4) * sizeof(float));
      mass += factor * warp_sums[w][query].y;
      sum.x += factor * own.x;
      sum.y += factor * own.y;
      sum.z += factor * own.z;
      sum.w += factor * own.w;
    }
    const int at = part * S::kQueries + query;
    __stcg(values + at * quads + quad, sum);
    if (quad == 0) __stcg(params.sums + first_sum + at, make_float2(top, mass));
  }

  // The block that comes last merges all pieces.
  __syncthreads();
  if (thread == 0) is_last = take_ticket(params.tickets + tile) == pieces - 1;
  __syncthreads();
  if (!is_last) return;
  merge_pieces<S>(params, place, tile, memory);
}

// Calls use(Shape) for what `params` says.
template <typename T, int kGroups, typename Use>
void with_groups(const AttendParams& params, const Use& use) {
  if (query_tile(params.groups, params.head_dim) == 8) {
    use(Shape<T, kGroups, 1>{});
  } else if constexpr (kGroups * 4 * kChunk<T> <= 128) {
    use(Shape<T, kGroups, 2>{});
  }
}

template <typename T, typename Use>
void with_head_dim(const AttendParams& params, const Use& use) {
  constexpr int kScale = kMatrix<T> ? 1 : 2;  // float32 has twice the chunks
  if (params.head_dim <= 64) with_groups<T, 2 * kScale>(params, use);
  else if (params.head_dim <= 96) with_groups<T, 3 * kScale>(params, use);
  else if (params.head_dim <= 128) with_groups<T, 4 * kScale>(params, use);
  else with_groups<T, 8 * kScale>(params, use);
}

template <typename Use>
void with_shape(const AttendParams& params, const Use& use) {
  RETRO_CUDA_DISPATCH(params.dtype, with_head_dim, params, use);
}

// Shared memory of a block beside its tiles.
template <typename S>
int64_t other_bytes(const AttendParams& params) {
  const int64_t ranks = params.retrieved.clusters;
  const bool paged = params.pages.sources != nullptr;
  const bool fit = ranks <= (paged ? kPagedRanksInShared : kRanksInShared);
  return (kMatrix<typename S::T> ? 0 : S::kQueries * S::kPadded * int64_t{sizeof(float)}) +
      (fit ? ((paged ? 3 : 2) * ranks + 1) * int64_t{sizeof(int32_t)} : 0);
}

}  // namespace

void plan_attend(const Launcher& launch, AttendParams& params) {
  const int64_t tiles = ticket_count(params), processors = launch.processors();
  params.pieces = static_cast<int32_t>(
      tiles <= processors ? processors / std::max<int64_t>(tiles, 1)
                          : ceil_div(kRounds * processors, tiles));
  with_shape(params, [&](auto shape) {
    using S = decltype(shape);
    // Ranks or none, the plan is the same.
    constexpr int64_t kOther = (2 * kRanksInShared + 1) * int64_t{sizeof(int32_t)} +
        (kMatrix<typename S::T> ? 0 : S::kQueries * S::kPadded * int64_t{sizeof(float)});
    const int64_t room = std::min(launch.shared_bytes() - kOther, kTileBytesPerBlock);
    const int64_t warps =
        std::max<int64_t>(std::min<int64_t>(room / S::kWarpBytes, S::kMostWarps), 2);
    params.estimate_warps =
        static_cast<int32_t>(std::max<int64_t>((warps * kEstimatePercent + 50) / 100, 1));
    params.exact_warps = static_cast<int32_t>(warps) - params.estimate_warps;
  });
}

AttendSpace reserve_attend(Workspace& workspace, const AttendParams& params) {
  const int64_t tiles = ticket_count(params);
  const int64_t parts = (params.exact_warps > 0) + (params.estimate_warps > 0);
  const int64_t states = tiles * params.pieces * parts * query_tile(params.groups, params.head_dim);
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
  with_shape(params, [&](auto shape) {
    using S = decltype(shape);
    const int64_t warps = params.exact_warps + params.estimate_warps;
    const int64_t bytes = warps * S::kWarpBytes + other_bytes<S>(params);
    const int64_t merge_bytes = MergeMemory::bytes(params.pieces, S::kQueries, params.head_dim / 4);
    launch(
        params.pages.sources == nullptr ? attend_kernel<S, false> : attend_kernel<S, true>,
        grid_of(ticket_count(params) * params.pieces), warps * 32, std::max(bytes, merge_bytes), 1,
        params);
  });
}

}  // namespace retro
