// The replacement policy of one (row, head), on plain memory: update_pages runs it on CPU tensors, a worker
// thread on memory that the host and a GPU share.
//
// It may run late, twice or not at all: what it decides is a list of clusters that may go, in order, of
// which page_gather takes as many as it needs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "page_cache.h"

namespace retro {

enum class Policy { lru };

inline bool find_policy(const std::string& name, Policy& policy) {
  if (name == "lru") policy = Policy::lru;
  else return false;
  return true;
}

inline const char* policy_names() { return "'lru'"; }

struct UpdatePagesParams {
  Policy policy;
  int64_t tasks, retrieved_clusters, clusters, pages;  // B * Hkv, R, C, P
  const int32_t* requests;                             // [tasks, kRequestHeader + R]
  const uint8_t* cached;                               // [tasks, C]
  double* history;                                     // [tasks, C + 1, 2]
  int32_t* decisions;                                  // [tasks, kDecisionHeader + P]
};

struct Candidate {
  double key;
  int32_t cluster;
  int32_t pages;

  bool operator<(const Candidate& other) const {
    return key < other.key || (key == other.key && cluster < other.cluster);
  }
};

// The clusters that are in, with their pages.
inline void find_cached(const uint8_t* cached, int64_t clusters, std::vector<Candidate>& found) {
  found.clear();
  int64_t c = 0;
  const auto look = [&](int64_t cluster) {
    const uint8_t pages = shared(cached[cluster]);
    if (pages > 0) found.push_back({0.0, static_cast<int32_t>(cluster), pages});
  };
  for (; c + 8 <= clusters; c += 8) {  // most are not in
    uint64_t eight;
    std::memcpy(&eight, cached + c, sizeof eight);
    if (eight == 0) continue;
    for (int64_t i = c; i < c + 8; ++i) look(i);
  }
  for (; c < clusters; ++c) look(c);
}

inline void update_pages_head(const UpdatePagesParams& params, int64_t task) {
  const int64_t clusters = params.clusters, ranks = params.retrieved_clusters;
  const int32_t* requests = params.requests + task * (kRequestHeader + ranks);
  double* history = params.history + task * (clusters + 1) * 2;
  double* summary = history + clusters * 2;
  int32_t* decisions = params.decisions + task * (kDecisionHeader + params.pages);
  const int32_t step = published(requests[kRequestStep]);
  if (step <= 0 || step == static_cast<int32_t>(summary[0])) return;  // nothing new
  for (int64_t r = 0; r < ranks; ++r) {
    const int32_t cluster = shared(requests[kRequestHeader + r]);
    if (cluster < 0 || cluster >= clusters) continue;
    history[2 * cluster] = step - static_cast<double>(r) / static_cast<double>(ranks);
  }
  summary[0] = step;

  static thread_local std::vector<Candidate> candidates;
  find_cached(params.cached + task * clusters, clusters, candidates);
  for (Candidate& candidate : candidates) candidate.key = history[2 * candidate.cluster];
  std::sort(candidates.begin(), candidates.end());
  const int64_t count = std::min<int64_t>(static_cast<int64_t>(candidates.size()), params.pages);
  for (int64_t i = 0; i < count; ++i) {
    set_shared(decisions[kDecisionHeader + i], candidates[i].cluster);
  }
  set_shared(decisions[kDecisionCount], static_cast<int32_t>(count));
  publish(decisions[kDecisionStep], step);
}

}  // namespace retro
