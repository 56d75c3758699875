#include "page_gather.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu_ops.h"

namespace retro {
namespace {

constexpr const char* kOp = "page_gather";

// Clusters of one (row, head) that this step retrieves. All marks are gone when it ends.
class Marks {
 public:
  Marks(int64_t clusters, const int32_t* ids, int64_t count) : ids_(ids), count_(count) {
    if (static_cast<int64_t>(marked().size()) < clusters) marked().resize(clusters, 0);
  }
  Marks(const Marks&) = delete;
  ~Marks() {
    for (int64_t i = 0; i < set_; ++i) {
      if (ids_[i] >= 0) marked()[ids_[i]] = 0;
    }
  }

  // Marks the ids in their order; the place of the first one that is there twice, or -1.
  int64_t set() {
    for (; set_ < count_; ++set_) {
      if (ids_[set_] < 0) continue;
      if (marked()[ids_[set_]]) return set_;
      marked()[ids_[set_]] = 1;
    }
    return -1;
  }

  bool has(int64_t cluster) const { return marked()[cluster]; }

 private:
  static std::vector<uint8_t>& marked() {
    static thread_local std::vector<uint8_t> marked;
    return marked;
  }

  const int32_t* ids_;
  int64_t count_;
  int64_t set_ = 0;
};

// What one (row, head) adds to the counters.
struct Tally {
  int64_t retrieved_tokens = 0;
  int64_t hits = 0, misses = 0, missed_tokens = 0;
  int64_t admissions = 0, evictions = 0, late = 0;
};

// The tables of one (row, head).
struct Head {
  const PageGatherParams& params;
  int64_t b, h;
  const int32_t* retrieved;
  const int32_t* offsets;
  int32_t* table;
  int32_t* free;
  const int32_t* decisions;
  int32_t* requests;
  uint8_t* cached;
  int64_t* addresses;

  Head(const PageGatherParams& params, int64_t task)
      : params(params),
        b(task / params.heads),
        h(task % params.heads),
        retrieved(params.retrieved + task * params.retrieved_clusters),
        offsets(params.offsets + task * (params.clusters + 1)),
        table(params.page_table + task * params.entries),
        free(params.free_pages + task * (kFreeHeader + params.pages)),
        decisions(params.decisions + task * (kDecisionHeader + params.pages)),
        requests(params.requests + task * (kRequestHeader + params.retrieved_clusters)),
        cached(params.cached + task * params.clusters),
        addresses(params.addresses + task * params.retrieved_clusters * 3) {}

  int64_t tokens(int64_t cluster) const { return offsets[cluster + 1] - offsets[cluster]; }
  int64_t page_count(int64_t cluster) const {
    return retro::page_count(tokens(cluster), params.page_size);
  }
  int32_t* entries(int64_t cluster) const {
    return table + first_entry(offsets[cluster], cluster, params.page_size);
  }

  // Everything is checked before anything is written, so that a refused call changes nothing.
  void check_values() const {
    const int64_t clusters = params.clusters, pages = params.pages;
    for (int64_t r = 0; r < params.retrieved_clusters; ++r) {
      const int32_t cluster = retrieved[r];
      check(
          cluster >= -1 && cluster < clusters, kOp, "retrieved must lie in -1 .. ", clusters - 1,
          ", got ", cluster);
      if (cluster < 0) continue;
      check(
          offsets[cluster] >= 0 && offsets[cluster] <= offsets[cluster + 1] &&
              offsets[cluster + 1] <= params.store_tokens,
          kOp, "offsets must rise within a store of ", params.store_tokens, " tokens, got ",
          offsets[cluster], " and ", offsets[cluster + 1]);
      for (int64_t i = 0; i < page_count(cluster); ++i) {
        const int32_t page = entries(cluster)[i];
        check(
            page >= -1 && page < pages, kOp, "page_table must lie in -1 .. ", pages - 1, ", got ",
            page);
      }
    }
    const int64_t count = free[kFreeCount];
    check(count >= 0 && count <= pages, kOp, "free_pages counts ", count, " free pages of ", pages);
    for (int64_t i = 0; i < count; ++i) {
      const int32_t page = free[kFreeHeader + i];
      check(
          page >= 0 && page < pages, kOp, "free_pages must lie in 0 .. ", pages - 1, ", got ",
          page);
    }
    Marks marks(clusters, retrieved, params.retrieved_clusters);
    const int64_t twice = marks.set();
    check(
        twice < 0, kOp, "retrieved must name a cluster once for each head, got ",
        twice < 0 ? -1 : retrieved[twice], " twice");
  }

  template <typename T>
  void copy_page(int64_t page, int64_t first_slot, int64_t count) const {
    const size_t row_bytes = static_cast<size_t>(params.head_dim) * sizeof(T);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t slot = page * params.page_size + t;
      std::memcpy(
          params.page_keys.row<T>(b, h, slot), params.store_keys.row<const T>(b, h, first_slot + t),
          row_bytes);
      std::memcpy(
          params.page_values.row<T>(b, h, slot),
          params.store_values.row<const T>(b, h, first_slot + t), row_bytes);
    }
  }

  // Takes a cluster out; its pages become free. False if it was not in.
  bool evict(int64_t cluster) const {
    const int64_t first = offsets[cluster], last = offsets[cluster + 1];
    if (first < 0 || first > last || last > params.store_tokens) return false;  // no such cluster
    bool held = false;
    for (int64_t i = 0; i < page_count(cluster); ++i) {
      int32_t& page = entries(cluster)[i];
      if (page >= 0 && page < params.pages && free[kFreeCount] < params.pages) {
        free[kFreeHeader + free[kFreeCount]++] = page;
        held = true;
      }
      page = -1;
    }
    set_shared(cached[cluster], uint8_t{0});
    return held;
  }

