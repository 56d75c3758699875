// Columns of `counters`, int64 [B, kCounters]: all that a step must know about a row, on the device.
#pragma once

#include <cstdint>

namespace retro {

enum Counter : int64_t {
  kSteadyTokens = 0,  // tokens in the steady zone: sinks, tokens not yet indexed, latest tokens
  kIndexedTokens,     // tokens in the KV store, in cluster order
  kClusters,          // live clusters of the index
  kUpdates,           // segments that have become clusters while decoding
  kRetrievedTokens,   // tokens retrieved so far, over KV heads and steps
  kSteps,             // decode steps so far
  kDroppedTokens,     // tokens that did not fit; CUDA ops count them where CPU ops raise
  kFinishedHeads,     // heads that the CUDA op now running has done; 0 between ops
  // What page_gather found, over KV heads and steps; 0 unless offloaded.
  kPageHits,       // pages of retrieved clusters that the page cache had
  kPageMisses,     // pages of retrieved clusters that it had not
  kMissedTokens,   // tokens of those pages: what was read from the store
  kAdmissions,     // clusters that came into the page cache
  kEvictions,      // clusters that left it
  kLateDecisions,  // gathers of a KV head that found no decision about the step before
  kOpenTokens,  // indexed tokens at the end of the store whose clusters grow_index will make anew
  kCounters,
};

}  // namespace retro
