// The replacement policy of one (row, KV head), on plain memory: update_pages runs it on CPU tensors, a worker
// thread on memory that the host and a GPU share. Integers only, so that it is the same everywhere.
//
// It may run late, twice or not at all: what it decides is a list of clusters that may go, in order, of
// which page_gather takes as many as it needs and can take.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "page_cache.h"

namespace retro {

enum class Policy { lru, lru2, lfu };

inline bool find_policy(const std::string& name, Policy& policy) {
  if (name == "lru") policy = Policy::lru;
  else if (name == "lru2") policy = Policy::lru2;
  else if (name == "lfu") policy = Policy::lfu;
  else return false;
  return true;
}

inline const char* policy_names() { return "'lru', 'lru2', 'lfu'"; }

struct UpdatePagesParams {
  Policy policy;
  int64_t tasks, retrieved_clusters, clusters, pages;  // B * Hkv, R, C, P
  const int32_t* requests;                             // [tasks, kRequestHeader + R]
  const uint8_t* cached;                               // [tasks, C]
  // [tasks, C + 1, 2]: of each cluster the stamp of its last use and what the policy adds to that; in the last
  // row the number of the last gather seen, and the most pages missed lately
  int64_t* history;
  int32_t* decisions;  // [tasks, kDecisionHeader + P]
};

// A stamp orders uses by step and, within one, by rank: of two clusters of a step the better one stays.
inline constexpr int64_t kStampRanks = 4096;

inline int64_t stamp_of(int64_t step, int64_t rank) {
  return step * kStampRanks + (kStampRanks - 1 - std::min(rank, kStampRanks - 1));
}

// LFU counts uses in these; the count halves every kAgingSteps.
inline constexpr int64_t kUse = 256;
inline constexpr int64_t kAgingSteps = 64;

inline int64_t aged(int64_t uses, int64_t stamp, int64_t step) {
  const int64_t halvings = step / kAgingSteps - stamp / kStampRanks / kAgingSteps;
  return halvings < 0 ? uses : uses >> std::min<int64_t>(halvings, 62);
}

// The list goes on until free pages and those of its clusters are as many as the step with the most missed
// pages lately, times this: some of them the next step retrieves itself, and one decision may have to do for
// two steps. A longer list gains no hits; it costs only the time to make it.
inline constexpr int64_t kReserve = 4;
// The most pages missed lately shrink by one part in so many at each step.
inline constexpr int64_t kMissMemory = 8;

struct Candidate {
  int64_t major, minor;  // the least goes first
  int32_t cluster;
  int32_t pages;

  bool operator<(const Candidate& other) const {
    if (major != other.major) return major < other.major;
    if (minor != other.minor) return minor < other.minor;
    return cluster < other.cluster;
  }
};

inline void note_use(Policy policy, int64_t* history, int64_t step, int64_t rank) {
  switch (policy) {
    case Policy::lru: break;
    case Policy::lru2: history[1] = history[0]; break;
    case Policy::lfu: history[1] = aged(history[1], history[0], step) + kUse; break;
  }
  history[0] = stamp_of(step, rank);
}

inline void set_key(Policy policy, const int64_t* history, int64_t step, Candidate& candidate) {
  candidate.minor = history[0];
  switch (policy) {
    case Policy::lru: candidate.major = 0; break;
    case Policy::lru2: candidate.major = history[1]; break;
    case Policy::lfu: candidate.major = aged(history[1], history[0], step); break;
  }
}

inline void update_pages_head(const UpdatePagesParams& params, int64_t task) {
  const int64_t clusters = params.clusters, ranks = params.retrieved_clusters;
  const int32_t* requests = params.requests + task * (kRequestHeader + ranks);
  const uint8_t* cached = params.cached + task * clusters;
  int64_t* history = params.history + task * (clusters + 1) * 2;
  int64_t* seen = history + clusters * 2;
  int32_t* decisions = params.decisions + task * (kDecisionHeader + params.pages);
  const int64_t step = published(requests[kRequestStep]);
  if (step <= 0 || step == seen[0]) return;  // nothing new
  seen[0] = step;
  // History lies anywhere in memory: ask for all of it before any of it is used.
  for (int64_t r = 0; r < ranks; ++r) {
    const int64_t cluster = shared(requests[kRequestHeader + r]);
    if (cluster >= 0 && cluster < clusters) __builtin_prefetch(history + 2 * cluster, 1);
  }
  for (int64_t r = 0; r < ranks; ++r) {
    const int64_t cluster = shared(requests[kRequestHeader + r]);
    if (cluster < 0 || cluster >= clusters) continue;
    note_use(params.policy, history + 2 * cluster, step, r);
  }
  const int64_t missed = shared(requests[kRequestMissed]);
  seen[1] = std::max(missed, seen[1] - (seen[1] + kMissMemory - 1) / kMissMemory);
  int64_t wanted = kReserve * seen[1] - shared(requests[kRequestFree]);  // pages to list

  static thread_local std::vector<Candidate> candidates;
  candidates.clear();
  int64_t held = 0;
  const auto look = [&](int64_t cluster) {
    const int64_t pages = shared(cached[cluster]);
    if (pages == 0) return;
    candidates.push_back({0, 0, static_cast<int32_t>(cluster), static_cast<int32_t>(pages)});
    held += pages;
    __builtin_prefetch(history + 2 * cluster);
  };
  int64_t c = 0;
  // Most are not in. Eight at once only say whether to look at each.
  for (; c + 8 <= clusters; c += 8) {
    uint64_t eight;
    std::memcpy(&eight, cached + c, sizeof eight);
    if (eight == 0) continue;
    for (int64_t i = c; i < c + 8; ++i) look(i);
  }
  for (; c < clusters; ++c) look(c);
  for (Candidate& candidate : candidates) {
    set_key(params.policy, history + 2 * candidate.cluster, step, candidate);
  }

  // Sorts as many as are about as many pages as are wanted, and goes on if they were too few.
  const int64_t most = std::min<int64_t>(static_cast<int64_t>(candidates.size()), params.pages);
  const auto end = candidates.end();
  int64_t count = 0;
  while (count < most && wanted > 0) {
    const int64_t about = wanted * static_cast<int64_t>(candidates.size()) / held + 8;
    const auto first = candidates.begin() + count;
    const auto last = first + std::min(about, most - count);
    if (last != end) std::nth_element(first, last, end);
    std::sort(first, last);
    for (auto next = first; next != last && wanted > 0; ++next, ++count) {
      set_shared(decisions[kDecisionHeader + count], next->cluster);
      wanted -= next->pages;
    }
  }
  set_shared(decisions[kDecisionCount], static_cast<int32_t>(count));
  publish(decisions[kDecisionStep], static_cast<int32_t>(step));
}

}  // namespace retro