  template <typename T>
  void admit(int64_t cluster) const {
    for (int64_t i = 0; i < page_count(cluster); ++i) {
      int32_t& page = entries(cluster)[i];
      if (page >= 0) continue;
      page = free[kFreeHeader + --free[kFreeCount]];
      const int64_t first = i * params.page_size;
      copy_page<T>(
          page, offsets[cluster] + first, std::min(params.page_size, tokens(cluster) - first));
    }
    set_shared(
        cached[cluster],
        static_cast<uint8_t>(std::min<int64_t>(page_count(cluster), kMostPagesCounted)));
  }

  template <typename T>
  Tally gather() const {
    Tally tally;
    const int64_t ranks = params.retrieved_clusters;
    static thread_local std::vector<int64_t> missing;  // pages, by rank
    missing.assign(static_cast<size_t>(ranks), 0);
    int64_t needed = 0;
    const int64_t lasting = params.lasting_slots(b);
    // A cluster that does not fit, or is to be made anew, stays out.
    const auto may_come = [&](int64_t cluster) {
      return page_count(cluster) <= params.pages && offsets[cluster] < lasting;
    };
    for (int64_t r = 0; r < ranks; ++r) {
      const int32_t cluster = retrieved[r];
      int64_t* address = addresses + 3 * r;
      if (cluster < 0) {
        address[0] = address[1] = address[2] = 0;
        continue;
      }
      address[0] = offsets[cluster];
      address[1] = tokens(cluster);
      address[2] = first_entry(offsets[cluster], cluster, params.page_size);
      tally.retrieved_tokens += tokens(cluster);
      const int64_t count = page_count(cluster);
      for (int64_t i = 0; i < count; ++i) {
        if (table[address[2] + i] >= 0) continue;
        ++missing[r];
        tally.missed_tokens += std::min(params.page_size, tokens(cluster) - i * params.page_size);
      }
      tally.hits += count - missing[r];
      tally.misses += missing[r];
      if (may_come(cluster)) needed += missing[r];
    }

    // Decisions come from elsewhere and may be late, old or nonsense: they only say what may go.
    const int32_t last_step = free[kFreeStep];
    tally.late = last_step > 0 && published(decisions[kDecisionStep]) != last_step;
    if (free[kFreeCount] < needed) {
      Marks marks(params.clusters, retrieved, ranks);
      marks.set();
      const int64_t decided =
          std::clamp<int64_t>(shared(decisions[kDecisionCount]), 0, params.pages);
      for (int64_t i = 0; i < decided && free[kFreeCount] < needed; ++i) {
        const int32_t victim = shared(decisions[kDecisionHeader + i]);
        if (victim < 0 || victim >= params.clusters || marks.has(victim)) continue;
        tally.evictions += evict(victim);
      }
    }

    int64_t taken = 0;
    const int64_t available = free[kFreeCount];
    for (int64_t r = 0; r < ranks; ++r) {
      if (missing[r] == 0 || !may_come(retrieved[r])) continue;
      taken += missing[r];
      if (taken > available) break;
      admit<T>(retrieved[r]);
      ++tally.admissions;
    }

    const int32_t step = last_step == std::numeric_limits<int32_t>::max() ? 1 : last_step + 1;
    free[kFreeStep] = step;
    for (int64_t r = 0; r < ranks; ++r) set_shared(requests[kRequestHeader + r], retrieved[r]);
    set_shared(requests[kRequestFree], free[kFreeCount]);
    set_shared(requests[kRequestMissed], static_cast<int32_t>(tally.misses));
    publish(requests[kRequestStep], step);
    return tally;
  }
};

Tally gather_head(const PageGatherParams& params, int64_t task) {
  const Head head(params, task);
  switch (params.dtype) {
    case DType::float32: return head.gather<float>();
    case DType::bfloat16: return head.gather<bfloat16>();
    default: return head.gather<float16>();
  }
}

}  // namespace

Tensor page_gather(
    const Tensor& retrieved,
    const Tensor& offsets,
    const Tensor& store,
    const Tensor& pages,
    const Tensor& page_table,
    const Tensor& free_pages,
    const Tensor& decisions,
    const Tensor& requests,
    const Tensor& cached,
    const Tensor& counters,
    int64_t page_size) {
  Tensor addresses;
  const Call<PageGatherParams> call = page_gather_call(
      kOp, retrieved, "retrieved", retrieved, offsets, store, pages, page_table, free_pages,
      decisions, requests, cached, counters, page_size, &addresses);
  const PageGatherParams& params = call.params;
  const int64_t tasks = params.batch * params.heads;
  for (int64_t task = 0; task < tasks; ++task) Head(params, task).check_values();
  std::vector<Tally> tallies(static_cast<size_t>(tasks));
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) tallies[task] = gather_head(params, task);
  });
  for (int64_t b = 0; b < params.batch; ++b) {
    int64_t* row = params.counters + b * kCounters;
    for (int64_t h = 0; h < params.heads; ++h) {
      const Tally& tally = tallies[b * params.heads + h];
      row[kRetrievedTokens] += tally.retrieved_tokens;
      row[kPageHits] += tally.hits;
      row[kPageMisses] += tally.misses;
      row[kMissedTokens] += tally.missed_tokens;
      row[kAdmissions] += tally.admissions;
      row[kEvictions] += tally.evictions;
      row[kLateDecisions] += tally.late;
    }
    row[kSteps] += 1;
  }
  return addresses;
}

}  // namespace retro

STABLE_TORCH_LIBRARY_IMPL(retro, CPU, m) { m.impl("page_gather", TORCH_BOX(&retro::page_gather)); }
